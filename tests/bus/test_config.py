"""The configuration file: every value is checked with its place; flag, variable, file and default have one order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import config_cli
from bus.config_fields import Field
from bus.config_file import check_configuration
from bus.credentials import VARIABLES
from bus.main import GROUP, main
from bus.yaml_reader import ConfigurationError, Value, parse_yaml

COMMANDS = '''
import json
from pathlib import Path
from typing import Annotated
import typer
from bus.config_options import active_file
from bus.options import CellOption, NatsOption, connection

def control(
    nats: NatsOption = "nats://127.0.0.1:4222",
    cell: CellOption = "main",
    silence: Annotated[float, typer.Option(min=0.2, max=60, help="Silence.")] = 1.0,
    limit: Annotated[str, typer.Option(metavar="SIZE")] = "1GiB",
    data: Annotated[Path, typer.Option()] = Path("data"),
    hosts: Annotated[list[str], typer.Option("--host")] = [],
    log_json: Annotated[bool, typer.Option("--log-json")] = False,
    password: Annotated[str, typer.Option()] = "",
) -> None:
    """Control."""
    print(json.dumps([nats, cell, silence, limit, str(data), hosts, log_json, password, str(active_file())]))

def node(server: Annotated[str, typer.Option(metavar="NAME")], cell: CellOption = "main") -> None:
    """Node."""
    print(server, cell)

def who(nats: NatsOption = "nats://127.0.0.1:4222") -> None:
    """Who connects."""
    said = connection(nats)
    print(json.dumps([said.url, said.user, said.password, said.creds, said.ca]))

def plain() -> None:
    """Plain."""
    print("plain")

def other(cell: CellOption = "main") -> None:
    """Another."""
    print(cell)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "configured_commands.py").write_text(COMMANDS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("LONGSHORE_CONFIG", "LONGSHORE_CELL", *VARIABLES.values()):
        monkeypatch.setenv(name, "")  # and what a command sets there is taken away after the test
    yield tmp_path
    sys.modules.pop("configured_commands", None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    points = [
        EntryPoint(name, f"configured_commands:{name}", GROUP) for name in ("control", "node", "other", "plain", "who")
    ]
    with pytest.raises(SystemExit) as ended:
        main(list(arguments), points)
    output = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, output.out, output.err


def test_flag_over_variable_over_file_over_default(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "l.yaml"

    def values(*arguments: str) -> list[Any]:
        code, out, err = run(capsys, "control", *arguments)
        assert (code, err) == (0, "")
        found: list[Any] = json.loads(out)
        return found

    assert values() == ["nats://127.0.0.1:4222", "main", 1.0, "1GiB", "data", [], False, "", "None"]
    file.write_text(
        "cell: harbour\nnats: {url: 'nats://a:1'}\nlog: {json: true}\n"
        "control:\n  silence: 3\n  limit: 500\n  data: /srv\n  host: [a, b]\n  password: hush\n"
    )
    from_file = ["nats://a:1", "harbour", 3.0, "500", "/srv", ["a", "b"], True, "hush", str(file)]
    assert values("--config", str(file)) == values(f"--config={file}") == from_file
    monkeypatch.setenv("LONGSHORE_CONFIG", str(file))
    assert values() == from_file
    for name, text in {"CELL": "quay", "CONTROL_SILENCE": "4", "CONTROL_LIMIT": "2GB", "LOG_JSON": "0"}.items():
        monkeypatch.setenv(f"LONGSHORE_{name}", text)
    assert values() == ["nats://a:1", "quay", 4.0, "2GB", "/srv", ["a", "b"], False, "hush", str(file)]
    assert values("--cell", "pier", "--silence", "5", "--host", "c")[1:6] == ["pier", 5.0, "2GB", "/srv", ["c"]]
    assert run(capsys, "other") == (0, "quay\n", "")


def test_what_must_be_given_may_stand_in_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "node")[0] == 2
    file = folder / "l.yaml"
    file.write_text("cell: harbour\n")
    assert run(capsys, "node", "--config", str(file))[0] == 2
    file.write_text("cell: harbour\nnode: {server: s7}\n")
    assert run(capsys, "node", "--config", str(file)) == (0, "s7 harbour\n", "")


def test_who_connects_is_one_thing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "l.yaml"
    file.write_text("nats: {url: 'nats://a:1', user: me, password: hush, ca: /ca.pem}\n")
    tls = ["--config", str(file)]
    assert json.loads(run(capsys, "who", *tls)[1]) == ["nats://a:1", "me", "hush", "", "/ca.pem"]
    for name in VARIABLES.values():
        monkeypatch.setenv(name, "")
    assert json.loads(run(capsys, "who", "--nats-creds", "/c", *tls)[1]) == ["nats://a:1", "", "", "/c", "/ca.pem"]
    for name in VARIABLES.values():
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("LONGSHORE_NATS_CREDS", "/d")
    assert json.loads(run(capsys, "who", *tls)[1]) == ["nats://a:1", "", "", "/d", "/ca.pem"]
    config_cli.show("control", str(file), as_json=True)
    shown = {path: one["value"] for path, one in json.loads(capsys.readouterr().out)["control"].items()}
    assert (shown["nats.user"], shown["nats.creds"], shown["nats.ca"]) == ("", "/d", "/ca.pem")
    monkeypatch.setenv("LONGSHORE_NATS_CREDS", "")
    config_cli.show("control", str(file), as_json=True)
    shown = {path: one["value"] for path, one in json.loads(capsys.readouterr().out)["control"].items()}
    assert (shown["nats.user"], shown["nats.password"]) == ("me", "********")


def test_what_is_wrong_is_told_before_anything_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "l.yaml"
    file.write_text("control:\n  silense: 3\n  limit: 16GX\n")
    code, out, err = run(capsys, "control", "--config", str(file))
    assert (code, out) == (2, "")
    assert err == (
        f"longshore: {file}:2:3: unknown field control.silense: did you mean control.silence? "
        f"(`longshore config check {file}` shows 1 more)\n"
    )
    monkeypatch.setenv("LONGSHORE_CONFIG", str(file))
    assert run(capsys, "plain")[:2] == (0, "plain\n"), "a command that takes nothing from it does not look at it"
    monkeypatch.setenv("LONGSHORE_CONFIG", "")
    code, _, err = run(capsys, "other", "--config", str(folder / "missing.yaml"))
    assert code == 2 and "missing.yaml cannot be read: No such file" in err
    assert run(capsys, "control", "--help", "--config", str(file))[0] == 0, "help is there for who is in need of it"


FIELDS = {
    one.path: one
    for one in (
        Field("cell", "cell", str, "main", "LONGSHORE_CELL", "NAME"),
        Field("nats.url", "nats", str, "nats://127.0.0.1:4222", "LONGSHORE_NATS", "URL"),
        Field("nats.password", "", str, "", "LONGSHORE_NATS_PASSWORD"),
        Field("node.memory", "memory", str, "", "X", "SIZE"),
        Field("node.device", "device", str, "cpu", "X", "cpu|cuda"),
        Field("node.health", "health", str, "", "X", "HOST:PORT"),
        Field("node.slots", "slots", int, 16, "X", low=1, high=64),
        Field("node.share", "share", float, 0.5, "X", low=0),
        Field("node.fsync", "fsync", bool, False, "X"),
        Field("node.hosts", "hosts", str, [], "X", many=True),
    )
}

GOOD = """
cell: main
nats: {url: "tls://a:4222,b"}
node:
  memory: 16GB
  device: cuda
  health: "[::1]:8080"
  slots: 64
  share: 1
  fsync: true
  hosts: [a, b]
