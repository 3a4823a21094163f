"""What the program says of itself: every command has its place, a sentence and an example that it would take."""

from __future__ import annotations

import inspect
import re
import shlex

import pytest
from command_lines import POINTS, check_command, command_of

from bus.help import GROUPS, PANELS, panel_of
from bus.main import main


@pytest.mark.parametrize("name", sorted(POINTS))
def test_every_command_has_an_example_that_it_takes(name: str) -> None:
    text = inspect.getdoc(POINTS[name].load()) or ""
    examples = re.findall(r"Example: (longshore .*?)(?:\n\n|\Z|\n(?=Example:))", text, re.DOTALL)
    assert examples, f"{name} has no example"
    for example in examples:
        line = " ".join(example.split())
        line = re.split(r" (?:>|\||&&) ", line)[0]
        words = shlex.split(line, comments=True)[1:]
        assert command_of(words) == name
        check_command(words)


def test_every_command_has_its_place(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tops = {name.partition(".")[0] for name in POINTS}
    assert {name for names in PANELS.values() for name in names} <= tops, "a name in a panel is no command"
    assert set(GROUPS) <= {name.partition(".")[0] for name in POINTS if "." in name}
    assert len([name for name in tops if panel_of(name) is None]) <= 2, "give new commands a place in bus/help.py"
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "Not available" not in text
    assert [panel for panel in PANELS if panel in text] == list(PANELS)
    assert all(re.search(rf"\b{name}\b", text) for name in tops)


@pytest.mark.parametrize("name", ["control", "node", "gateway", "up", "model.add"])
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name.split("."), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "Example" in text and "--config" in text
