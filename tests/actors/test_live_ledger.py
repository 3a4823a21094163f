"""The life of the ledger with real processes: a start from a snapshot, kept through kills and outages."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from test_live_failures import Reading, undisturbed

from bus.snapshots import SnapshotStore
from bus.subjects import Subjects
from tests.support.live_cell import CELL, LiveCell, live_cell

pytestmark = pytest.mark.slow
SUBJECTS = Subjects(CELL)


async def snapshot_behind(cell: LiveCell, position: int) -> int:
    """Wait until a snapshot at or behind a ledger position is whole; its position."""
    store = SnapshotStore(cell.bus.snapshots, SUBJECTS)
    async with asyncio.timeout(20):
        while True:
            newest = next(iter(await store.manifests()), None)
            if newest is not None and newest.position >= position:
                return newest.position
            await asyncio.sleep(0.05)


async def test_a_killed_control_starts_from_its_snapshot_and_the_answer_goes_on(tmp_path: Path) -> None:
    often = ("--snapshot-facts", "10")
    async with live_cell(tmp_path, step_seconds=0.02, control=often) as cell:
        expected = await undisturbed(cell.client, ["same"], 8)
        running = Reading(cell.client, "long", 150)
        await running.reach(5)
        await undisturbed(cell.client, [f"fill {i}" for i in range(12)], 4)
        await snapshot_behind(cell, 20)
        cell.controls[0].signal(signal.SIGKILL)
        await cell.controls[0].wait()
        await cell.add_control(*often)
        await running.task
        assert running.end == "length" and len(running.tokens) == 150
        assert await undisturbed(cell.client, ["same"], 8) == expected
        assert "starting from a snapshot" in cell.controls[1].last_words(40)
        again = await cell.client.result(running.answer.request_id)
        assert list(again.tokens) == running.tokens
