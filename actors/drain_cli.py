"""`longshore drain`: takes a server out of service without its readers noticing."""

from __future__ import annotations

import asyncio
import json as json_module
import re
import sys
from typing import Annotated

import typer

from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected

PATIENCE_SECONDS = 10.0
"""For control to say so, beyond the deadline."""

_TIME = re.compile(r"(\d{1,6})(ms|s|m)?")
_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000}


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

    A server that starts anew is in service again. One with --stay is taken back with --undo.

    Example: longshore drain s2 --deadline 30s
    """
    import msgspec

    from bus.messages import DrainRequested, FactEnvelope, ServerDrained, decode_said, decode_said_body, encode, kind_of
    from bus.subjects import valid_name

    if not valid_name(server):
        raise UserError(f"{server!r} is no name of a server: `longshore status` shows which there are")
    time = _TIME.fullmatch(deadline)
    if time is None:
        raise UserError(f"--deadline {deadline!r} is no time: write 500ms, 30s or 5m")
    milliseconds = int(time[1]) * _MILLISECONDS[time[2] or "s"]
    message = DrainRequested(server, milliseconds, leave=not stay and not undo, undo=undo)
    payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
    async with connected(nats, cell) as bus:
        fact = await bus.ledger.append(bus.subjects.fact("placement", kind_of(message)), payload)
        if undo:
            print(json_module.dumps({"server": server, "in_service": True}) if json else f"{server} is in service")
            return
        subject = bus.subjects.said("placement", f"node/{server}", "server.drained")
        reader = await bus.ledger.read([subject], start=fact.sequence)
        told: ServerDrained | None = None
        try:
            async with asyncio.timeout(milliseconds / 1000 + PATIENCE_SECONDS):
                while told is None:
                    for record in await reader.batch():
                        found = decode_said_body(decode_said(record.payload).body)
                        told = found if isinstance(found, ServerDrained) and told is None else told
        except TimeoutError:
            raise Failure(f"no control said that {server} is drained: `longshore status` shows the cell") from None
        finally:
            await reader.close()
    if json:
        print(json_module.dumps(msgspec.to_builtins(told)))
    elif told.reason:
        raise Failure(f"{server} was not drained: {told.reason}")
    else:
        left = f", {told.left} answers were left to recovery" if told.left else ""
        print(f"{server} is drained{left}" + (" and leaves" if told.leave else "; take it back with --undo"))
    if told.reason:
        sys.exit(1)
