"""The least control there is, for tests of drivers: one cell, one reader, everything said is published at once."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from actors.cell import Cell
from bus.contract import Bus, Delivery, Record
from bus.messages import (
    DriverLost,
    FactEnvelope,
    Generation,
    Message,
    ModelCard,
    ReplyTo,
    RequestAccepted,
    SealedSequence,
    SequencesSealed,
    decode_fact,
    decode_fact_body,
    decode_said,
    decode_said_body,
    encode,
    kind_of,
)
from bus.pages import Page, Seal, decode_page, encode_page
from bus.replies import Chunk, decode_reply
from bus.subjects import FactSubject, SaidSubject, Subjects


def card(model: str, *, weight_bytes: int = 1000, context: int = 512, digest: str = "d1") -> ModelCard:
    return ModelCard(model, digest, weight_bytes, context, kv_bytes_per_token=1, vocabulary=1000)


class TinyControl:
    """Runs a real cell over the ledger of `bus`. `heard` holds the ledger: sequence, receiver, message."""

    def __init__(self, bus: Bus, cell: str = "main") -> None:
        self.bus = bus
        self.subjects = Subjects(cell)
        self.cell = Cell(cell)
        self.heard: list[tuple[int, str, Message]] = []
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> TinyControl:
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        reader = await self.bus.ledger.read()
        while True:
            for record in await reader.batch():
                self._hear(record)
                for step in self.cell.take(record):
                    for said in step.said:
                        self.bus.ledger.send(
                            said.subject, said.payload, message_id=f"said.{step.sequence}.{said.place}"
                        )

    def _hear(self, record: Record) -> None:
        subject = self.subjects.parse(record.subject)
        if isinstance(subject, FactSubject):
            message = decode_fact_body(decode_fact(record.payload).body)
            self.heard.append((record.sequence, subject.actor, message))
        elif isinstance(subject, SaidSubject):
            said = decode_said_body(decode_said(record.payload).body)
            self.heard.append((record.sequence, subject.receiver, said))
        self._changed.set()

    def find(self, kind: type[Message], **fields: object) -> list[Message]:
        return [
            message
            for _, _, message in self.heard
            if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items())
        ]

    async def wait(self, kind: type[Message], count: int = 1, **fields: object) -> Message:
        """The count-th message of a kind with these fields, as soon as it stands in the ledger."""
        while len(self.find(kind, **fields)) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.find(kind, **fields)[count - 1]

    async def state(self, actor: str, message: Message, sender: str = "test") -> int:
        envelope = FactEnvelope(sender, msgspec.Raw(encode(message)))
        appended = await self.bus.ledger.append(self.subjects.fact(actor, kind_of(message)), encode(envelope))
        return appended.sequence

    async def request(self, name: str, model: str, generation: Generation, reply: ReplyTo | None = None) -> None:
        await self.state("requests", RequestAccepted(name, "c", name, model, generation, reply))

    async def lose(self, driver: str, epoch: int) -> None:
        await self.state(driver, DriverLost(driver, epoch, "silence"), "watch")

    async def seal(self, worker: str, epoch: int) -> int:
        """As recovery does: append the seal, read what stands before it, state it. The sequence of the seal."""
        subject = self.subjects.tokens(worker, epoch)
        last = await self.bus.tokens.last(subject)
        sealed = await self.bus.tokens.append(
            subject, encode_page(Seal(True, "test")), expected_last=last.sequence if last else 0
        )
        found: dict[tuple[str, int], SealedSequence] = {}
        for sequence in range(1, sealed.sequence):
            record = await self.bus.tokens.get(sequence)
            page = decode_page(record.payload) if record is not None and record.subject == subject else None
            for part in page.sequences if isinstance(page, Page) else ():
                key = (part.request, part.attempt)
                known = found.get(key)
                first = known.first if known else part.position
                tokens = (known.tokens if known else ()) + part.tokens
                pages = (known.first_page if known else sequence, sequence)
                found[key] = SealedSequence(*key, first, tokens, *pages, part.end, part.prompt_tokens)
        await self.state(worker, SequencesSealed(worker, epoch, tuple(found.values())), "sealer")
        return sealed.sequence


class Listener:
    """A reader of chunks on a subject of its own."""

    def __init__(self, bus: Bus, *, start: int = 0, single: bool = False, encoding: str = "json") -> None:
        self.bus = bus
        self.reply = ReplyTo(bus.new_inbox(), start, encoding, single)  # type: ignore[arg-type]
        self.deliveries: list[Delivery] = []

    async def open(self) -> Listener:
        self.subscription = await self.bus.subscribe(self.reply.subject)
        return self

    async def chunk(self) -> Chunk | None:
        """The next chunk; None for the empty message that ends a stream."""
        delivery = await self.subscription.next()
        self.deliveries.append(delivery)
        if not delivery.payload:
            return None
        reply = decode_reply(delivery.payload, self.reply.encoding)
        assert isinstance(reply, Chunk)
        return reply

    async def all(self) -> list[Chunk]:
        chunks = []
        while (chunk := await self.chunk()) is not None:
            chunks.append(chunk)
            if self.reply.single and chunk.end:
                break
        return chunks
