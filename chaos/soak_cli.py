"""`longshore chaos soak`: many worlds in which answers move while everybody dies, on all cores."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.errors import UserError
from bus.lifeline import end_with_parent
from bus.options import Failure, JsonOption

BATCH = 200
SIGNIFICANT = 1000
"""Worlds of which no phase of a move stays without deaths, unless something is wrong with them."""
SHOWN_KINDS = 20


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

    In most of them operators move and drain; in some there are more models than room, and placement moves by itself.
    Deaths are drawn uniformly over the ledger's messages during moves. At the end: in which phases of moves they fell,
    who died, at which kinds of message. From 1,000 worlds on, a phase without any death is a failure, too. A failing
    seed is shown with what it broke.

    Example: longshore chaos soak --seeds 10000 --state soak.jsonl
    """
    known = _known(state)
    _mend(state)
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
    from chaos.options import soaked
    from chaos.run import run_world

    # A world is full of cycles that live as long as it does: looking for garbage meanwhile finds little.
    gc.disable()
    try:
        verdict = run_world(soaked(seed))
    finally:
        gc.enable()
    gc.collect()
    broken = [str(violation) for violation in verdict.violations][:5]
    return {"seed": seed, "violations": broken, "moves": verdict.moves, "deaths": verdict.deaths}


def _run(seeds: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(jobs, initializer=end_with_parent) as pool:
        for begin in range(0, len(seeds), BATCH):
            yield from pool.map(one, seeds[begin : begin + BATCH])


def _known(state: Path | None) -> dict[int, dict[str, Any]]:
    """Verdicts of an earlier run; a last line that was cut off is passed over."""
    if state is None or not state.exists():
        return {}
    found: dict[int, dict[str, Any]] = {}
    lines = state.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            verdict = json.loads(line)
            verdict["moves"], verdict["violations"], verdict["deaths"]["phases"], verdict["deaths"]["victims"]
            found[int(verdict["seed"])] = verdict
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--state {state}: line {number} is no verdict of a soak: name another file") from None
    return found


def _mend(state: Path | None) -> None:
    """A last line that was cut off is taken away: what comes next begins a line of its own."""
    if state is None or not state.exists():
        return
    content = state.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with state.open("r+b") as file:
            file.truncate(len(whole))


def _report(verdicts: list[dict[str, Any]], as_json: bool) -> None:
    failed = [verdict["seed"] for verdict in verdicts if verdict["violations"]]
    deaths: dict[str, dict[str, int]] = {}
    for verdict in verdicts:
        for name, counts in verdict["deaths"].items():
            into = deaths.setdefault(name, {})
            for what, count in counts.items():
                into[what] = into.get(what, 0) + count
    empty = [phase for phase, count in deaths["phases"].items() if not count]
    moves = sum(verdict["moves"] for verdict in verdicts)
    if as_json:
        typer.echo(json.dumps({"seeds": len(verdicts), "failed": failed, "moves": moves, "deaths": deaths}))
    else:
        died = sum(deaths["victims"].values())
        typer.echo(
            f"{len(verdicts):,} worlds, {moves:,} moves, {died:,} deaths during moves, {len(failed)} worlds broke a "
            f"promise: {failed or 'none'}"
        )
        _histogram("moves by phase, at deaths", deaths["phases"])
        _histogram("deaths by victim", deaths["victims"])
        kinds = sorted(deaths["kinds"].items(), key=lambda kind: -kind[1])
        _histogram(
            f"deaths by message, {min(SHOWN_KINDS, len(kinds))} of {len(kinds)} kinds", dict(kinds[:SHOWN_KINDS])
        )
        if empty and len(verdicts) >= SIGNIFICANT:
            typer.echo(f"no death fell into: {', '.join(empty)}")
    if failed or (empty and len(verdicts) >= SIGNIFICANT):
        raise typer.Exit(1)


def _histogram(title: str, counts: dict[str, int]) -> None:
    typer.echo(f"{title}:")
    most = max([1, *counts.values()])
    for name, count in counts.items():
        typer.echo(f"  {name:22} {count:8,}  {'#' * round(40 * count / most)}")


def _show(verdict: dict[str, Any]) -> None:
    typer.echo(f"seed {verdict['seed']}: FAILED (again: longshore chaos soak --seeds 1 --from {verdict['seed']})")
    for text in verdict["violations"]:
        typer.echo(f"  broken: {text}")
