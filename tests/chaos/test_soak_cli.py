"""`longshore chaos soak`: its state file, its histogram, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bus.errors import UserError
from chaos import soak_cli
from chaos.deaths import VICTIMS
from chaos.phases import PHASES


def verdict(seed: int, *, broken: tuple[str, ...] = (), phases: dict[str, int] | None = None) -> dict[str, Any]:
    deaths = {
        "phases": dict.fromkeys(PHASES, 1) | (phases or {}),
        "victims": dict.fromkeys(VICTIMS, 2),
        "kinds": {"slot.kept": 1, "move.ended": 3},
    }
    return {"seed": seed, "violations": list(broken), "moves": 3, "deaths": deaths}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were run, in place of running them."""
    ran: list[int] = []

    def run(seeds: list[int], jobs: int) -> Any:
        for seed in seeds:
            ran.append(seed)
            yield verdict(seed)

    monkeypatch.setattr(soak_cli, "_run", run)
    return ran


def soak(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(soak_cli.soak)
    return CliRunner().invoke(app, list(arguments))


def test_what_stands_in_the_state_file_is_not_run_again(tmp_path: Path, told: list[int]) -> None:
    state = str(tmp_path / "soak.jsonl")
    assert soak("--seeds", "3", "--state", state).exit_code == 0
    shown = soak("--seeds", "5", "--state", state)
    assert told == [0, 1, 2, 3, 4]
    assert "5 worlds, 15 moves, 50 deaths during moves, 0 worlds broke a promise" in shown.output
    soak("--seeds", "5", "--state", state)
    assert len(told) == 5


def test_a_line_that_was_cut_off_is_run_again_and_garbage_is_refused(tmp_path: Path, told: list[int]) -> None:
    state = tmp_path / "soak.jsonl"
    lines = [json.dumps(verdict(seed)) for seed in range(3)]
    state.write_text("\n".join([*lines[:2], lines[2][:40]]))
    assert soak("--seeds", "3", "--state", str(state)).exit_code == 0
    assert told == [2]
    assert soak("--seeds", "3", "--state", str(state)).exit_code == 0, "the file is whole again"
    assert told == [2]
    for garbage in ("no json", '{"seed": 1}', "7", json.dumps({"seed": 1, "violations": [], "kills": {}})):
        state.write_text("\n".join([lines[0], garbage, lines[1], ""]))
        refused = soak("--seeds", "3", "--state", str(state))
        assert isinstance(refused.exception, UserError) and "line 2 is no verdict" in str(refused.exception)


def test_a_state_file_that_cannot_be_written_is_named(tmp_path: Path, told: list[int]) -> None:
    refused = soak("--seeds", "1", "--state", str(tmp_path / "nowhere" / "soak.jsonl"))
    assert refused.exit_code != 0 and "cannot be written" in str(refused.exception) + refused.output


def test_a_failing_seed_is_shown_with_how_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_cli, "_run", lambda seeds, jobs: iter([verdict(9, broken=("QUIET: not so",))]))
    shown = soak("--seeds", "1", "--from", "9")
    assert shown.exit_code == 1
    for expected in ("seed 9: FAILED", "chaos soak --seeds 1 --from 9", "broken: QUIET: not so", "promise: [9]"):
        assert expected in shown.output
    as_json = soak("--seeds", "1", "--from", "9", "--json")
    assert as_json.exit_code == 1
    found = json.loads(as_json.output)
    assert found["failed"] == [9] and found["moves"] == 3 and found["deaths"]["kinds"]["move.ended"] == 3


def test_an_empty_phase_fails_from_so_many_worlds_on_that_it_means_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seeds: list[int], jobs: int) -> Any:
        return (verdict(seed, phases={"released": 0}) for seed in seeds)

    monkeypatch.setattr(soak_cli, "_run", run)
    few = soak("--seeds", str(soak_cli.SIGNIFICANT - 1))
    assert few.exit_code == 0 and "released" in few.output
    many = soak("--seeds", str(soak_cli.SIGNIFICANT))
    assert many.exit_code == 1 and "no death fell into: released" in many.output
