"""`longshore why`: the decisions that a request met, and what each of them weighed."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from actors.why import Told


async def why(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="Its id; the first digits will do.")],
    recording: Annotated[
        Path | None, typer.Option("--recording", metavar="FILE", help="Look there instead of in a running cell.")
    ] = None,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Tell why a request was placed, moved or delayed: each decision, what it weighed, and what led to it.

    Example: longshore why 3f2a
    """
    from actors.why import story
    from bus.log_reading import read_to_end
    from bus.recording import Recording
    from bus.subjects import Subjects

    asked = request.rstrip("…")  # as sentences show it
    if recording is not None:
        opened = Recording.open(recording)
        told = story(Subjects(opened.header.cell), list(opened.ledger()), asked)
    else:
        async with connected(nats, cell) as bus:
            first = (await bus.ledger.usage()).first_sequence
            told = story(Subjects(cell), await read_to_end(bus.ledger, max(1, first)), asked)
    if json:
        print(json_module.dumps([one.as_json() for one in told]))
        return
    for one in told:
        _show(one)


def _show(told: Told) -> None:
    event = told.event
    clock = time.strftime("%H:%M:%S", time.localtime(event.timestamp / 1e9)) + f".{event.timestamp // 10**6 % 1000:03d}"
    print(f"{event.sequence:>8}  {clock}  {event.text}")
    for line in told.weighed:
        print(f"{'':24}{line}")
    if told.because is not None:
        print(f"{'':24}after {told.because.sequence}: {told.because.text}")
