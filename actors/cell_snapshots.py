"""Snapshots of a control: the cell, and what belongs to the shell around it; taken while it runs, found at its start.

    due ─▶ capture at the last fact read (one encoding of the state) ─▶ wait until all that was said up to there has
    come back ─▶ store in pieces (bus.snapshots), beside everything else

A start looks through the stored ones, the newest first, and takes the first that belongs to this ledger (the record at
its position is the one that stood there), is whole, and follows rules that this code knows. What it does not find it
reads from the ledger's beginning.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec
import structlog

from actors.cell import Cell
from actors.replica import Replica
from actors.rules import KNOWN_RULES, UnknownRules
from bus.contract import Bus, BusError, NoAnswer, Record, Usage
from bus.errors import UserError
from bus.snapshots import Manifest, SnapshotStore, Torn, agrees, anchor_of
from bus.subjects import Subjects

SNAPSHOT_FACTS = 5000
"""Facts between two snapshots, at the least; more as the state grows, so that the bytes per fact stay the same."""
BYTES_PER_FACT = 4000
SNAPSHOT_BYTES = 64 * 1024 * 1024
"""Bytes of the ledger between two snapshots, at the most where the state is small: prompts may be large."""
STANDBY_FACTOR = 2
"""A replica that does not lead takes one when so many times as much has come since the last one that it knows of."""
READ_BACK_SECONDS = 30.0
"""How long the outputs before a snapshot may take to come back; with more it is given up, and tried again later."""
LOOK_SECONDS = 0.05
RETRY_SECONDS = 0.5
ATTEMPTS = 20
ACCEPTED_LIMIT = 10_000

log = structlog.get_logger("longshore.snapshots")


class NoBeginning(UserError):
    """The ledger does not begin at 1 and no snapshot leads up to where it begins: there is nothing to start from."""

    exit_code = 3


class Beside(msgspec.Struct, omit_defaults=True):
    """What a stored snapshot holds beside the cell, and before it, with its length (4 bytes, little endian).

    `lately` is what `Unshown` has noted, `seals` the orders that are open.
    """

    accepted: list[tuple[int, int]] = []
    lately: list[tuple[int, bytes]] = []
    seals: list[bytes] = []


_beside = msgspec.msgpack.Decoder(Beside)
_LENGTH_BYTES = 4
_encode = msgspec.msgpack.Encoder().encode


class Start(NamedTuple):
    """What a control goes on from. `snapshot` None: from the ledger's beginning."""

    cell: Cell
    accepted: frozenset[tuple[int, int]]
    lately: list[tuple[int, bytes]]
    seals: list[bytes]
    snapshot: Manifest | None


def stored_parts(beside: Beside, cell: list[bytes]) -> list[bytes]:
    """The bytes of a stored snapshot, in parts."""
    head = _encode(beside)
    return [len(head).to_bytes(_LENGTH_BYTES, "little"), head, *cell]


def decode_stored(
    cell: str, body: bytes, manifest: Manifest | None, known_rules: tuple[int, ...] = KNOWN_RULES
) -> Start:
    """Raises ValueError where the bytes are no stored cell, and `UnknownRules`."""
    try:
        at = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
        beside = _beside.decode(body[_LENGTH_BYTES:at])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a stored cell: {error}") from None
    # What is made here stays; the collector would walk it again and again while it is made.
    collecting = gc.isenabled()
    gc.disable()
    try:
        restored = Cell.restored(cell, body[at:], known_rules)
    finally:
        if collecting:
            gc.enable()
    if manifest is not None and restored.position != manifest.position:
        raise ValueError(f"its state is that of {restored.position}, its manifest says {manifest.position}")
    return Start(restored, frozenset(beside.accepted), beside.lately, beside.seals, manifest)


async def find_start(bus: Bus, subjects: Subjects, known_rules: tuple[int, ...] = KNOWN_RULES) -> Start:
    """The newest state that this ledger can be gone on from.

    Raises `NoBeginning`, `UnknownRules` where only a snapshot of unknown rules leads up to the ledger, and `BusError`.
    """
    looked_at: list[str] | None = None
    while True:
        usage = await bus.ledger.usage()
        manifests = await SnapshotStore(bus.snapshots, subjects).manifests()
        found = await _newest_usable(bus, subjects, manifests, usage, known_rules)
        if isinstance(found, Start):
            return found
        if usage.first_sequence <= 1:  # 0: a stream that never held anything
            return Start(Cell(subjects.cell, known_rules), frozenset(), [], [], None)
        names = [manifest.name for manifest in manifests]
        if names == looked_at:
            break
        looked_at = names  # while they were read, others may have come and these been dropped for them
    if found is not None:
        raise found
    raise NoBeginning(
        f"the ledger of cell {subjects.cell!r} begins at sequence {usage.first_sequence}, and no snapshot in "
        f"{subjects.snapshots_stream} leads up to it: restore that stream from a backup with `longshore restore`"
    )


async def _newest_usable(
    bus: Bus, subjects: Subjects, manifests: list[Manifest], usage: Usage, known_rules: tuple[int, ...]
) -> Start | UnknownRules | None:
    """The state of the first that can be gone on from, or why the newest that would lead up to the ledger cannot."""
    unknown: UnknownRules | None = None
    for manifest in manifests:
        if manifest.position + 1 < usage.first_sequence or manifest.position > usage.last_sequence:
            continue
        if manifest.rules not in known_rules:
            unknown = unknown or UnknownRules(manifest.rules, manifest.position, known_rules)
            log.warning("snapshot not used", snapshot=manifest.name, reason=str(unknown))
            continue
        try:
            if not await agrees(bus.ledger, manifest):
                log.warning("snapshot not used", snapshot=manifest.name, reason="it belongs to another ledger")
                continue
            return decode_stored(subjects.cell, await _read(bus, subjects, manifest), manifest, known_rules)
        except UnknownRules as error:
            unknown = unknown or error
            log.warning("snapshot not used", snapshot=manifest.name, reason=str(error))
        except (Torn, ValueError) as error:
            log.warning("snapshot not used", snapshot=manifest.name, reason=str(error))
    return unknown


