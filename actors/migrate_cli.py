"""`longshore migrate`: moves running answers to another server, and tells what became of each."""

from __future__ import annotations

import asyncio
import json as json_module
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from bus.jetstream import JetStreamBus

_REQUEST = re.compile(r"[0-9a-f]{32}")


async def migrate(
    what: Annotated[str, typer.Argument(metavar="REQUEST|MODEL", help="A request id, or a model: all that run of it.")],
    to: Annotated[
        str, typer.Option(metavar="SERVER", help="A server, or a worker such as gpu/s2/0; by default any other.")
    ] = "",
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for the end of the moves.")
    ] = (60.0),
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Move running answers to another server while they are written; their readers see no gap and no repeat.

    Example: longshore migrate llama-a --to s2
    """
    import msgspec

    from actors.moves_watch import watch_moves
    from bus.messages import FactEnvelope, MigrateRequested, encode, kind_of
    from bus.subjects import Subjects

    subjects = Subjects(cell)
    is_request = _REQUEST.fullmatch(what) is not None
    message = MigrateRequested(request=what if is_request else "", model="" if is_request else what, to=to)
    payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
    async with connected(nats, cell) as bus:
        await _refuse_unknown(bus, cell, "" if is_request else what, to)
        fact = await bus.ledger.append(subjects.fact("migration", kind_of(message)), payload)
        ended = []
        try:
            async with asyncio.timeout(wait or None):
                async for move in watch_moves(bus, subjects, fact.sequence):
                    ended.append(move)
                    if not json:
                        _tell(move.request, move.moved, move.source, move.destination, move.reason, move.elapsed_ns)
        except TimeoutError:
            raise Failure(f"not all moves ended within {wait:g} s; `longshore tail --kind move` shows them") from None
    if json:
        print(json_module.dumps([{name: getattr(move, name) for name in move.__struct_fields__} for move in ended]))
    elif not ended:
        print(f"nothing of {what} runs")
    if any(not move.moved for move in ended):
        sys.exit(1)


async def _refuse_unknown(bus: JetStreamBus, cell: str, model: str, to: str) -> None:
    """A name that the cell does not know is a mistyped one: said before anything is stated."""
    from actors.up import cell_status

    status = await cell_status(bus, cell)
    if status is None:
        raise Failure(f"no control of cell {cell!r} answers, so nothing would move: see `longshore rules`")
    servers, workers = status["servers"], status["workers"]
    models = {name for server in servers.values() for name in server["models"]}
    if model and model not in models:
        raise Failure(f"no model {model!r} in this cell; it has: {', '.join(sorted(models)) or 'none'}")
    if to and to not in servers and to not in workers:
        raise Failure(f"no server or worker {to!r} in this cell; it has: {', '.join(sorted([*servers, *workers]))}")


def _tell(request: str, moved: bool, source: str, destination: str, reason: str, elapsed_ns: int) -> None:
    if moved:
        print(f"{request} moved from {source} to {destination} in {elapsed_ns / 1e6:.0f} ms")
    else:
        print(f"{request} was not moved: {reason}")
