"""What the program says of itself: every command has its place, a sentence and an example that it would take."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
from command_lines import POINTS, check_command, command_of

from bus.config_cli import all_fields
from bus.config_file import check_configuration
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


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def command_lines(text: str) -> list[str]:
    """What a page tells its reader to type, as far as it is this program."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shell = "\n".join(block for language, block in fenced if language in ("", "sh", "bash", "console"))
    lines = [line.strip().removeprefix("$ ") for line in shell.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(longshore [^`\n]+)`", text)
    return [line for line in lines if re.match(r"longshore [a-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_pages_tell_to_type_is_taken(page: Path) -> None:
    for line in command_lines(page.read_text()):
        words = shlex.split(re.split(r" (?:>|\||&&|&|;)(?: |$)|; ", line)[0], comments=True)[1:]
        if words[0] not in {name.partition(".")[0] for name in POINTS}:
            raise AssertionError(f"{page.name}: {line}")
        check_command(words)


def test_the_configuration_in_operations_is_in_order(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    fields = {one.path: one for many in all_fields().values() for one in many}
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "l.yaml").write_text(block)
        values, _, problems = check_configuration(tmp_path / "l.yaml", fields)
        assert problems == [] and values
