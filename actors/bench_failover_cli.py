"""`longshore bench failover`: the gap that requests see when what serves them is killed."""

from __future__ import annotations

import json as json_module
import platform
from typing import Annotated, Any

import typer

from bus.options import Failure, JsonOption


def bench_failover(
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Kills of each kind.")] = 5,
    rate: Annotated[float, typer.Option(min=1, max=1000, help="Requests per second, stub engine.")] = 20.0,
    fsync: Annotated[bool, typer.Option("--fsync/--no-fsync", help="Servers fsync every message.")] = True,
    control: Annotated[bool, typer.Option("--control/--no-control", help="Kill the publishing control.")] = True,
    leader: Annotated[bool, typer.Option("--leader/--no-leader", help="Kill the server that leads the ledger.")] = True,
    json: JsonOption = False,
) -> None:
    """How long requests wait when the publishing control, or the leader of a three-node cluster, is killed.

    The servers elect a leader by themselves, after 4 to 9 s; each election is shown beside the gap.

    Example: longshore bench failover --rounds 3 --json
    """
    import uvloop

    from bus.contract import BusError

    try:
        found = uvloop.run(_measure(rounds, rate, fsync, control, leader))
    except BusError as error:
        raise Failure(str(error)) from None
    if json:
        print(json_module.dumps(found))
        return
    _print(found)


async def _measure(rounds: int, rate: float, fsync: bool, control: bool, leader: bool) -> dict[str, Any]:
    from actors.bench_failover import control_killed, leader_killed

    found: dict[str, Any] = {"rate": rate, "fsync": fsync, "python": platform.python_version()}
    if control:
        found["control"] = await control_killed(rounds=rounds, rate=rate, fsync=fsync)
    if leader:
        found["leader"] = await leader_killed(rounds=rounds, rate=rate, fsync=fsync)
    return found


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "killed", "gap median", "max", "reach", "usual", "requests", "failed", title="bench failover (milliseconds)"
    )
    for name, what in (("control", "publishing control"), ("leader", "leader of the ledger, R3")):
        if name not in found:
            continue
        row = found[name]
        usual = max(one["usual_ms"] for one in row["rounds"])
        requests = sum(one["requests"] for one in row["rounds"])
        gap = row["gap_ms"]
        table.add_row(
            what, f"{gap['median']:.0f}", f"{gap['max']:.0f}", str(row["reach_ms"]), f"{usual:.0f}", str(requests),
            str(row["failed"]),
        )  # fmt: skip
    console = Console()
    console.print(table)
    for number, one in enumerate(found.get("leader", {}).get("rounds", []), 1):
        elected = ", ".join(f"{stream} {ms}" for stream, ms in sorted(one["elected_ms"].items()))
        console.print(f"round {number}: gap {one['gap_ms']:.0f}; elected after: {elected or 'nothing was led there'}")
