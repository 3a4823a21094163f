"""`longshore bench recovery`: the gap that readers see when a worker is killed."""

from __future__ import annotations

import json as json_module
import platform
from typing import Annotated, Any

import typer

from bus.options import Failure, JsonOption


def bench_recovery(
    kills: Annotated[int, typer.Option(min=1, max=10_000, help="SIGKILLs of a worker, one after the other.")] = 200,
    readers: Annotated[int, typer.Option(min=1, max=16, help="Answers that are read at the same time.")] = 6,
    tokens: Annotated[int, typer.Option(min=16, max=1500, help="Tokens of each answer.")] = 400,
    size: Annotated[str, typer.Option(metavar="PARAMETERS", help="Of the sample model, such as 8M.")] = "2M",
    json: JsonOption = False,
) -> None:
    """The longest gap that readers see after each kill, its phases, and what must be zero: positions lost, changed or
    repeated, requests unfinished. Two servers of two workers; about two seconds a kill, seven minutes in all.

    Example: longshore bench recovery --kills 30 --json
    """
    import uvloop
    from rich.console import Console

    from actors.bench_recovery import bench_recovery as measure
    from bus.contract import BusError
    from bus.sizes import parse_size

    console = Console(stderr=True, highlight=False)
    parameters = parse_size(size, "--size")
    with console.status("") as shown:
        try:
            found = uvloop.run(measure(kills, readers, tokens, parameters, shown.update))
        except BusError as error:
            raise Failure(str(error)) from None
    found |= {"python": platform.python_version()}
    if json:
        print(json_module.dumps(found))
    else:
        _print(found)
    wrong = ("unfinished", "positions_lost", "positions_changed", "positions_repeated")
    if any(found[name] for name in wrong):
        raise Failure(
            f"{', '.join(f'{found[name]} {name}' for name in wrong)}; {found['first_failure'] or 'see above'}"
        )


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "p50", "p99", "max", "reach", title="bench recovery (milliseconds)")
    gap = found["gap_ms"]
    reach = f"p50 {found['reach_ms']:.0f}"
    table.add_row(
        "longest gap of a kill", *(f"{gap[name]:.0f}" for name in ("p50", "p99", "max")), reach, end_section=True
    )
    for phase, spread in found["phases_ms"].items():
        table.add_row(phase, *(f"{spread[name]:.1f}" for name in ("p50", "p99", "max")), "")
    Console().print(table)
    print(
        f"{found['kills']} kills, {found['seconds_per_kill']} s each, {found['held']:.1f} answers on the worker; "
        f"heartbeat limit {found['heartbeat_limit_ms']:.0f} ms; of "
        f"{found['requests']} answers {found['unfinished']} unfinished; "
        f"positions lost {found['positions_lost']}, changed {found['positions_changed']}, "
        f"repeated {found['positions_repeated']}"
    )
