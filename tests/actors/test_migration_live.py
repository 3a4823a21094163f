"""Running answers move between real processes while they are written: nothing lost, repeated, or changed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live_cell import CELL, LiveCell, live_cell

from actors.moves_watch import watch_moves
from actors.replay import verify
from bus.log_reading import read_to_end
from bus.messages import (
    FactEnvelope,
    MigrateRequested,
    MoveEnded,
    RoundFinished,
    encode,
    kind_of,
)
from bus.sentences import read_event
from bus.subjects import Subjects

STEP_SECONDS = 0.02


def migrate(cell: LiveCell, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "bus.main", "migrate", *arguments, "--nats", cell.server.url, "--cell", CELL, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


async def move(cell: LiveCell, message: MigrateRequested) -> list[MoveEnded]:
    """As the command does, without its start."""
    subjects = Subjects(CELL)
    payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
    fact = await cell.bus.ledger.append(subjects.fact("migration", kind_of(message)), payload)
    return [ended async for ended in watch_moves(cell.bus, subjects, fact.sequence)]


async def ask(cell: LiveCell, key: str, tokens: int, started: asyncio.Event) -> tuple[list[int], str]:
    """The tokens of an answer and its end; `started` is set with the first one."""
    found: list[int] = []
    end = ""
    async for chunk in cell.client.infer("stub", prompt="the same for all", max_tokens=tokens, key=key, seed=7):
        assert chunk.position == len(found), "every position once and in order"
        found += chunk.tokens
        end = chunk.end
        if len(found) > 3:
            started.set()
    return found, end


async def test_answers_move_to_another_server_and_back(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=2, step_seconds=STEP_SECONDS) as cell:
        expected = (await ask(cell, "calm", 250, asyncio.Event()))[0]
        events = [asyncio.Event() for _ in range(4)]
        answers = [asyncio.ensure_future(ask(cell, f"key-{n}", 250, event)) for n, event in enumerate(events)]
        for event in events:
            await event.wait()
        source = server_of(await cell.status())
        target = "n1" if source == "n0" else "n0"
        moved = await asyncio.to_thread(migrate, cell, "stub", "--to", target)
        assert len(moved) == 4 and all(one["moved"] for one in moved), moved
        assert all(source in one["source"] and target in one["destination"] for one in moved)
        for mistyped in (["stubb"], ["stub", "--to", "n7"]):
            with pytest.raises(AssertionError, match=f"{mistyped[-1]}' in this cell; it has: "):
                await asyncio.to_thread(migrate, cell, *mistyped)
        # The same again: what runs there has nowhere to go.
        again = await move(cell, MigrateRequested(model="stub", to=target))
        assert len(again) == 4 and not any(one.moved for one in again), again
        back = await move(cell, MigrateRequested(server=target))
        assert len(back) == 4 and all(one.moved and source in one.destination for one in back), back
        nobody = await move(cell, MigrateRequested(request="0" * 32))
        assert [one.reason for one in nobody] == ["no such request is known here"]
        found = [await answer for answer in answers]
        assert all(answer == (expected, "length") for answer in found)
        records = await ledger(cell)
        rounds = [m for _, m in records if isinstance(m, RoundFinished)]
        assert len(rounds) >= 8
        replayed = verify(CELL, [record for record, _ in records])
        assert replayed.difference is None


async def ledger(cell: LiveCell) -> list[tuple[Any, Any]]:
    subjects = Subjects(CELL)
    return [(record, read_event(subjects, record).message) for record in await read_to_end(cell.bus.ledger)]


def server_of(cell_status: dict[str, Any]) -> str:
    """The server on which something runs."""
    busy = [w for w in cell_status["workers"].values() if any(i["active"] for i in w["instances"].values())]
    return str(busy[0]["server"])


@pytest.mark.parametrize("victim", ["destination", "source"])
async def test_either_side_may_die_while_an_answer_moves(victim: str, tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=2, step_seconds=STEP_SECONDS) as cell:
        expected = (await ask(cell, "calm", 120, asyncio.Event()))[0]
        started = asyncio.Event()
        answer = asyncio.ensure_future(ask(cell, "moving", 120, started))
        await started.wait()
        source = server_of(await cell.status())
        target = "n1" if source == "n0" else "n0"
        moving = asyncio.ensure_future(asyncio.to_thread(migrate, cell, "stub", "--to", target))
        reader = await cell.bus.ledger.read([f"longshore.{CELL}.said.*.driver/gpu/{target}/0.sequence.follow"])
        await reader.batch()
        await reader.close()
        dying = target if victim == "destination" else source
        next(node for node in cell.nodes if node.name == f"node-{dying}").signal(signal.SIGKILL)
        tokens, end = await answer
        assert end == "length" and tokens == expected
        await moving
        ended = [message for _, message in await ledger(cell) if isinstance(message, MoveEnded)]
        assert len(ended) == 1
