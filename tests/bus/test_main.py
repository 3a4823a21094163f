"""The program `longshore`: commands from entry points, errors as one sentence, quiet ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from bus.main import GROUP, main

COMMANDS = '''
import sys
import typer
from bus.contract import BusError

def greet(name: str, loud: bool = False) -> None:
    """Greet somebody.

    At length."""
    typer.echo(f"hello {name}{'!' if loud else ''}")

def add(path: str) -> None:
    """Add a thing."""
    print("added", path)

async def wait() -> None:
    """Wait in an event loop."""
    print("waited")

def fail() -> None:
    raise BusError("no server answers at nats://nowhere: start one")

class ModelError(Exception):
    pass

def model() -> None:
    raise ModelError("the directory d holds no weights: name another")

def bug() -> None:
    raise KeyError("oops")

def hang() -> None:
    import time
    print("hanging", flush=True)
    time.sleep(60)

def pour() -> None:
    while True:
        print("x" * 1000)
'''

POINTS = {
    "greet": "fakecommands:greet",
    "thing.add": "fakecommands:add",
    "thing.wait": "fakecommands:wait",
    "fail": "fakecommands:fail",
    "model": "fakecommands:model",
    "bug": "fakecommands:bug",
    "hang": "fakecommands:hang",
    "pour": "fakecommands:pour",
    "gone": "fakecommands_missing:gone",
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Has the fake commands, and what an installed distribution says of them."""
    (tmp_path / "fakecommands.py").write_text(COMMANDS)
    metadata = tmp_path / "fakecommands-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fakecommands\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in POINTS.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("fakecommands", None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    points = [EntryPoint(name, value, GROUP) for name, value in POINTS.items()]
    with pytest.raises(SystemExit) as ended:
        main(list(arguments), points)
    output = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, output.out, output.err


def process(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "bus.main", *arguments],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{directory}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_commands_and_groups(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "greet", "you", "--loud") == (0, "hello you!\n", "")
    assert run(capsys, "thing", "add", "here") == (0, "added here\n", "")
    assert run(capsys, "thing", "wait") == (0, "waited\n", "")


def test_help(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "Greet somebody." in out and "thing" in out
    assert "Not available" in out  # one that cannot be imported hides no other
    code, out, _ = run(capsys, "thing", "--help")
    assert code == 0 and "Add a thing." in out and "greet" not in out
    code, out, _ = run(capsys, "greet", "--help")
    assert code == 0 and "--loud" in out


def test_only_what_is_asked_for_is_imported(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "gone")
    assert code == 2 and "fakecommands_missing" in err
    assert "fakecommands" not in sys.modules


def test_wrong_usage(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "greet")
    assert code == 2 and "Traceback" not in err
    code, _, err = run(capsys, "nonsense")
    assert code == 2 and "nonsense" in err


def test_errors_are_one_sentence(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "fail") == (2, "", "longshore: no server answers at nats://nowhere: start one\n")
    assert run(capsys, "model") == (2, "", "longshore: the directory d holds no weights: name another\n")
    code, _, err = run(capsys, "bug")
    assert code == 1 and err.count("\n") == 1 and "KeyError" in err


def test_traceback_on_demand(directory: Path) -> None:
    with process(directory, "fail", LONGSHORE_TRACEBACK="1") as running:
        _, err = running.communicate(timeout=30)
    assert "Traceback" in err and running.returncode != 0


def test_interrupt_is_quiet(directory: Path) -> None:
    with process(directory, "hang") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "hanging\n"
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (130, "")


def test_a_reader_that_goes_away_is_no_error(directory: Path) -> None:
    with process(directory, "pour") as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(30) != 0


def test_help_is_quick(directory: Path) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with process(directory, "--help") as running:
            running.communicate(timeout=30)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0, times  # 0.2 s on an idle machine