async def _read(bus: Bus, subjects: Subjects, manifest: Manifest) -> bytes:
    """No answer proves nothing: a snapshot that is there must not be passed over for an outage."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await SnapshotStore(bus.snapshots, subjects).read(manifest)
        except NoAnswer:
            await asyncio.sleep(RETRY_SECONDS)
    return await SnapshotStore(bus.snapshots, subjects).read(manifest)


Capture = Callable[[Cell], Awaitable[list[bytes]]]
"""The parts of a snapshot of the cell as it is at the call, whatever happens to it until they are there."""


async def capture_here(cell: Cell) -> list[bytes]:
    return cell.capture()


class SnapshotTaker:
    """Knows when a snapshot is due, takes it, stores it. One at a time per control.

    `newest`: the manifest of the last one that this control stored or started from.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        me: str,
        *,
        facts: int = SNAPSHOT_FACTS,
        limit_bytes: int = SNAPSHOT_BYTES,
        capture: Capture | None = None,
    ) -> None:
        self._capture = capture or capture_here
        self._bus = bus
        self._store = SnapshotStore(bus.snapshots, subjects)
        self._me = me
        self._least_facts = facts
        self._facts_limit = facts
        self._bytes_limit = limit_bytes
        self._facts = 0
        self._read_bytes = 0
        self._last_fact: Record | None = None
        self.newest: Manifest | None = None
        self.busy = False
        self._wanted = False

    def started_from(self, start: Start) -> None:
        self.newest = start.snapshot
        if start.snapshot is not None:
            self._since(start.snapshot)

    def want(self) -> None:
        """Take one as soon as there is anything new, however little."""
        self._wanted = True

    def read(self, records: Iterable[Record], position: int) -> None:
        """Records as they were read; `position` is that of the cell, the last fact's."""
        for record in records:
            self._read_bytes += len(record.payload)
            if record.sequence == position:
                self._last_fact = record

    def due(self, replica: Replica) -> bool:
        """Whether it is this replica's turn. Where it is, `take` must be called: until that is over nothing is due."""
        if self.busy or not replica.live or self._last_fact is None or not self._is_due(replica):
            return False
        self.busy = True
        return True

    def _is_due(self, replica: Replica) -> bool:
        if self._wanted:
            return replica.cell.facts > self._facts
        patience = 1 if replica.leading else STANDBY_FACTOR
        facts = replica.cell.facts - self._facts
        return facts > 0 and (
            facts >= patience * self._facts_limit or self._read_bytes >= patience * max(self._bytes_limit, self._size)
        )

    async def take(self, replica: Replica, beside: Callable[[], tuple[list[tuple[int, bytes]], list[bytes]]]) -> None:
        """Capture now, store once everything said up to here has come back. `beside`: what is unshown, open seals.

        A replica that does not lead looks first whether another one has done it. Whatever fails is tried again later.
        """
        try:
            if not replica.leading and not await self._still_due(replica):
                return
            await self._take(replica, *beside())
        except BusError as error:
            log.warning("snapshot not stored", position=replica.cell.position, reason=str(error))
        finally:
            self.busy = False

    async def _take(self, replica: Replica, lately: list[tuple[int, bytes]], seals: list[bytes]) -> None:
        record = self._last_fact
        assert record is not None and record.sequence == replica.cell.position
        facts, rules = replica.cell.facts, replica.cell.rules
        accepted = list(replica.readback.accepted)[-ACCEPTED_LIMIT:]
        waiting = list(replica.readback.expected)
        self._facts, self._read_bytes = facts, 0
        parts = stored_parts(Beside(accepted, lately, seals), await self._capture(replica.cell))
        if not await self._all_read_back(replica, waiting):
            log.warning("snapshot given up", position=record.sequence, reason="what was said does not come back")
            return
        self.newest = await self._store.write(
            parts,
            position=record.sequence,
            anchor=anchor_of(record),
            rules=rules,
            facts=facts,
            writer=self._me,
            at=self._bus.wall(),
        )
        self._since(self.newest)
        self._wanted = False
        log.info("snapshot", position=record.sequence, bytes=self.newest.bytes, me=self._me)

    async def _still_due(self, replica: Replica) -> bool:
        newest = next(iter(await self._store.manifests()), None)
        if newest is not None and newest.facts > self._facts:
            self.newest = newest
            self._since(newest)
        return self._is_due(replica)

    @property
    def _size(self) -> int:
        return self.newest.bytes if self.newest is not None else 0

    def _since(self, manifest: Manifest) -> None:
        self._facts, self._read_bytes = max(self._facts, manifest.facts), 0
        self._facts_limit = max(self._least_facts, manifest.bytes // BYTES_PER_FACT)

    @staticmethod
    async def _all_read_back(replica: Replica, waiting: list[bytes]) -> bool:
        loop = asyncio.get_running_loop()
        until = loop.time() + READ_BACK_SECONDS
        while any(_still(waiting, replica)):
            if loop.time() > until:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True


def _still(waiting: list[bytes], replica: Replica) -> Iterator[bool]:
    return (payload in replica.readback.expected for payload in waiting)
