"""Servers are drained under running answers: nothing fails, and nothing new gets there."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from live_cell import CELL, LiveCell, live_cell
from test_migration_live import ask, ledger, server_of
from world import card

from actors.placement import Placement
from actors.replay import verify
from bus.messages import (
    DrainRequested,
    HeldModel,
    InstanceReady,
    MoveWanted,
    PlaceRequest,
    RequestPlaced,
    ServerDrained,
    ServerReady,
    SlotReleased,
    StartInstance,
    TimerFired,
    To,
    WorkerReady,
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


async def drain(cell: LiveCell, *arguments: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "bus.main", "drain", *arguments, "--nats", cell.server.url, "--cell", CELL, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, error = await process.communicate()
    assert process.returncode == 0, error
    return json.loads(out)


async def test_a_server_leaves_while_answers_are_written(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=2, step_seconds=0.02) as cell:
        events = [asyncio.Event() for _ in range(4)]
        answers = [asyncio.ensure_future(ask(cell, f"key-{n}", 250, event)) for n, event in enumerate(events)]
        for event in events:
            await event.wait()
        source = server_of(await cell.status())
        told = await drain(cell, source)
        assert told["leave"] and not told.get("left") and not told.get("reason")
        await cell.until(lambda found: not found["servers"][source]["up"])
        found = [await answer for answer in answers]
        assert all(end == "length" and len(tokens) == 250 for tokens, end in found)
        assert all(tokens == found[0][0] for tokens, _ in found)
        await cell.add_node(source)
        await cell.until(lambda found: found["servers"][source]["up"])
        replayed = verify(CELL, [record for record, _ in await ledger(cell)])
        assert replayed.difference is None
