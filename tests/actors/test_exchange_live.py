"""On real processes: what runs on a device moves to another server, so that a model that lies here starts there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from live_cell import CELL, LiveCell, live_cell

from actors.replay import verify
from bus.log_reading import read_to_end
from bus.messages import (
    MoveEnded,
    PlacementDecided,
    PlacementExchanged,
    decode_said,
    decode_said_body,
)
from bus.sentences import sentence
from bus.subjects import SaidSubject, Subjects

STEP_SECONDS = 0.02
TOKENS = 300
ONE_MODEL = 12
"""MiB of a device on which one stub model has room."""


async def ask(cell: LiveCell, model: str, key: str, tokens: int, started: asyncio.Event) -> list[int]:
    found: list[int] = []
    async for chunk in cell.client.infer(model, prompt="hello", max_tokens=tokens, key=key, seed=7):
        assert chunk.position == len(found), "every position once and in order"
        found += chunk.tokens
        if len(found) > 3:
            started.set()
    return found


async def test_what_runs_moves_away_for_a_model_that_lies_here(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=0) as cell:
        await cell.add_node("n0", step_seconds=STEP_SECONDS, models=2, memory_mib=ONE_MODEL)
        await cell.until(lambda found: len(found["models"]) == 2)
        await ask(cell, "stub-1", "brings it to DRAM", 4, asyncio.Event())
        started = asyncio.Event()
        long = asyncio.ensure_future(ask(cell, "stub", "long", TOKENS, started))
        await started.wait()
        await cell.add_node("n1", step_seconds=STEP_SECONDS, models=1, memory_mib=ONE_MODEL)
        await cell.until(lambda found: len(found["workers"]) == 2 and "n1" in found["servers"])
        short = await ask(cell, "stub-1", "short", 8, asyncio.Event())
        assert len(short) == 8 and not long.done(), "it did not wait for the long answer"
        assert len(await long) == TOKENS
        times = (await cell.status())["moves"]["stub"]
        assert times["moves"] == 1 and times["fixed_ns"] > 0
        calm = await ask(cell, "stub", "calm", 40, asyncio.Event())
        assert (await long)[:40] == calm
        records, said = await ledger(cell)
        (decided,) = [m for m in said if isinstance(m, PlacementExchanged)]
        (move,) = decided.moves
        assert (decided.model, decided.worker, move.model, move.to) == ("stub-1", "gpu/n0/0", "stub", "gpu/n1/0")
        assert sentence(decided).startswith("placement moves 1 sequence of stub from gpu/n0/0 to gpu/n1/0, where it")
        ended = [m for m in said if isinstance(m, MoveEnded)]
        assert [(m.moved, m.request, m.destination) for m in ended] == [(True, move.request, "gpu/n1/0")]
        starts = [(m.model, m.worker) for m in said if isinstance(m, PlacementDecided)]
        assert starts[1:4] == [("stub", "gpu/n0/0"), ("stub", "gpu/n1/0"), ("stub-1", "gpu/n0/0")]
        assert verify(CELL, records).difference is None


async def ledger(cell: LiveCell) -> tuple[list[Any], list[Any]]:
    """All records, and what was said in them."""
    records = await read_to_end(cell.bus.ledger)
    subjects = [Subjects(CELL).parse(record.subject) for record in records]
    said = [
        decode_said_body(decode_said(record.payload).body)
        for record, subject in zip(records, subjects, strict=True)
        if isinstance(subject, SaidSubject)
    ]
    return records, said
