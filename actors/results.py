"""The reader of control: shows positions that no worker shows, from the durable pages.

It serves ends that no worker's page carries (failed, cancelled in the queue, found by a seal), positions that a dead
worker may not have shown, and readers that come back. Everything is read from TOKENS by the spans that the cell cites.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from bus.contract import Bus, BusError, NoAnswer
from bus.embeddings import encode_answer
from bus.logprobs import TokenLogprobs
from bus.messages import ChoicesEnded, Message, ReaderRefused, ReplyTo, RequestEnded, ShowPositions, Span
from bus.pages import Page, decode_page
from bus.replies import (
    Chunk,
    ChunkEnd,
    ErrorBody,
    Refusal,
    Result,
    TokenCounts,
    WholeAnswers,
    chunk_of,
    counted,
    encode_chunk,
    encode_reply,
    end_of_all,
    reply_headers,
    too_large,
)
from bus.subjects import Subjects

PAGE_SECONDS = 2.0
"""How long to wait for the next page of a span before asking whether it is gone."""

PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Between attempts to read what is to be shown. After the last one, its readers have to ask."""

CHUNK_TOKENS = 512
CHUNK_TOKENS_LOGPROBS = 64
"""Of these, each token may bring as much text as twenty others."""
CHUNK_VECTOR_BYTES = 300_000
REPLY_LIMIT_BYTES = 1_000_000
"""Largest payload that is published: a NATS server takes 1 MB by default, headers included."""


class PagesGone(Exception):
    """Pages that should be there are not: they are older than the retention of TOKENS."""


class Position(NamedTuple):
    """One durable position of an answer; `logprobs` where the request asks for them."""

    position: int
    token: int
    text: str
    logprobs: TokenLogprobs | None
    vector: bytes = b""


async def read_span(bus: Bus, subjects: Subjects, request: str, span: Span) -> list[Position]:
    """The positions of one attempt, in order. Raises `PagesGone`, and `BusError` where nobody answers."""
    found: dict[int, Position] = {}
    reader = await bus.tokens.read([subjects.tokens(span.worker, span.epoch)], start=span.first_page)
    try:
        at = 0
        while at < span.last_page:
            for record in await asyncio.wait_for(reader.batch(), PAGE_SECONDS):
                at = record.sequence
                if at > span.last_page:
                    break
                page = decode_page(record.payload)
                for sequence in page.sequences if isinstance(page, Page) else ():
                    if sequence.request == request and sequence.attempt == span.attempt:
                        for offset, token in enumerate(sequence.tokens):
                            at_position = sequence.position + offset
                            logprobs = sequence.logprobs[offset] if sequence.logprobs else None
                            vector = sequence.vectors[offset] if sequence.vectors else b""
                            text = sequence.texts[offset]
                            found[at_position] = Position(at_position, token, text, logprobs, vector)
    except TimeoutError:
        if await bus.tokens.get(span.last_page) is None:
            raise PagesGone from None
        raise NoAnswer(f"page {span.last_page} of {span.worker} is there and did not come in time") from None
    except ValueError:
        raise PagesGone from None
    finally:
        await reader.close()
    positions = [found[position] for position in range(span.first, span.next) if position in found]
    if len(positions) != span.next - span.first:
        raise PagesGone
    return positions


async def read_spans(bus: Bus, subjects: Subjects, request: str, spans: tuple[Span, ...]) -> list[Position]:
    """All positions of some spans. Raises `PagesGone`."""
    positions: list[Position] = []
    for span in spans:
        positions += await read_span(bus, subjects, request, span)
    return positions


@dataclass(slots=True)
class _Turn:
    """Whoever shows something of one family takes it in turn; `wanted` by so many."""

    lock: asyncio.Lock
    wanted: int = 0


