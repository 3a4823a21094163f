"""A control starts from the newest snapshot that belongs to its ledger, and knows what one from the beginning knows."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import msgspec
import pytest
from bus_worlds import until
from cell_bench import CELL
from world import World

from actors import cell_snapshots
from actors.bench_replay import CELL as BENCH_CELL
from actors.bench_replay import make_ledger
from actors.cell import Cell, UnknownRules
from actors.cell_snapshots import Beside, NoBeginning, Start, decode_stored, find_start, stored_parts
from actors.control import Control
from bus.contract import Log, Record
from bus.memory import MemoryBus, MemoryServer
from bus.messages import DriverLost, FactEnvelope, RequestEnded, SaidEnvelope, decode_said, encode, kind_of
from bus.messages.requests import ReplyTo
from bus.replies import Chunk, decode_reply
from bus.snapshots import Manifest, SnapshotStore, anchor_of
from bus.subjects import Subjects

SUBJECTS = Subjects(BENCH_CELL)
LEDGER = make_ledger(3000)


def test_the_stored_form_and_the_tail_equal_the_whole_at_every_cut() -> None:
    world = World(random.Random(11).randbytes(3000))
    world.chaos()
    assert len(world.ledger) > 80
    first = Cell(CELL)
    for at, record in enumerate(world.ledger):
        stored = b"".join(stored_parts(Beside([(3, 1)], [(5, b"x")], [b"seal"]), first.capture()))
        start = decode_stored(CELL, stored, None)
        assert (start.accepted, start.lately, start.seals) == ({(3, 1)}, [(5, b"x")], [b"seal"])
        for later in world.ledger[at:]:
            start.cell.take(later)
        assert start.cell.digest() == world.cell.digest(), f"cut before {record.sequence}"
        first.take(record)


def state_at(position: int) -> Cell:
    cell = Cell(BENCH_CELL)
    for record in LEDGER[:position]:
        cell.take(record)
    return cell


FACTS = [record for record in LEDGER if ".fact." in record.subject]


async def store(
    bus: MemoryBus, record: Record, *, rules: int = 1, cell: Cell | None = None, **beside: list[bytes]
) -> Manifest:
    """A snapshot behind a fact, as a control stores it; `cell`: of another state than it should be."""
    cell = cell or state_at(record.sequence)
    parts = stored_parts(Beside(**beside), cell.capture())  # type: ignore[arg-type]
    return await SnapshotStore(bus.snapshots, SUBJECTS).write(
        parts, position=record.sequence, anchor=anchor_of(record), rules=rules, facts=cell.facts, writer="w", at=1
    )


def a_server() -> tuple[MemoryServer, MemoryBus]:
    server = MemoryServer(BENCH_CELL)
    server.ledger.load(LEDGER)
    return server, server.bus("test")


def a_control(server: MemoryServer, me: str) -> Control:
    return Control(server.bus(me), BENCH_CELL, me, silence=3600.0, snapshot_facts=100)


@contextlib.asynccontextmanager
async def running(control: Control) -> AsyncIterator[Control]:
    task = asyncio.ensure_future(control.run())
    try:
        ready = asyncio.ensure_future(control.started.wait())
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        yield control
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_control_takes_one_and_the_next_starts_from_it() -> None:
    server, _ = a_server()
    async with running(a_control(server, "a")) as control:
        whole = control.replica
        assert whole is not None
        await until(lambda: control.snapshots.newest is not None)
        manifest = control.snapshots.newest
        assert manifest.position == FACTS[-1].sequence
        digest = whole.cell.digest()
    async with running(a_control(server, "b")) as control:
        assert control.replica is not None and control.replica.cell.digest() == digest
        assert control.replica.readback.verified < 20, "the tail alone was read"
        assert not control.replica.readback.expected


async def found(bus: MemoryBus) -> Start:
    return await find_start(bus, SUBJECTS)


async def test_it_starts_from_the_newest_that_belongs_to_this_ledger() -> None:
    server, bus = a_server()
    early, middle, late = [await store(bus, FACTS[at]) for at in (100, 200, 300)]
    assert (await found(bus)).snapshot == late
    server.ledger.truncate(late.position - 1)
    assert (await found(bus)).snapshot == middle
    changed = [r._replace(timestamp=r.timestamp + 1) if r.sequence > early.position else r for r in LEDGER]
    server.ledger.load(changed)
    start = await found(bus)
    assert start.snapshot == early and start.cell.digest() == state_at(early.position).digest()
    server.snapshots.alter(early.first, b"nothing")
    start = await found(bus)
    assert start.snapshot is None and start.cell.position == 0
    server.ledger.recreate()
    assert (await found(bus)).snapshot is None


async def test_rules_that_are_not_known_are_not_followed() -> None:
    server, bus = a_server()
    known = await store(bus, FACTS[100])
    await store(bus, FACTS[200], rules=99)
    assert (await found(bus)).snapshot == known
    server.ledger.load([r for r in LEDGER if r.sequence > FACTS[150].sequence])
    with pytest.raises(UnknownRules, match="99"):
        await found(bus)
    server.snapshots.recreate()
    with pytest.raises(NoBeginning, match="no snapshot"):
        await found(bus)


async def test_a_start_that_snapshots_are_dropped_under_finds_those_which_came_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, bus = a_server()
    early = await store(bus, FACTS[100])
    server.ledger.load([r for r in LEDGER if r.sequence >= early.position])
    later: list[Manifest] = []
    agree = cell_snapshots.agrees

    async def slowly(ledger: Log, manifest: Manifest) -> bool:
        if not later:
            later.extend([await store(bus, FACTS[at]) for at in (200, 210, 220)])
            assert (await bus.snapshots.usage()).first_sequence > early.last
        return await agree(ledger, manifest)

    monkeypatch.setattr(cell_snapshots, "agrees", slowly)
    assert (await found(bus)).snapshot == later[-1]


async def test_what_was_told_and_may_be_unshown_is_shown_after_a_start_from_a_snapshot() -> None:
    server, bus = a_server()
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox)
    ended = RequestEnded("a" * 32, "m", "failed", 0, code="x", reason="because", replies=(ReplyTo(inbox),))
    payload = encode(SaidEnvelope(FACTS[-1].sequence, 0, 1, msgspec.Raw(encode(ended))))
    await store(bus, FACTS[-1], lately=[(LEDGER[-1].timestamp, payload)])  # type: ignore[list-item]
    async with running(a_control(server, "a")):
        reply = decode_reply((await subscription.next()).payload)
    assert isinstance(reply, Chunk) and reply.end == "failed"


async def test_a_seal_that_was_ordered_is_done_after_a_start_from_a_snapshot() -> None:
    server, bus = a_server()
    before = state_at(len(LEDGER))
    worker, epoch = next((n, e.epoch) for n, e in before.order.state.drivers.items() if n.startswith("gpu/"))
    # A request that is under way when its worker is lost.
    at = max(r.sequence for r in LEDGER if r.subject.endswith(f"driver/{worker}.sequence.start"))
    ledger = LEDGER[:at]
    cell = state_at(at)
    lost = encode(FactEnvelope("watch", msgspec.Raw(encode(DriverLost(worker, epoch, "test")))))
    fact = Record(at + 1, ledger[-1].timestamp + 1, SUBJECTS.fact(worker, kind_of(DriverLost)), lost)
    (step,) = cell.take(fact)
    outputs = [Record(at + 2 + said.place, fact.timestamp, said.subject, said.payload) for said in step.said]
    server.ledger.load([*ledger, fact, *outputs])
    server.tokens.load([Record(100, server.wall(), SUBJECTS.tokens("gpu/other", 1), b"")])  # behind what facts cite
    seal = next(said.payload for said in step.said if said.receiver == "sealer")
    assert decode_said(seal).fact == fact.sequence
    parts = stored_parts(Beside(seals=[seal]), cell.capture())
    await SnapshotStore(bus.snapshots, SUBJECTS).write(
        parts, position=fact.sequence, anchor=anchor_of(fact), rules=1, facts=cell.facts, writer="w", at=1
    )
    sealed = SUBJECTS.fact(worker, "sequences.sealed")
    async with running(a_control(server, "a")) as control:
        reader = await bus.ledger.read([sealed])
        (record,) = await reader.batch()
        assert record.subject == sealed and control.replica is not None
