"""Where replays get their records from: a recording, or the ledger of a running cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from actors.cell import Cell
from actors.replay import Verdict, collect_accepted, state_at, verify
from bus.contract import Bus, Record
from bus.errors import UserError
from bus.recording import Recording

Answer = tuple[Verdict | None, Cell | None]


def replay_recording(path: Path, *, verify: bool, at: int) -> Answer:
    """Replay a file; needs neither NATS nor torch nor models."""
    recording = Recording.open(path)
    bounds = recording.header.ledger
    if bounds.records and bounds.first > 1:
        raise UserError(f"{path} begins at ledger sequence {bounds.first}: a replay needs the ledger from 1 on")
    return _replay(recording.header.cell, recording.ledger, bounds.last, verify_all=verify, at=at)


async def replay_live(bus: Bus, cell: str, *, verify: bool, at: int) -> Answer:
    """Replay what the ledger of a running cell holds now."""
    usage = await bus.ledger.usage()
    if usage.messages and usage.first_sequence > 1:
        raise UserError(
            f"the ledger begins at sequence {usage.first_sequence}: replay a recording of the part before it"
        )
    records: list[Record] = []
    reader = await bus.ledger.read(start=1)
    try:
        while not records or records[-1].sequence < usage.last_sequence:
            if usage.last_sequence == 0:
                break
            records += await reader.batch()
    finally:
        await reader.close()
    return _replay(cell, lambda: records, usage.last_sequence, verify_all=verify, at=at)


def _replay(cell: str, records: Callable[[], Iterable[Record]], last: int, *, verify_all: bool, at: int) -> Answer:
    if at > last:
        raise UserError(f"--at {at} lies behind the last ledger sequence, {last}")
    verdict = verify(cell, records(), accepted=collect_accepted(records())) if verify_all else None
    found = state_at(cell, records(), at) if at else None
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
