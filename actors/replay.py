"""Replay: the cell over recorded facts, every recorded message held against what this code computes.

The same step, order and comparison as in a replica (actors.readback), with a recording as the source and nothing to
publish. Needs neither NATS nor torch nor models.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import msgspec

from actors.cell import Cell
from actors.readback import Difference, Readback, accepted_differences, kind_in
from bus.contract import Record

GRACE_SECONDS = 1.0
"""How late an output may stand in the ledger, by its own timestamps, before it counts as missing."""


class Verdict(msgspec.Struct):
    """What a replay found. `pending`: outputs of the last facts that the recording ends before.

    `snapshot`: the ledger position of the state that it began with, 0 for the ledger's beginning. `facts` counts from
    the ledger's beginning in any case.
    """

    cell: str
    facts: int
    verified: int
    pending: int
    last_sequence: int
    digest: str
    difference: dict[str, Any] | None = None
    sentence: str = ""
    snapshot: int = 0


def verify(
    cell_name: str,
    records: Iterable[Record],
    *,
    accepted: frozenset[tuple[int, int]] = frozenset(),
    start: Cell | None = None,
) -> Verdict:
    """Run all records and compare every derived message; the first difference ends it.

    `start` is the state to go on from (it is changed); what stands up to its position is passed over.

    An output that stays missing is a difference; one that was computed within the last `GRACE_SECONDS` of the
    recording is `pending`: the recording ended before it was written.
    """
    readback = Readback(start if start is not None else Cell(cell_name), accepted)
    began = readback.position
    newest = 0.0
    # Nothing below makes cycles, and the collector would walk a state that only grows, again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for record in records:
            if record.sequence <= began:
                continue
            newest = record.timestamp / 1e9
            readback.take(record, newest)
        for expected in readback.expected.values():
            if newest - expected.since > GRACE_SECONDS:
                fact, place, kind = expected.fact, expected.said.place, kind_in(expected.said.subject)
                raise Difference(fact, fact, place, kind, "index", "no such message", "one was computed")
    except Difference as found:
        return _verdict(cell_name, readback, found, began)
    finally:
        if collecting:
            gc.enable()
    return _verdict(cell_name, readback, None, began)


def collect_accepted(records: Iterable[Record]) -> frozenset[tuple[int, int]]:
    """Every difference that an operator has accepted anywhere in these records."""
    found = (accepted_differences(record) for record in records)
    return frozenset(key for key in found if key is not None)


def state_at(cell_name: str, records: Iterable[Record], sequence: int, *, start: Cell | None = None) -> Cell:
    """The cell after everything up to and including this ledger sequence. `start` as in `verify`."""
    cell = start if start is not None else Cell(cell_name)
    began = cell.position
    for record in records:
        if record.sequence <= began:
            continue
        if record.sequence > sequence:
            break
        cell.take(record)
    return cell


def _verdict(cell_name: str, readback: Readback, found: Difference | None, began: int) -> Verdict:
    cell = readback.cell
    return Verdict(
        cell=cell_name,
        facts=cell.facts,
        verified=readback.verified,
        pending=len(readback.expected),
        last_sequence=readback.position,
        digest=cell.digest(),
        difference=found.as_dict() if found is not None else None,
        sentence=str(found) if found is not None else "",
        snapshot=began,
    )
