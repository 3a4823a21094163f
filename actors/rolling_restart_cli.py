"""`longshore rolling-restart`: every server of a cell anew, one after the other, while requests run."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected


async def rolling_restart(
    server: Annotated[
        list[str] | None,
        typer.Option("--server", metavar="NAME", help="Only this one; may be repeated, the order is kept."),
    ] = None,
    deadline: Annotated[
        str, typer.Option(metavar="TIME", help="How long moving away from a server may take, such as 30s or 5m.")
    ] = "60s",
    wait: Annotated[str, typer.Option(metavar="TIME", help="How long a server may take until it is back.")] = "120s",
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Restart the servers one after the other: each is drained, leaves, and is back with its workers before the next.

    What keeps the nodes has to start them again: systemd with Restart=always, compose, or `longshore up`. Ctrl-C takes
    a server that has not left yet back into service.

    Example: longshore rolling-restart --server s1 --server s2
    """
    from rich.console import Console

    from actors.draining import parse_time
    from actors.rolling_restart import Limits, Stopped, restart_server, servers_to_restart

    limits = Limits(parse_time(deadline, "--deadline"), parse_time(wait, "--wait"))
    console = Console(stderr=True, highlight=False)
    done: list[dict[str, Any]] = []
    names: list[str] = []
    async with connected(nats, cell) as bus:
        try:
            names = await servers_to_restart(bus, cell, server or [])
            for number, name in enumerate(names, 1):
                with console.status(f"{name} ({number} of {len(names)})") as shown:
                    prefix = f"{name} ({number} of {len(names)})"

                    def say(what: str, prefix: str = prefix) -> None:
                        shown.update(f"{prefix}: {what}")

                    done.append(await restart_server(bus, cell, name, limits, say))
                if not json:
                    console.print(_sentence(done[-1]))
        except Stopped as stopped:
            if json:
                print(json_module.dumps({"servers": done, "failed": str(stopped)}))
            behind = f"; restarted: {', '.join(one['server'] for one in done) or 'none'}" if names else ""
            raise Failure(f"{stopped}{behind}") from None
    if json:
        print(json_module.dumps({"servers": done}))


def _sentence(one: dict[str, Any]) -> str:
    left = f", {one['left']} were left to recovery" if one["left"] else ""
    return (
        f"{one['server']}: {one['moved']} answers moved{left}, drained after {one['drained_seconds']} s, "
        f"back {one['ready_seconds']} s later"
    )
