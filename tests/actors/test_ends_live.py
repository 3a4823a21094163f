"""On real processes: who is cancelled or too late while queued, while its model loads, or in its prefill ends there."""

from __future__ import annotations

import asyncio
from pathlib import Path

from live_cell import CELL, LiveCell, live_cell

from actors.replay import verify
from bus.answer import Answer
from bus.log_reading import read_to_end
from bus.messages import LoadFailed, LoadModel, Message, ModelLoaded, PlaceRequest, RequestEnded, StartSequence
from bus.sentences import Event, read_event
from bus.subjects import Subjects

STEP_SECONDS = 0.02
LOAD_SECONDS = 1.0
LONG = 80


class Ends:
    def __init__(self, cell: LiveCell) -> None:
        self.cell = cell

    async def events(self) -> list[Event]:
        return [read_event(Subjects(CELL), record) for record in await read_to_end(self.cell.bus.ledger)]

    async def reached(self, kind: type[Message], request: str = "") -> None:
        """Until the ledger holds a message of this kind, about this request where one is given."""
        reader = await self.cell.bus.ledger.read(start=1)
        try:
            async with asyncio.timeout(20):
                while True:
                    for record in await reader.batch():
                        message = read_event(Subjects(CELL), record).message
                        if isinstance(message, kind) and getattr(message, "request", request) == request:
                            return
        finally:
            await reader.close()

    async def cancelled_at(self, kind: type[Message], prompt: str = "hello") -> str:
        """A request that is cancelled once that stands in the ledger, and ends without a position."""
        answer = self.cell.client.infer("stub", prompt, max_tokens=LONG)
        reading = asyncio.ensure_future(_read(answer))
        await self.reached(kind, answer.request_id)
        await self.cell.client.cancel(answer.request_id)
        assert not await reading and answer.end == "cancelled"
        return answer.request_id

    async def too_late(self, prompt: str = "hello") -> str:
        """The same with one that has too little time."""
        answer = self.cell.client.infer("stub", prompt, max_tokens=LONG, deadline_ms=200)
        assert not await _read(answer) and answer.end == "deadline"
        return answer.request_id


async def _read(answer: Answer) -> list[int]:
    found: list[int] = []
    async for chunk in answer:
        found += chunk.tokens
    return found


async def test_it_ends_where_it_is(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=0) as cell:
        await cell.add_node("n0", step_seconds=STEP_SECONDS, slots=1, load_seconds=LOAD_SECONDS)
        await cell.until(lambda found: len(found["workers"]) == 1 and len(found["models"]) == 1)
        ends = Ends(cell)

        # While its model loads: nothing of the load is left.
        waiting = [await ends.cancelled_at(LoadModel), await ends.too_late()]
        events = await ends.events()
        failed = [event.message for event in events if isinstance(event.message, LoadFailed)]
        assert len(failed) == 2 and all(one.cancelled for one in failed)
        assert not [event for event in events if isinstance(event.message, ModelLoaded | StartSequence)]

        # In its prefill, which takes 30 steps.
        prompt = "x" * 7800
        await ends.cancelled_at(StartSequence, prompt)
        await ends.too_late(prompt)

        # While another one has the only slot.
        long = cell.client.infer("stub", "long", max_tokens=LONG)
        reading = asyncio.ensure_future(_read(long))
        await ends.reached(StartSequence, long.request_id)
        waiting += [await ends.cancelled_at(PlaceRequest), await ends.too_late()]
        assert not reading.done() and len(await reading) == LONG and long.end == "length"

        # Whom no worker had yet ended in the very step of the order.
        events = await ends.events()
        kinds = {event.sequence: event.kind for event in events}
        ended = {event.message.request: event for event in events if isinstance(event.message, RequestEnded)}
        orders = [kinds[ended[request].cause] for request in waiting]
        assert orders == ["cancel.requested", "timer.fired"] * 2
        assert verify(CELL, await read_to_end(cell.bus.ledger)).difference is None
