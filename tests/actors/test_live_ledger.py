"""The life of the ledger with real processes: a start from a snapshot, kept through kills and outages."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from test_live_failures import Reading, undisturbed

from bus.snapshots import SnapshotStore
from bus.subjects import Subjects
from tests.support.live_cell import CELL, LiveCell, live_cell

pytestmark = pytest.mark.slow
SUBJECTS = Subjects(CELL)
STREAMS = ("INTAKE", "LEDGER", "SNAPSHOTS", "TOKENS")


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
        running = Reading(cell.client, "long", 90)
        await running.reach(5)
        await undisturbed(cell.client, [f"fill {i}" for i in range(12)], 4)
        await snapshot_behind(cell, 20)
        cell.controls[0].signal(signal.SIGKILL)
        await cell.controls[0].wait()
        await cell.add_control(*often)
        await running.task
        assert running.end == "length" and len(running.tokens) == 90
        assert await undisturbed(cell.client, ["same"], 8) == expected
        assert "starting from a snapshot" in cell.controls[1].last_words(40)
        again = await cell.client.result(running.answer.request_id)
        assert list(again.tokens) == running.tokens


async def command(*arguments: str) -> str:
    done = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bus.main", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await done.communicate()
    assert done.returncode == 0, out.decode()
    return out.decode()


async def test_a_cell_comes_back_on_another_server_and_its_answers_go_on(tmp_path: Path) -> None:
    """Backed up while an answer is being written; what was answered is there, what was not is answered."""
    file = str(tmp_path / "cell.lsbak")
    async with live_cell(tmp_path / "old", step_seconds=0.02, control=("--snapshot-facts", "10")) as cell:
        done = Reading(cell.client, "done", 10)
        await done.task
        running = Reading(cell.client, "running", 300)
        await running.reach(10)
        where = ("--nats", cell.server.url, "--cell", CELL)
        taken = json.loads(await command("backup", file, "--json", *where))
        assert {one["stream"] for one in taken["streams"]} == {f"{s}_{CELL}" for s in STREAMS}
        running.task.cancel()
    async with live_cell(tmp_path / "new", nodes=0, create=False, controls=0) as cell:
        where = ("--nats", cell.server.url, "--cell", CELL)
        assert "restored LEDGER_live" in await command("restore", file, *where)
        await cell.add_control()
        await cell.add_node("n0")
        answer = cell.client.resume(running.answer.request_id)
        tokens = [token async for chunk in answer for token in chunk.tokens]
        assert len(tokens) == 300 and tokens[: len(running.tokens)] == running.tokens
        assert list((await cell.client.result(done.answer.request_id)).tokens) == done.tokens
        assert "verified:" in await command("replay", "--verify", *where)
