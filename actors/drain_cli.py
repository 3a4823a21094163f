"""`longshore drain`: takes a server out of service without its readers noticing."""

from __future__ import annotations

import json as json_module
import sys
from typing import Annotated

import typer

from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected


async def drain(
    server: Annotated[str, typer.Argument(metavar="SERVER", help="The name of the server.")],
    deadline: Annotated[
        str, typer.Option(metavar="TIME", help="How long moving may take, such as 500ms, 30s or 5m.")
    ] = "30s",
    stay: Annotated[bool, typer.Option("--stay", help="Leave its process running.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the server back into service.")] = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Move everything away from a server and let its process end; what is left after the deadline is recovered.

    A server that starts anew is in service again, and systemd, compose and `longshore up` start it at once. To keep one
    out, drain it with --stay and stop its process then. One with --stay is taken back with --undo.

    Example: longshore drain s2 --deadline 30s
    """
    import msgspec

    from actors.draining import order, parse_time, until_told
    from bus.messages import DrainRequested
    from bus.subjects import valid_name

    if not valid_name(server):
        raise UserError(f"{server!r} is no name of a server: `longshore status` shows which there are")
    milliseconds = parse_time(deadline, "--deadline")
    async with connected(nats, cell) as bus:
        fact = await order(
            bus, bus.subjects, DrainRequested(server, milliseconds, leave=not stay and not undo, undo=undo)
        )
        if undo:
            print(json_module.dumps({"server": server, "in_service": True}) if json else f"{server} is in service")
            return
        try:
            told = await until_told(bus, bus.subjects, server, fact, milliseconds)
        except TimeoutError:
            raise Failure(f"no control said that {server} is drained: `longshore status` shows the cell") from None
    if json:
        print(json_module.dumps(msgspec.to_builtins(told)))
    elif told.reason:
        raise Failure(f"{server} was not drained: {told.reason}")
    else:
        left = f", {told.left} answers were left to recovery" if told.left else ""
        print(f"{server} is drained{left}" + (" and leaves" if told.leave else "; take it back with --undo"))
    if told.reason:
        sys.exit(1)
