"""On real processes: what runs on a device moves to another server, so that a model that lies here starts there."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from live_cell import CELL, LiveCell, live_cell

from actors.replay import verify
from actors.why import story
from actors.why_cli import why
from bus.cli import _Wanted
from bus.contract import Record
from bus.errors import UserError
from bus.log_reading import read_to_end
from bus.messages import (
    MoveEnded,
    PlacementDecided,
    PlacementExchanged,
    PlacementSpread,
    decode_said,
    decode_said_body,
)
from bus.recording import write_recording
from bus.sentences import sentence
from bus.subjects import SaidSubject, Subjects

STEP_SECONDS = 0.02
TOKENS, SHARING = 300, 240
SUBJECTS = Subjects(CELL)
MODELS = ("stub", "stub-1")
STORY = (
    "request.accepted", "request.placed", "placement.decided", "placement.exchanged", "move.started", "move.ended",
    "request.ended",
)  # fmt: skip
ONE_MODEL = 12
"""MiB of a device on which one stub model has room."""


async def ask(cell: LiveCell, model: str, key: str, tokens: int, started: asyncio.Event) -> list[int]:
    """With an empty key it is another request each time."""
    found: list[int] = []
    async for chunk in cell.client.infer(model, prompt="hello", max_tokens=tokens, key=key or None, seed=7):
        assert chunk.position == len(found), "every position once and in order"
        found += chunk.tokens
        if len(found) > 3:
            started.set()
    return found


async def test_what_runs_moves_away_for_a_model_that_lies_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        why_it_moved(records, decided)
        await the_command_tells_it(cell, move.request, tmp_path, capsys)
        who_waited_is_told_too(records, decided)
        with pytest.raises(UserError, match="no request 'nobody'"):
            story(SUBJECTS, records, "nobody")


async def the_command_tells_it(cell: LiveCell, request: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    await why(request[:9] + "…", nats=cell.server.url, cell=CELL)
    live = capsys.readouterr().out
    assert "  moving what runs on gpu/n0/0: " in live and "so that stub-1 can start on gpu/n0/0\n" in live
    await write_recording(folder / "all.lsrec", cell.bus, cell=CELL)
    await why(request, recording=folder / "all.lsrec")
    assert capsys.readouterr().out == live
    await why(request, recording=folder / "all.lsrec", json=True)
    told = json.loads(capsys.readouterr().out)
    decisions = [one["kind"] for one in told if one["weighed"]]
    assert decisions == ["placement.decided", "placement.exchanged", "placement.decided"]


def why_it_moved(records: list[Record], decided: PlacementExchanged) -> None:
    """Who moved it, for whom, from where to where, and what was weighed."""
    (move,) = decided.moves
    told = story(SUBJECTS, records, move.request)
    assert [kind for one in told if (kind := one.event.kind) in STORY] == [
        "request.accepted", "placement.decided", "request.placed", "placement.exchanged", "placement.decided",
        "move.started", "move.ended", "request.ended",
    ]  # fmt: skip
    (decision,) = [one for one in told if one.event.message == decided]
    because = decision.because
    assert because is not None and f"request {decided.request[:8]}… for stub-1 accepted" in because.text
    moving, waiting, free, one_move = decision.weighed
    assert moving.startswith("moving what runs on gpu/n0/0: ") and "until the device is free" in moving
    assert waiting.startswith("waiting for what runs there: ") and free == "the best free place: there is none"
    assert f"request {move.request[:8]}… of stub" in one_move and "goes on at gpu/n1/0 in about" in one_move
    (moved,) = [one.event.text for one in told if one.event.kind == "move.started"]
    assert moved.endswith("from gpu/n0/0 to gpu/n1/0: so that stub-1 can start on gpu/n0/0")


def who_waited_is_told_too(records: list[Record], decided: PlacementExchanged) -> None:
    told = story(SUBJECTS, records, decided.request[:12])
    assert decided in [one.event.message for one in told]
    (start,) = [one for one in told if one.event.kind == "placement.decided"]
    (candidate,) = start.weighed
    assert candidate.startswith("gpu/n0/0, from DRAM: ") and candidate.endswith("[chosen]")


async def test_what_shares_a_device_moves_to_one_that_idles(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=0) as cell:
        await cell.add_node("n0", step_seconds=STEP_SECONDS, models=2)
        await cell.until(lambda found: len(found["models"]) == 2)
        begun = [asyncio.Event(), asyncio.Event()]
        long = [asyncio.ensure_future(ask(cell, m, m, SHARING, e)) for m, e in zip(MODELS, begun, strict=True)]
        for event in begun:
            await event.wait()
        await cell.add_node("n1", step_seconds=STEP_SECONDS, models=2)
        await cell.until(lambda found: len(found["workers"]) == 2 and "n1" in found["servers"])
        spreads: list[PlacementSpread] = []
        while not spreads and not any(one.done() for one in long):
            # Placement looks when a slot comes free, and at what has run for two seconds.
            await ask(cell, "stub-1", "", 4, asyncio.Event())
            spreads = [m for m in (await ledger(cell))[1] if isinstance(m, PlacementSpread)]
        found = [await one for one in long]
        assert [len(one) for one in found] == [SHARING] * 2
        calm = [await ask(cell, model, f"calm {model}", 40, asyncio.Event()) for model in MODELS]
        assert [one[:40] for one in found] == calm
        records, said = await ledger(cell)
        (spread,) = [m for m in said if isinstance(m, PlacementSpread)]
        assert (spread.worker, spread.to, spread.starts) == ("gpu/n0/0", "gpu/n1/0", True)
        assert {spread.model, *spread.shared} == {*MODELS} and len(spread.requests) == 1
        ended = [m for m in said if isinstance(m, MoveEnded)]
        assert [(m.moved, m.request, m.destination) for m in ended] == [(True, spread.requests[0], "gpu/n1/0")]
        told = story(SUBJECTS, records, spread.requests[0])
        (decision,) = [one for one in told if one.event.message == spread]
        shared = f"gpu/n0/0 is shared with {spread.shared[0]}, and gpu/n1/0 idles"
        assert decision.weighed[0] == shared and decision.because is not None
        assert decision.weighed[1].startswith("goes on at gpu/n1/0 in about ")
        (moved,) = [one.event.text for one in told if one.event.kind == "move.started"]
        assert moved.endswith(f"to gpu/n1/0: it shares gpu/n0/0 with {spread.shared[0]}, and gpu/n1/0 idles")
        wanted = _Wanted(SUBJECTS, spread.requests[0][:10], "placement.spread")
        assert len([record for record in records if wanted(record)]) == 1, "`tail --request` shows it, too"
        assert verify(CELL, records).difference is None


async def ledger(cell: LiveCell) -> tuple[list[Any], list[Any]]:
    """All records, and what was said in them."""
    records = await read_to_end(cell.bus.ledger)
    subjects = [SUBJECTS.parse(record.subject) for record in records]
    said = [
        decode_said_body(decode_said(record.payload).body)
        for record, subject in zip(records, subjects, strict=True)
        if isinstance(subject, SaidSubject)
    ]
    return records, said
