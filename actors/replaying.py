"""Where replays get their records from: a recording, or the ledger of a running cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from actors.cell import Cell
from actors.cell_snapshots import Start, decode_stored
from actors.replay import Verdict, collect_accepted, state_at, verify
from actors.rules import UnknownRules
from bus.contract import Bus, Record
from bus.errors import UserError
from bus.log_reading import read_to_end
from bus.recording import Recording, RecordingError
from bus.snapshots import oldest_start
from bus.subjects import Subjects

Answer = tuple[Verdict | None, Cell | None]


def replay_recording(path: Path, *, verify: bool, at: int) -> Answer:
    """Replay a file; needs neither NATS nor torch nor models."""
    recording = Recording.open(path)
    header = recording.header
    begin = partial(started_from, recording) if header.snapshot else None
    if begin is None and header.ledger.records and header.ledger.first > 1:
        raise UserError(
            f"{path} begins at ledger sequence {header.ledger.first} and holds no snapshot to go on from: "
            "a replay needs one, or the ledger from 1 on"
        )
    return _replay(header.cell, recording.ledger, header.ledger.last, verify_all=verify, at=at, begin=begin)


def started_from(recording: Recording) -> Start:
    """The state that a recording goes on from. Raises `RecordingError` where this code cannot read it."""
    try:
        return decode_stored(recording.header.cell, recording.snapshot(), None)
    except (ValueError, UnknownRules) as error:
        raise RecordingError(f"the snapshot in {recording.path} cannot be gone on from: {error}") from None


async def replay_live(bus: Bus, cell: str, *, verify: bool, at: int) -> Answer:
    """Replay what the ledger of a running cell holds now."""
    usage = await bus.ledger.usage()
    begin: Callable[[], Start] | None = None
    first = 1
    if usage.messages and usage.first_sequence > 1:
        found = await oldest_start(bus, Subjects(cell), usage.first_sequence)
        if found is None:
            raise UserError(
                f"the ledger begins at sequence {usage.first_sequence} and no snapshot leads up to it: "
                "replay a recording of the part before it"
            )
        begin, first = partial(decode_stored, cell, found[1], found[0]), found[0].position + 1
    records = await read_to_end(bus.ledger, first)
    return _replay(cell, lambda: records, usage.last_sequence, verify_all=verify, at=at, begin=begin)


def _replay(
    cell: str,
    records: Callable[[], Iterable[Record]],
    last: int,
    *,
    verify_all: bool,
    at: int,
    begin: Callable[[], Start] | None,
) -> Answer:
    if at > last:
        raise UserError(f"--at {at} lies behind the last ledger sequence, {last}")
    start = begin() if begin is not None else None
    if start is not None and 0 < at < start.cell.position:
        raise UserError(f"--at {at} lies before {start.cell.position}, where the snapshot stands that all begins with")
    verdict = None
    if verify_all:
        accepted = collect_accepted(records()) | (start.accepted if start is not None else frozenset())
        verdict = verify(cell, records(), accepted=accepted, start=start.cell if start is not None else None)
    found = None
    if at:
        found = state_at(cell, records(), at, start=begin().cell if begin is not None else None)
    return verdict, found


def describe_state(cell: Cell) -> dict[str, Any]:
    """The whole state as plain values, for people and programs."""
    return {
        "position": cell.position,
        "now": cell.now,
        "facts": cell.facts,
        "rules": cell.rules,
        "digest": cell.digest(),
        "epochs": {driver: epoch.epoch for driver, epoch in cell.order.state.drivers.items()},
        "timers": msgspec.to_builtins(cell.timers),
        "actors": {name: msgspec.to_builtins(actor.state, str_keys=True) for name, actor in cell.actors.items()},
    }
