"""The life of the ledger with real processes: a start from a snapshot, kept through kills and outages."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import msgspec
import pytest
from test_live_failures import Reading, undisturbed

from actors.stub_node import MODEL
from bus.answer import RequestFailed
from bus.contract import LogFull
from bus.messages import CancelRequested, FactEnvelope, encode
from bus.subjects import Subjects
from tests.support.live_cell import CELL, LiveCell, live_cell

pytestmark = pytest.mark.slow
SUBJECTS = Subjects(CELL)
OFTEN = ("--snapshot-facts", "10")
STREAMS = ("INTAKE", "LEDGER", "PARTS", "SNAPSHOTS", "TOKENS")


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
    async with live_cell(tmp_path / "old", step_seconds=0.02, control=OFTEN) as cell:
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


async def test_generations_and_limits_of_a_running_cell(tmp_path: Path) -> None:
    """Full to the last byte, given room, recorded, shortened: the answer goes on, and a new control starts."""
    async with live_cell(tmp_path, step_seconds=0.02, control=OFTEN, ledger_limit_bytes=150_000) as cell:
        where = ("--nats", cell.server.url, "--cell", CELL)
        early = Reading(cell.client, "early", 4)
        await early.task
        await undisturbed(cell.client, [f"before {i}" for i in range(8)], 2)
        running = Reading(cell.client, "running", 250)
        await running.reach(3)
        await fill_up(cell)
        assert "filled to 99 %" in await command("ledger", "status", *where)
        with pytest.raises(RequestFailed) as refused:
            await cell.client.infer(MODEL, prompt="no room", max_tokens=1).text()
        assert refused.value.code == "ledger_full"
        assert "may hold 5 MB" in await command("ledger", "limit", "5MB", *where)
        await running.reach(100)
        await command("ledger", "snapshot", *where)
        await undisturbed(cell.client, ["between"], 2)
        await command("ledger", "snapshot", *where)
        made = json.loads(
            await command("ledger", "rotate", "--to", str(tmp_path / "g"), "--keep", "0", "--json", *where)
        )
        first = (await cell.bus.ledger.usage()).first_sequence
        assert made["dropped"] == first - 1 > 10 and made["held_back_by"] in ("", running.answer.request_id)
        assert "verified:" in await command("replay", made["recording"], "--verify")
        cell.controls[0].signal(signal.SIGKILL)
        await cell.controls[0].wait()
        by_itself = ("--generations", str(tmp_path / "g"), "--rotate-at", "1", "--rotate-keep", "0")
        await cell.add_control(*OFTEN, *by_itself)
        await running.task
        assert running.end == "length" and len(running.tokens) == 250
        await cell.status()
        assert "starting from a snapshot" in cell.controls[1].last_words(40)
        for reading in (early, running):
            assert list((await cell.client.result(reading.answer.request_id)).tokens) == reading.tokens
        assert "from the snapshot at" in await command("replay", "--verify", *where)
        async with asyncio.timeout(40):
            while (await cell.bus.ledger.usage()).first_sequence == first:
                # A slow machine fills the small ledger faster than it is shortened: then nothing more is taken.
                with contextlib.suppress(RequestFailed):
                    await undisturbed(cell.client, [f"more {i}" for i in range(6)], 1)
        newest = sorted((tmp_path / "g").glob("*.lsrec"))[-1]
        assert f"{first:012d}-" in newest.name and "from the snapshot at" in await command("replay", str(newest))


async def fill_up(cell: LiveCell) -> None:
    """With facts that say nothing, until not a hundred bytes are left."""
    fact = encode(FactEnvelope("test", msgspec.Raw(encode(CancelRequested("0" * 32)))))
    size = 10_000
    while size > 1:
        try:
            await cell.bus.ledger.append(SUBJECTS.fact("requests", "cancel.requested"), fact + b" " * size)
        except LogFull:
            size //= 2