class ResultsReader:
    """Turns `positions.show`, `request.ended`, `choices.ended` and `reader.refused` into chunks on reply subjects."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._turns: dict[str, _Turn] = {}

    async def show(self, message: Message) -> None:
        """Show what the cell said to the reader. Never raises for what is gone or a bus that is away for long.

        What concerns answers of one request is shown in the order in which this is called: its last word comes last.
        """
        try:
            if isinstance(message, RequestEnded | ShowPositions) and message.replies:
                if message.choice is None:
                    await self._of_one(message)
                else:
                    async with self._in_order(message.choice.family):
                        await self._of_one(message)
            elif isinstance(message, ChoicesEnded):
                async with self._in_order(message.request):
                    await self._choices(message)
            elif isinstance(message, ReaderRefused):
                await self._refused(message)
        except BusError:
            return

    async def _of_one(self, message: RequestEnded | ShowPositions) -> None:
        await (self._ended(message) if isinstance(message, RequestEnded) else self._positions(message))

    @asynccontextmanager
    async def _in_order(self, family: str) -> AsyncIterator[None]:
        """One at a time, first come, first served."""
        turn = self._turns.setdefault(family, _Turn(asyncio.Lock()))
        turn.wanted += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted -= 1
            if not turn.wanted:
                del self._turns[family]

    async def _positions(self, message: ShowPositions) -> None:
        replies = [reply for reply in message.replies if not reply.single]
        if not replies:
            return
        try:
            positions = await self._patiently(message.request, message.spans)
        except PagesGone:
            return
        for reply in replies:
            for chunk in _chunks(message, positions, reply.start):
                await self._publish(reply, chunk)

    async def _ended(self, message: RequestEnded) -> None:
        positions, error = await self._found(message)
        for reply in message.replies:
            # The end stands behind the last position, whatever this reader wants to see of the answer.
            whole = reply.single
            chunks = [_whole(message, positions, reply.start)] if whole else _chunks(message, positions, reply.start)
            last = chunks.pop() if chunks else _chunk(message, message.positions, [])
            for chunk in chunks:
                await self._publish(reply, chunk)
            await self._publish(reply, _closed(message, last, error))
            if not reply.single and message.choice is None:
                await self._bus.publish(reply.subject, b"")

    async def _choices(self, message: ChoicesEnded) -> None:
        """All answers have ended: the one last word of the streams, and all answers in one for whoever wants that."""
        for reply in message.replies:
            if not reply.single:
                await self._bus.publish(reply.subject, b"")
        singles = [reply for reply in message.replies if reply.single]
        found = [(ended, *await self._found(ended)) for ended in message.choices] if singles else []
        for reply in singles:
            chunks = [_closed(e, _whole(e, positions, reply.start), error) for e, positions, error in found]
            answers = WholeAnswers(message.request, tuple(chunks), counted(chunks))
            payload = encode_reply(answers, reply.encoding)
            if len(payload) > REPLY_LIMIT_BYTES:
                size = f"the answers take {len(payload)} bytes: read them as a stream with resume"
                payload = encode_reply(
                    WholeAnswers(message.request, (), answers.usage, ErrorBody("too_large", size)), reply.encoding
                )
            await self._bus.publish(reply.subject, payload, headers=reply_headers(reply.encoding) or None)

    async def _found(self, ended: RequestEnded) -> tuple[list[Position], ErrorBody | None]:
        """Its positions, over an outage, and its error. Raises `BusError` after the last attempt."""
        try:
            return await self._patiently(ended.request, ended.spans), error_of(ended)
        except PagesGone:
            return [], _expired(ended)

    async def _patiently(self, request: str, spans: tuple[Span, ...]) -> list[Position]:
        """All positions of some spans, over an outage. Raises `PagesGone`, and `BusError` after the last attempt."""
        for pause in PAUSES_SECONDS:
            try:
                return await read_spans(self._bus, self._subjects, request, spans)
            except BusError:
                await asyncio.sleep(pause)
        return await read_spans(self._bus, self._subjects, request, spans)

    async def _refused(self, message: ReaderRefused) -> None:
        refusal = Refusal(message.code, message.reason)
        payload = encode_reply(refusal.status(message.request), message.reply.encoding)
        headers = refusal.headers() | reply_headers(message.reply.encoding)
        await self._bus.publish(message.reply.subject, payload, headers=headers)
        await self._bus.publish(message.reply.subject, b"")

    async def _publish(self, reply: ReplyTo, chunk: Chunk) -> None:
        if reply.form:
            payload = encode_answer(chunk, reply.form, reply.encoding)
        elif len(payload := encode_chunk(chunk, reply.encoding)) > REPLY_LIMIT_BYTES:
            payload = encode_chunk(too_large(chunk, len(payload)), reply.encoding)
        await self._bus.publish(reply.subject, payload, headers=reply_headers(reply.encoding) or None)

    async def result(self, name: str, ends: list[RequestEnded]) -> Result:
        """What has become of a request: its one answer, or all of them as chunks."""
        if len(ends) == 1:
            return await self._result(name, ends[0])
        chunks = []
        for ended in ends:
            positions, error = await self._read(ended)
            chunks.append(_closed(ended, _whole(ended, positions, 0), error))
        total = sum(ended.positions for ended in ends)
        end = end_of_all([chunk.end for chunk in chunks])
        return Result("ended", name, total, end, usage=counted(chunks), choices=tuple(chunks))

    async def _result(self, name: str, ended: RequestEnded) -> Result:
        """The whole answer of an ended request, or its error."""
        positions, error = await self._read(ended)
        return Result(
            status="ended",
            request=name,
            positions=ended.positions,
            end=end_of(ended),
            text="".join(one.text for one in positions),
            tokens=tuple(one.token for one in positions),
            usage=TokenCounts(ended.prompt_tokens, ended.positions),
            error=error,
            logprobs=tuple(one.logprobs for one in positions if one.logprobs is not None),
            vectors=tuple(one.vector for one in positions if one.vector),
        )

    async def _read(self, ended: RequestEnded) -> tuple[list[Position], ErrorBody | None]:
        try:
            return await read_spans(self._bus, self._subjects, ended.request, ended.spans), error_of(ended)
        except PagesGone:
            return [], _expired(ended)


def end_of(message: RequestEnded) -> ChunkEnd:
    """The `end` that clients read: how the answer stopped, or the outcome where there is no answer."""
    return message.end if message.outcome == "finished" else message.outcome


def error_of(message: RequestEnded) -> ErrorBody | None:
    if message.outcome in ("failed", "quarantined"):
        return ErrorBody(message.code or message.outcome, message.reason, message.retry_ms)
    return None


def far(ended: RequestEnded) -> Chunk:
    """How far one of several answers is: its position, and its end if it has one."""
    return msgspec.structs.replace(_chunk(ended, ended.positions, []), end=end_of(ended), n=_of(ended))


def _expired(message: RequestEnded) -> ErrorBody:
    return ErrorBody("expired", f"the tokens of request {message.request} are no longer kept")


Of = RequestEnded | ShowPositions


def _of(message: Of) -> int:
    return message.choice.of if message.choice is not None else 1


def _chunks(message: Of, positions: list[Position], start: int) -> list[Chunk]:
    wanted = [one for one in positions if one.position >= start]
    chunks = []
    while wanted:
        count = 1
        limit = CHUNK_TOKENS if wanted[0].logprobs is None else CHUNK_TOKENS_LOGPROBS
        if wanted[0].vector:
            limit = max(1, CHUNK_VECTOR_BYTES // len(wanted[0].vector))
        while count < min(len(wanted), limit) and wanted[count].position == wanted[0].position + count:
            count += 1
        part, wanted = wanted[:count], wanted[count:]
        chunks.append(_chunk(message, part[0].position, part))
    return chunks


def _whole(message: RequestEnded, positions: list[Position], start: int) -> Chunk:
    """All positions from `start` on as one chunk."""
    wanted = [one for one in positions if one.position >= start]
    return _chunk(message, wanted[0].position if wanted else min(start, message.positions), wanted)


def _chunk(message: Of, position: int, part: list[Position]) -> Chunk:
    choice = message.choice
    return chunk_of(
        message.request if choice is None else choice.family,
        position,
        [one.token for one in part],
        [one.text for one in part],
        logprobs=[one.logprobs for one in part if one.logprobs is not None],
        choice=0 if choice is None else choice.index,
        vectors=[one.vector for one in part if one.vector],
    )


def _closed(message: RequestEnded, chunk: Chunk, error: ErrorBody | None) -> Chunk:
    """The last chunk of an answer, with how it ended."""
    end: ChunkEnd = "failed" if error is not None and error.code == "expired" else end_of(message)
    usage = TokenCounts(message.prompt_tokens, message.positions)
    return msgspec.structs.replace(chunk, end=end, usage=usage, error=error, n=_of(message))
