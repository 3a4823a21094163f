"""A stand-in for intake and workers, for tests of whoever asks them."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec

from bus.api import Refusal, parse_infer, parse_resume
from bus.contract import Bus, Delivery
from bus.messages.requests import Encoding
from bus.replies import Chunk, ErrorBody, Result, TokenCounts, accepted, chunk_of, encode_reply, unknown
from bus.subjects import Subjects


class FakeCell:
    """Answers as a cell does, for answers of `length` tokens; `chance` decides what goes wrong on the way."""

    def __init__(
        self, bus: Bus, length: int = 20, chance: random.Random | None = None, *, cell: str = "main", pause: float = 0.0
    ) -> None:
        self.bus = bus
        self.subjects = Subjects(cell)
        self.pause = pause
        self.length = length
        self.chance = chance
        self.end: Any = "stop"
        self.error: ErrorBody | None = None
        self.first_word = "accepted"
        self.words_lost = 0
        self.chunks_shown = 1_000_000
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.requests: dict[str, None] = {}
        self.cancelled: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> FakeCell:
        for verb in ("infer", "resume", "cancel", "result", "admin", "submit"):
            subscription = await self.bus.subscribe(self.subjects.every(verb))
            self._tasks.append(asyncio.create_task(self._serve(verb, subscription)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, verb: str, subscription: Any) -> None:
        while True:
            delivery = await subscription.next()
            if self.pause:  # then many are shown at once
                self._tasks.append(asyncio.create_task(self._answer(verb, delivery)))
            else:
                await self._answer(verb, delivery)

    async def _answer(self, verb: str, delivery: Delivery) -> None:
        name = self.subjects.last_token(delivery.subject)
        try:
            await getattr(self, "_" + verb)(name, delivery)
        except Refusal as refusal:
            await self.bus.publish(delivery.reply, encode_reply(refusal.status()), headers=refusal.headers())

    async def say(self, reply: str, payload: bytes) -> None:
        if payload and self.words_lost > 0:
            self.words_lost -= 1
            return
        await self.bus.publish(reply, payload)

    async def _infer(self, model: str, delivery: Delivery) -> None:
        parsed = parse_infer(delivery.payload, delivery.headers.get("Content-Type"), model)
        self.asked.append(("infer", msgspec.json.decode(delivery.payload) if parsed.encoding == "json" else {}))
        first_word, self.first_word = self.first_word, "accepted"
        if first_word == "refused":
            raise Refusal("queue_full", "the queue is full: come again", retry_ms=70)
        self.requests[parsed.request] = None
        if first_word == "unknown":
            await self.say(delivery.reply, encode_reply(unknown(parsed.request, "no answer from the ledger")))
            return
        await self.say(delivery.reply, encode_reply(accepted(parsed.request), parsed.encoding))
        await self.show(parsed.request, delivery.reply, parsed.start, parsed.encoding)

    async def _resume(self, request: str, delivery: Delivery) -> None:
        parsed = parse_resume(delivery.payload, delivery.headers.get("Content-Type"))
        self.asked.append(("resume", {"from": parsed.start}))
        self.chunks_shown = 1_000_000
        if request not in self.requests:
            raise Refusal("unknown_request", f"no request {request} is known")
        await self.say(delivery.reply, encode_reply(accepted(request), parsed.encoding))
        await self.show(request, delivery.reply, parsed.start, parsed.encoding)

    async def _cancel(self, request: str, delivery: Delivery) -> None:
        self.cancelled.append(request)
        await self.bus.publish(delivery.reply, encode_reply(accepted(request)))

    async def _result(self, request: str, delivery: Delivery) -> None:
        self.asked.append(("result", {}))
        if request not in self.requests:
            raise Refusal("unknown_request", f"no request {request} is known")
        asked = len([verb for verb, _ in self.asked if verb == "result"])
        reply = Result("running", request, 4) if asked < 3 else Result("ended", request, end="stop", text="abc")
        await self.bus.publish(delivery.reply, encode_reply(reply))

    async def _submit(self, model: str, delivery: Delivery) -> None:
        request = parse_infer(delivery.payload, None, model).request
        asyncio.get_running_loop().call_later(0.1, self.requests.setdefault, request)
        await self.bus.publish(delivery.reply, b'{"stream":"INTAKE_main","seq":1}')

    async def _admin(self, verb: str, delivery: Delivery) -> None:
        if verb == "models":
            await self.bus.publish(delivery.reply, b'[{"model":"a","tiers":{"s1":"dram"}}]')
        else:
            raise Refusal("unknown_model", f"{verb}: no such model")

    def chunks(self, request: str, start: int) -> list[Chunk]:
        """The answer from before `start` on, cut at random places where there is chance."""
        chance = self.chance
        first = max(0, start - chance.randrange(3)) if chance else start
        shown = []
        while first < self.length:
            next_ = min(self.length, first + (chance.randrange(1, 5) if chance else 1))
            shown.append(chunk_of(request, first, range(first, next_), [f"{p} " for p in range(first, next_)]))
            first = next_
        usage = TokenCounts(2, self.length)
        if self.error or not shown:
            shown.append(Chunk(request, self.length, (), "", end=self.end, usage=usage, error=self.error))
        else:
            shown[-1] = msgspec.structs.replace(shown[-1], end=self.end, usage=usage)
        return shown

    async def show(self, request: str, reply: str, start: int, encoding: Encoding) -> None:
        chunks = self.chunks(request, start)
        if self.chance:
            repeated = [chunk for chunk in chunks if self.chance.random() < 0.3]
            chunks = [chunk for chunk in chunks + repeated if self.chance.random() < 0.8]
            if self.chance.random() < 0.3:
                self.chance.shuffle(chunks)
        for chunk in chunks:
            if self.chunks_shown <= 0:
                return
            self.chunks_shown -= 1
            await self.say(reply, encode_reply(chunk, encoding))
            await asyncio.sleep(self.pause)
        await self.bus.publish(reply, b"")
