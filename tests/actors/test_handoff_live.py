"""A real model's long context moves between two real workers, and the ledger shows that the source never waited."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import TypeVar

import msgspec
import pytest
from live_cell import CELL, live_cell
from packed_sample import pack_sample

from actors.children import Child
from actors.moves_watch import watch_moves
from actors.replay import verify
from bus.log_reading import read_to_end
from bus.messages import (
    CaughtUp,
    FactEnvelope,
    FollowSequence,
    HandOverSequence,
    Message,
    MigrateRequested,
    MoveStarted,
    RoundFinished,
    SequenceReleased,
    encode,
    kind_of,
)
from bus.pages import Page, decode_page
from bus.sentences import Event, read_event
from bus.subjects import Subjects

pytestmark = pytest.mark.slow

SUBJECTS = Subjects(CELL)
PROMPT = 2048
TOKENS = 1200
MOVE_AT = 12
Said = TypeVar("Said", bound=Message)


def only(events: list[Event], kind: type[Said]) -> tuple[Event, Said]:
    ((event, message),) = [(event, event.message) for event in events if isinstance(event.message, kind)]
    return event, message


async def test_the_source_goes_on_while_the_destination_computes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pack_sample(data / "models", "tiny", context=4096)
    random = Random(3)
    prompt = [random.randrange(8, 400) for _ in range(PROMPT)]
    async with live_cell(tmp_path, nodes=0) as cell:
        arguments = ["--nats", cell.server.url, "--cell", CELL, "--server", "s1", "--data", str(data), "--workers", "2"]
        node = ["node", *arguments, "--memory", "300MB", "--threads", "1", "--context", "4096", "--health", ""]
        cell.nodes.append(Child("node-s1", node, tmp_path / "node-s1.log"))
        await cell.nodes[0].start()
        await cell.until(lambda found: len(found["workers"]) == 2 and len(found["models"]) == 1)
        asked = ended = 0
        async with cell.client.infer("tiny", tokens=prompt, max_tokens=TOKENS, min_tokens=TOKENS, seed=1) as answer:
            async for chunk in answer:
                if chunk.position >= MOVE_AT and not asked:
                    message = MigrateRequested(request=answer.request_id)
                    payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
                    fact = await cell.bus.ledger.append(SUBJECTS.fact("migration", kind_of(message)), payload)
                    asked = fact.sequence
                    moving = asyncio.ensure_future(_moved(cell.bus, asked))
                if asked and moving.done():
                    ended = ended or chunk.position
                    if chunk.position > ended + MOVE_AT:
                        await answer.cancel()
        assert answer.end == "cancelled" and await moving, "it moved, and went on there"
        records = await read_to_end(cell.bus.ledger)
        pages = await read_to_end(cell.bus.tokens)
    events = [read_event(SUBJECTS, record) for record in records]

    # The destination computed in rounds; what came meanwhile was caught up with.
    rounds = [event.message for event in events if isinstance(event.message, RoundFinished)]
    assert len(rounds) >= 2, "at least one catch-up round"
    assert rounds[0].left > 4 and [one.first for one in rounds[1:]] == [one.next for one in rounds[:-1]]
    _, caught_up = only(events, CaughtUp)
    assert caught_up.rounds == len(rounds) and caught_up.position == rounds[-1].next

    # The source made pages from the moment at which it was followed until it was told to stop.
    _, move = only(events, MoveStarted)
    follow, _ = only(events, FollowSequence)
    stop, _ = only(events, HandOverSequence)
    _, released = only(events, SequenceReleased)
    between = [
        part
        for record in pages
        if record.subject.startswith(SUBJECTS.tokens(move.source, 1).rpartition(".")[0])
        and follow.timestamp < record.timestamp < stop.timestamp
        and isinstance(page := decode_page(record.payload), Page)
        for part in page.sequences
        if part.request == answer.request_id
    ]
    assert len(between) > 4 and all(part.tokens for part in between)
    assert between[0].position < rounds[0].next + rounds[0].left <= between[-1].position + 1 <= released.next
    assert verify(CELL, records).difference is None


async def _moved(bus: object, after: int) -> bool:
    return [one.moved async for one in watch_moves(bus, SUBJECTS, after)] == [True]  # type: ignore[arg-type]
