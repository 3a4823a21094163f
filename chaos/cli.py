"""`longshore chaos run`: seeds of the simulated world, and their verdicts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from bus.options import JsonOption

if TYPE_CHECKING:
    from chaos.run import Verdict

SHOWN_LIMIT = 400


def run(
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many worlds.")] = 100,
    first: Annotated[int, typer.Option("--from", min=0, metavar="SEED", help="The first seed.")] = 0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="This one world alone.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show every record, event and log line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run simulated cells under faults, each from a seed, in virtual time; exit 1 when one breaks a promise.

    A failing seed shows its world and how to run it again: the same seed gives the same run, to the byte.

    Example: longshore chaos run --seeds 1000 --from 500
    """
    numbers = [seed] if seed is not None else list(range(first, first + seeds))
    verdicts = _run_all(numbers, trace, as_json)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if as_json:
        summary = {"seeds": len(verdicts), "failed": [verdict.seed for verdict in failed]}
        typer.echo(json.dumps(summary))
    else:
        records = sum(verdict.records + verdict.pages for verdict in verdicts)
        spent = sum(verdict.seconds for verdict in verdicts)
        virtual = sum(verdict.virtual_seconds for verdict in verdicts)
        typer.echo(
            f"{len(verdicts)} worlds, {len(failed)} broke a promise; {virtual:.0f} virtual seconds and {records} "
            f"records in {spent:.1f} s ({spent / len(verdicts):.2f} s per world)"
        )
    if failed:
        raise typer.Exit(1)


def _run_all(numbers: list[int], trace: bool, as_json: bool) -> list[Verdict]:
    from rich.console import Console
    from rich.progress import Progress

    from chaos.run import run_seed

    verdicts = []
    quiet = trace or as_json or len(numbers) == 1
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("worlds", total=len(numbers))
        for number in numbers:
            verdict = run_seed(number, _say if trace and not as_json else None)
            verdicts.append(verdict)
            if as_json:
                typer.echo(json.dumps(verdict.as_dict()))
            elif not verdict.passed or len(numbers) == 1:
                _show(verdict)
            progress.advance(task)
    return verdicts


def _say(at: float, text: str) -> None:
    typer.echo(f"{at:10.4f}  {text if len(text) <= SHOWN_LIMIT else text[:SHOWN_LIMIT] + '...'}")


def _show(verdict: Verdict) -> None:
    """A verdict for people: the world, what happened to it, what it broke, and how to see it again."""
    typer.echo(
        f"seed {verdict.seed}: {'passed' if verdict.passed else 'FAILED'}; {verdict.requests} answers read, "
        f"{verdict.records} records, {verdict.pages} pages, digest {verdict.digest}"
    )
    for name, value in verdict.options.as_dict().items():
        typer.echo(f"    {name:16} {value}")
    for at, text in verdict.events:
        typer.echo(f"  {at:8.3f}  {text}")
    for violation in verdict.violations:
        typer.echo(f"  broken: {violation}")
    if not verdict.passed:
        typer.echo(f"  again:  {verdict.rerun()}")
