"""`longshore chaos soak`: many worlds in which answers move while everybody dies, on all cores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.errors import UserError
from bus.options import Failure, JsonOption

BATCH = 200


def soak(
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many worlds.")] = 1000,
    first: Annotated[int, typer.Option("--from", min=0, metavar="SEED", help="The first seed.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Processes; 0: one per core.")] = 0,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="FILE", help="Verdicts; what stands there is not run again.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run simulated worlds that move what runs, with deaths at any message; exit 1 when one breaks a promise.

    At the end: in which phase of a move deaths fell. A failing seed is shown with what it broke.

    Example: longshore chaos soak --seeds 10000 --state soak.jsonl
    """
    known = _known(state)
    wanted = range(first, first + seeds)
    missing = [seed for seed in wanted if seed not in known]
    try:
        for verdict in _run(missing, jobs or len(os.sched_getaffinity(0))):
            known[verdict["seed"]] = verdict
            if verdict["violations"] and not as_json:
                _show(verdict)
            if state is not None:
                with state.open("a") as file:
                    file.write(json.dumps(verdict) + "\n")
    except OSError as error:
        raise Failure(f"--state {state} cannot be written: {error.strerror}") from None
    _report([known[seed] for seed in wanted], as_json)


def one(seed: int) -> dict[str, Any]:
    """The verdict of one world, short."""
    from chaos.options import moving
    from chaos.run import run_world

    verdict = run_world(moving(seed))
    broken = [str(violation) for violation in verdict.violations][:5]
    return {"seed": seed, "violations": broken, "moves": verdict.moves, "kills": dict(verdict.kills)}


def _run(seeds: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(jobs) as pool:
        for begin in range(0, len(seeds), BATCH):
            yield from pool.map(one, seeds[begin : begin + BATCH])


def _known(state: Path | None) -> dict[int, dict[str, Any]]:
    """Verdicts of an earlier run; a last line that was cut off is passed over."""
    if state is None or not state.exists():
        return {}
    found: dict[int, dict[str, Any]] = {}
    lines = state.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            verdict = json.loads(line)
            found[int(verdict["seed"])] = verdict
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"--state {state}: line {number} is no verdict of a soak: name another file") from None
    return found


def _report(verdicts: list[dict[str, Any]], as_json: bool) -> None:
    failed = [verdict["seed"] for verdict in verdicts if verdict["violations"]]
    kills: dict[str, int] = {}
    for verdict in verdicts:
        for phase, count in verdict["kills"].items():
            kills[phase] = kills.get(phase, 0) + count
    moves = sum(verdict["moves"] for verdict in verdicts)
    found = {"seeds": len(verdicts), "failed": failed, "moves": moves, "deaths_in_phase": kills}
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{len(verdicts)} worlds, {moves:,} moves, {len(failed)} worlds broke a promise: {failed or 'none'}")
        most = max([1, *kills.values()])
        for phase, count in kills.items():
            typer.echo(f"  {phase:14} {count:8,}  {'#' * round(50 * count / most)}")
    if failed or (len(verdicts) >= BATCH and not all(kills.values())):
        raise typer.Exit(1)


def _show(verdict: dict[str, Any]) -> None:
    typer.echo(f"seed {verdict['seed']}: FAILED (again: longshore chaos soak --seeds 1 --from {verdict['seed']})")
    for text in verdict["violations"]:
        typer.echo(f"  broken: {text}")
