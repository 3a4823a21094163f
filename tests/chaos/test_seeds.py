"""A hundred worlds keep every promise; the same seed is the same run in any process; a failing seed says how to rerun.

What the worlds can do at all, each promise's checker included, is shown in test_shown_to_be_real.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
from typer.testing import CliRunner

from chaos.options import DISTURBANCES, calm, draw
from chaos.run import Verdict, run_seed, run_world

ROOT = Path(__file__).parents[2]
SEEDS = range(100)
SEEDS_TOLD = (3, 9, 15)


def report(verdict: Verdict) -> str:
    broken = "\n".join(str(violation) for violation in verdict.violations)
    return f"seed {verdict.seed}\n{broken}\nagain: {verdict.rerun()}"


@pytest.mark.parametrize("decade", range(0, len(SEEDS), 10))
def test_a_hundred_worlds_keep_every_promise(decade: int) -> None:
    failed = [verdict for seed in SEEDS[decade : decade + 10] if not (verdict := run_seed(seed)).passed]
    assert not failed, "\n\n".join(map(report, failed))


def test_a_calm_world_is_quiet_and_loses_nothing() -> None:
    for seed in range(5):
        verdict = run_world(calm(seed))
        assert verdict.passed, report(verdict)
        assert not any("dies" in text or "loses" in text for _, text in verdict.events)


def test_the_seeds_cover_every_kind_of_fault() -> None:
    worlds = [draw(seed) for seed in SEEDS]
    kinds = {kind for world in worlds for kind in world.odds.on()}
    assert len(kinds) == 8
    assert {kind for world in worlds for kind in world.disturbances} == set(DISTURBANCES)
    for name in ("load_failed", "attach_failed", "sequence_refused", "engine_broken"):
        assert any(getattr(world.troubles, name) for world in worlds)
    assert all(any(kind not in world.odds.on() for kind in kinds) for world in worlds[:10]), "some kinds are off"


def test_a_seed_is_the_same_run_in_every_process() -> None:
    program = "import sys; from chaos.run import run_seed; print([run_seed(int(s)).digest for s in sys.argv[1:]])"
    digests = []
    for hash_seed in ("0", "1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, SEEDS_TOLD)],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        digests.append(result.stdout)
    assert digests[0] == digests[1] == digests[2]
    assert str([run_seed(seed).digest for seed in SEEDS_TOLD]) == digests[0].strip()


def test_a_simulated_world_needs_neither_torch_nor_nats() -> None:
    program = (
        "import sys; from chaos.run import run_seed; assert run_seed(1).passed; "
        "print([name for name in ('torch', 'transformers', 'nats', 'numpy', 'tokenizers') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_the_command_shows_a_world_and_gives_json() -> None:
    import typer

    from chaos import cli

    app = typer.Typer()
    app.command()(cli.run)
    shown = CliRunner().invoke(app, ["--seed", "3"])
    assert shown.exit_code == 0, shown.output
    assert "seed 3: passed" in shown.output and run_seed(3).digest in shown.output
    as_json = CliRunner().invoke(app, ["--seeds", "2", "--from", "3", "--json"])
    first, second, summary = map(json.loads, as_json.output.splitlines())
    assert (first["seed"], second["seed"], summary) == (3, 4, {"seeds": 2, "failed": []})


def test_a_failing_seed_shows_its_world_and_how_to_run_it_again() -> None:
    import typer

    from chaos import cli

    app = typer.Typer()
    app.command()(cli.run)
    with mutations.nobody_rescues():
        shown = CliRunner().invoke(app, ["--seeds", "1", "--from", "9"])
    assert shown.exit_code == 1
    for expected in ("seed 9: FAILED", "odds", "broken: ENDED_ONCE", "longshore chaos run --seed 9 --trace"):
        assert expected in shown.output
