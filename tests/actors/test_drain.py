"""Servers are drained under running answers: nothing fails, and nothing new gets there."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

from cell_bench import card
from live_cell import CELL, live_cell
from test_migration_live import ask, ledger, server_of

from actors.children import Child
from actors.placement import Placement
from actors.replay import verify
from bus.messages import (
    ContextsTold,
    ContextsWanted,
    DrainRequested,
    DriverLost,
    HeldModel,
    InstanceReady,
    MoveWanted,
    PlaceRequest,
    RequestPlaced,
    SequenceContext,
    ServerDrained,
    ServerReady,
    SetTimer,
    SlotDenied,
    SlotKept,
    SlotReleased,
    StartInstance,
    TimerFired,
    To,
    WantSlot,
    WorkerReady,
    decode_fact,
    decode_fact_body,
)

SECOND = 1_000_000_000
GIB = 1 << 30


def running() -> Placement:
    """Two servers, of which s0 runs m0 for request r1."""
    placement = Placement("placement")
    for server in ("s0", "s1"):
        placement.handle(ServerReady(server, GIB, (HeldModel(card("m0")),)), 0)
        placement.handle(WorkerReady(f"gpu/{server}/0", server, GIB, 4), 0)
    said = placement.handle(PlaceRequest("r1", 1, "m0", 1), 1)
    assert [to.receiver for to in said if isinstance(to.message, StartInstance)] == ["gpu/s0/0"]
    placement.handle(InstanceReady("gpu/s0/0", "m0", 4, "ssd"), 2)
    return placement


def drained(said: list[To]) -> list[ServerDrained]:
    return [to.message for to in said if isinstance(to.message, ServerDrained)]


def test_a_drained_server_takes_nothing_new_and_gives_away_what_runs() -> None:
    placement = running()
    said = placement.handle(DrainRequested("s0", 30_000, leave=True), 3)
    assert [to.message.request for to in said if isinstance(to.message, MoveWanted)] == ["r1"]
    assert not drained(said)
    said = placement.handle(PlaceRequest("r2", 1, "m0", 2), 4)
    assert [to.receiver for to in said if isinstance(to.message, StartInstance)] == ["gpu/s1/0"]
    placement.handle(InstanceReady("gpu/s1/0", "m0", 4, "ssd"), 5)
    assert drained(placement.handle(SlotReleased("r1", 1, "m0"), 6)) == [ServerDrained("s0", 0, True)]
    # Its process starts anew: it is in service again.
    placement.handle(ServerReady("s0", GIB, (HeldModel(card("m0")),)), 7)
    assert not placement.state.draining


def test_what_is_left_at_the_deadline_is_left_to_recovery() -> None:
    placement = running()
    placement.handle(DrainRequested("s0", 1000), 3)
    said = placement.handle(TimerFired(1, 0, SECOND, "drain/s0"), 4)
    assert any(isinstance(to.message, MoveWanted) for to in said) and not drained(said)
    assert drained(placement.handle(TimerFired(1, 0, SECOND, "drain/s0"), 2 * SECOND)) == [ServerDrained("s0", 1)]
    assert not placement.handle(TimerFired(1, 0, SECOND, "drain/s0"), 3 * SECOND)


def test_without_another_place_requests_wait_until_it_is_taken_back() -> None:
    placement = running()
    placement.handle(DrainRequested("s0"), 3)
    placement.handle(DrainRequested("s1"), 3)
    assert placement.handle(PlaceRequest("r2", 1, "m0", 2), 4) == []
    said = placement.handle(DrainRequested("s0", undo=True), 5)
    assert [to.message.worker for to in said if isinstance(to.message, RequestPlaced)] == ["gpu/s0/0"]
    assert drained(placement.handle(DrainRequested("s9"), 6))[0].reason == "no server s9 is known here"


def two_running(slots: int) -> Placement:
    """Rules 3: s0 runs three requests, s1 the same model with so many slots."""
    placement = Placement("placement")
    placement.rules = 3
    for server, held in (("s0", 4), ("s1", slots)):
        placement.handle(ServerReady(server, GIB, (HeldModel(card("m0")),)), 0)
        placement.handle(WorkerReady(f"gpu/{server}/0", server, GIB, held), 0)
    placement.handle(PlaceRequest("long", 1, "m0", 1), 1)
    placement.handle(InstanceReady("gpu/s0/0", "m0", 4, "ssd"), 2)
    placement.handle(PlaceRequest("short", 1, "m0", 2), 3)
    placement.handle(PlaceRequest("due", 1, "m0", 3, deadline=9 * SECOND), 4)
    placement.handle(PlaceRequest("first", 1, "m0", 4, priority=1), 5)
    return placement


CONTEXTS = ContextsTold(
    "gpu/s0/0",
    (
        SequenceContext("short", 1, 20),
        SequenceContext("first", 1, 5),
        SequenceContext("long", 1, 2000),
        SequenceContext("due", 1, 7),
    ),
)


def test_what_is_urgent_and_then_what_saves_most_moves_first() -> None:
    placement = two_running(slots=4)
    said = placement.handle(DrainRequested("s0", 30_000), 6)
    assert [to.receiver for to in said if isinstance(to.message, ContextsWanted)] == ["gpu/s0/0"]
    wanted = [to.message for to in placement.handle(CONTEXTS, SECOND) if isinstance(to.message, MoveWanted)]
    assert [one.request for one in wanted] == ["first", "due", "long", "short"]
    assert wanted[1].why == "its server is being drained; a move saves 7 tokens of context, due in 8 s"
    assert not placement.handle(CONTEXTS, SECOND), "asked once, told once"


def test_who_finds_no_slot_waits_for_one_and_is_not_asked_again() -> None:
    placement = two_running(slots=1)
    placement.handle(DrainRequested("s0", 30_000), 7)
    placement.handle(CONTEXTS, 8)
    said = placement.handle(WantSlot("long", 2, "m0", "gpu/s0/0"), 9)
    (start,) = [to for to in said if isinstance(to.message, StartInstance)]
    assert start.receiver == "gpu/s1/0"
    said = placement.handle(InstanceReady("gpu/s1/0", "m0", 1, "ssd"), 10)
    assert [to.message.request for to in said if isinstance(to.message, SlotKept)] == ["long"]
    for request in ("short", "due", "first"):
        assert placement.handle(WantSlot(request, 2, "m0", "gpu/s0/0"), 11) == []
    said = placement.handle(TimerFired(1, 0, SECOND, "drain/s0"), SECOND)
    assert [type(to.message) for to in said] == [SetTimer], "nothing is asked again while all wait"
    said = placement.handle(SlotReleased("long", 2, "m0"), 2 * SECOND)
    assert [to.message.request for to in said if isinstance(to.message, SlotKept)] == ["short"]
    said = placement.handle(DrainRequested("s0", undo=True), 3 * SECOND)
    assert sorted(to.message.request for to in said if isinstance(to.message, SlotDenied)) == ["due", "first"]


async def test_a_server_leaves_while_answers_are_written(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=2, step_seconds=0.02) as cell:
        events = [asyncio.Event() for _ in range(4)]
        answers = [asyncio.ensure_future(ask(cell, f"key-{n}", 250, event)) for n, event in enumerate(events)]
        for event in events:
            await event.wait()
        source = server_of(await cell.status())
        told = await cell.told("drain", source)
        assert told["leave"] and not told.get("left") and not told.get("reason")
        await cell.until(lambda found: not found["servers"][source]["up"])
        found = [await answer for answer in answers]
        assert all(end == "length" and len(tokens) == 250 for tokens, end in found)
        assert all(tokens == found[0][0] for tokens, _ in found)
        await cell.add_node(source)
        await cell.until(lambda found: found["servers"][source]["up"])
        replayed = verify(CELL, [record for record, _ in await ledger(cell)])
        assert replayed.difference is None


async def keep(child: Child) -> None:
    """As a supervisor does."""
    while True:
        await child.wait()
        await child.start()


async def test_every_server_of_a_busy_cell_is_restarted_and_no_request_fails(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=2, workers=2, step_seconds=0.01) as cell:
        keepers = [asyncio.ensure_future(keep(node)) for node in cell.nodes]
        before = await cell.status()
        found: list[tuple[list[int], str]] = []
        over = asyncio.Event()

        async def reader(number: int) -> None:
            rounds = 0
            while not over.is_set():
                rounds += 1
                found.append(await ask(cell, f"key-{number}-{rounds}", 100, asyncio.Event()))

        readers = [asyncio.ensure_future(reader(number)) for number in range(6)]
        await cell.until(lambda status: status["requests"].get("running", 0) == 6)
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "bus.main", "rolling-restart", "--nats", cell.server.url, "--cell", CELL, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, error = await process.communicate()
        assert process.returncode == 0, error
        over.set()
        await asyncio.gather(*readers)
        for keeper in keepers:
            keeper.cancel()
        told = json.loads(out)["servers"]
        assert [one["server"] for one in told] == ["n0", "n1"]
        assert sum(one["moved"] for one in told) >= 6 and not any(one["left"] for one in told)
        now = await cell.status()
        assert all(now["servers"][name]["epoch"] > before["servers"][name]["epoch"] for name in ("n0", "n1"))
        assert all(now["workers"][name]["epoch"] > one["epoch"] for name, one in before["workers"].items())
        assert len(found) >= 12 and all(end == "length" and tokens == found[0][0] for tokens, end in found)
        assert len(found[0][0]) == 100
        assert set(now["requests"]) == {"finished"}
        records = [record for record, _ in await ledger(cell)]
        lost = [
            decode_fact_body(decode_fact(one.payload).body) for one in records if one.subject.endswith("driver.lost")
        ]
        assert len(lost) == 6 and all(isinstance(one, DriverLost) and one.leaving for one in lost)
        assert verify(CELL, records).difference is None


async def test_an_interrupted_rolling_restart_leaves_the_cell_whole(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=1, step_seconds=0.02) as cell:
        started = asyncio.Event()
        running = asyncio.ensure_future(ask(cell, "long", 150, started))
        await started.wait()
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "bus.main", "rolling-restart", "--nats", cell.server.url, "--cell", CELL],
            stderr=subprocess.PIPE,
        )
        ordered = cell.bus.subjects.fact("placement", "drain.requested")
        reader = await cell.bus.ledger.read([ordered], start=1)
        async with asyncio.timeout(20):
            await reader.batch()
        await reader.close()
        process.send_signal(signal.SIGINT)
        _, error = await process.communicate()
        assert process.returncode == 130 and b"Traceback" not in error
        last = await cell.bus.ledger.last(ordered)
        assert last is not None and b'"undo":true' in last.payload
        # The server takes requests again, and what ran there never stopped.
        assert (await ask(cell, "next", 5, asyncio.Event()))[1] == "length"
        assert (await running)[1] == "length"