"""

BAD = [
    ("cell: 7", "1:7: cell must be 1 to 63 letters, digits, '-' and '_', got 7"),
    ("cell: my cell", "1:7: cell must be 1 to 63 letters"),
    ("nats: nats://a", "1:7: nats must be a section with fields, got 'nats://a'"),
    ("nats:\n  url: http://a", "2:8: nats.url must be the address of a NATS server"),
    ("nats: {password: 123456}", "1:18: nats.password must be a text, got another value; put it in quotes"),
    ("node: {memory: 16GX}", "1:16: node.memory must be a size such as 500MB or 2GiB, got '16GX'"),
    ("node: {memory: 0}", "node.memory must be a size"),
    ("node: {device: on}", "node.device must be one of cpu, cuda, got true"),
    ("node: {health: 8080}", "node.health must be an address such as 127.0.0.1:8080, got 8080"),
    ("node: {health: 'a:70000'}", "node.health must be an address"),
    ("node: {slots: 65}", "node.slots must be a whole number from 1 to 64, got 65"),
    ("node: {slots: 1.0}", "got 1.0"),
    ("node: {slots: true}", "got true"),
    ("node: {share: .nan}", "node.share must be a number of at least 0, got nan"),
    ("node: {share: '1'}", "got '1'"),
    ("node: {fsync: 1}", "node.fsync must be true or false, got 1"),
    ("node: {hosts: [a, [b]]}", "node.hosts must be a list, each a text, got a list"),
    ("node: {memry: 1GB}", "1:8: unknown field node.memry: did you mean node.memory?"),
    ("memory: 1GB", "1:1: unknown field memory: did you mean node.memory?"),
    ("nodes: {}", "unknown field nodes: did you mean node?"),
    ("zebra: 1", "unknown field zebra: known are cell, nats, node"),
    ("- a", "1:1: a configuration has sections such as `control:`, this is a list"),
    ("cell: a\ncell: b", "2:1: cell stands here a second time, after line 1"),
    ("a: &x [1]\nb: [*x, *x]", "1:4: anchors (&name) are not taken"),
    ("b: [*x, *x]", "1:5: aliases (*name) are not taken"),
    ("cell: !!python/object/apply:os.system [ls]", "1:7: tags (!name) are not taken"),
    ("cell: a\n---\ncell: b", "2:1: a second document begins"),
    ("cell: [", "expected the node content"),
    ("\tcell: a", "1:1: found character"),
    ("cell: \x07", "1:1: the character 0x7 may not stand in YAML"),
    ("1: a", "1:1: a key must be a text"),
    ("cell: " + "9" * 5000, "1:7: this number cannot be read"),
    ("{a: " * 2000, "nested more than 16 levels deep"),
    ("#" * 70_000, "has over 65536 bytes"),
    (b"cell: \xff", "1:1: the file is not UTF-8 here"),
]


def check(folder: Path, text: str | bytes) -> tuple[dict[str, Any], list[str]]:
    file = folder / "l.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    try:
        values, _, problems = check_configuration(file, FIELDS)
    except ConfigurationError as error:
        return {}, [str(error)]
    return values, problems


def test_values_of_every_kind(tmp_path: Path) -> None:
    values, problems = check(tmp_path, GOOD)
    assert problems == []
    assert values == {
        "cell": "main",
        "nats.url": "tls://a:4222,b",
        "node.memory": "16GB",
        "node.device": "cuda",
        "node.health": "[::1]:8080",
        "node.slots": 64,
        "node.share": 1.0,
        "node.fsync": True,
        "node.hosts": ["a", "b"],
    }
    for text in ("", "# nothing\n", "node:\n", "node: {memory: null}\n"):
        assert check(tmp_path, text) == ({}, [])


@pytest.mark.parametrize(("text", "sentence"), BAD)
def test_every_problem_has_its_place(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    _, problems = check(tmp_path, text)
    assert len(problems) == 1 and sentence in problems[0], problems
    assert problems[0].count("\n") == 0 and len(problems[0]) < 300
    assert str(tmp_path / "l.yaml") in problems[0]


def test_all_problems_are_told(tmp_path: Path) -> None:
    text = "".join(f"node{i}: 1\n" for i in range(5)) + "node: {slots: 0, fsync: 3}"
    assert len(check(tmp_path, text)[1]) == 7


@given(st.one_of(st.binary(max_size=200), st.text(alphabet="ab:-[]{}&*!|>'\"#\n\t 01.~?,%@", max_size=80)))
def test_any_bytes_are_a_value_or_one_sentence(data: bytes | str) -> None:
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    try:
        assert isinstance(parse_yaml(text, "f"), Value)
    except ConfigurationError as error:
        assert "\n" not in str(error)


def test_check_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the commands that there are."""
    file = tmp_path / "l.yaml"
    file.write_text("cell: harbour\nnats:\n  url: nats://me:hush@a:4222\ncontrol: {queue_limit: 5}\nnode: {slots: 8}\n")
    config_cli.check(file)
    told = capsys.readouterr()
    assert "4 fields, all in order" in told.out and told.err == ""
    secret = tmp_path / "secret.yaml"
    secret.write_text("nats: {password: hush, user: me}\n")
    for mode, remark in ((0o644, "holds nats.password, and others than its owner may read it"), (0o600, "")):
        secret.chmod(mode)
        config_cli.check(secret)
        told = capsys.readouterr()
        assert remark in told.err and bool(remark) == bool(told.err) and "hush" not in told.err
    monkeypatch.setenv("LONGSHORE_NODE_SLOTS", "9")
    monkeypatch.setenv("LONGSHORE_NODE_SLOT", "9")
    config_cli.show("node", str(file), as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["node"]
    assert shown["node"]["cell"] == {"value": "harbour", "source": f"{file}:1:7", "variable": "LONGSHORE_CELL"}
    assert shown["node"]["node.slots"] == {
        "value": 9,
        "source": "LONGSHORE_NODE_SLOTS",
        "variable": "LONGSHORE_NODE_SLOTS",
    }
    assert shown["node"]["node.device"]["source"] == "default"
    config_cli.show("", str(file), as_json=False)
    told = capsys.readouterr()
    assert "hush" not in told.out and "nats://a:4222" in told.out
    assert "LONGSHORE_NODE_SLOT is no variable of a command: did you mean LONGSHORE_NODE_SLOTS?" in told.err
    monkeypatch.setenv("LONGSHORE_NODE_SLOTS", "many")
    with pytest.raises(ConfigurationError, match=r"LONGSHORE_NODE_SLOTS: node\.slots must be a whole number from 1"):
        config_cli.show("node", str(file), as_json=True)
    file.write_text("node: {slots: 0}\nnodes: 1\n")
    with pytest.raises(Exception, match="2") as ended:
        config_cli.check(file, as_json=True)
    assert getattr(ended.value, "exit_code", 0) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == 3 and problems[0].startswith(f"{file}:1:15: node.slots must be")


def test_secrets_are_known_by_their_name() -> None:
    names = {"nats.password": True, "gateway.api_keys": True, "gateway.api_key": True, "nats.token": True}
    names |= {"node.context": False, "nats.password_file": False, "gateway.max_tokens": False}
    for path, secret in names.items():
        one = Field(path, "", str, "", "")
        assert one.secret is secret and (one.shown("hush") == "hush") is not secret
    file = Field("gateway.api_keys", "", Path, None, "")
    assert file.shown(Path("/keys")) == "/keys", "the name of a file is no secret"
