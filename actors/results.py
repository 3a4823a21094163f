"""The reader of control: shows positions that no worker shows, from the durable pages.

It serves ends that no worker's page carries (failed, cancelled in the queue, found by a seal), positions that a dead
worker may not have shown, and readers that come back. Everything is read from TOKENS by the spans that the cell cites.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, cast

import msgspec

from bus.contract import Bus, BusError, NoAnswer
from bus.logprobs import TokenLogprobs
from bus.messages import Message, ReaderRefused, ReplyTo, RequestEnded, ShowPositions, Span
from bus.pages import Page, decode_page
from bus.replies import (
    Chunk,
    ChunkEnd,
    ErrorBody,
    Refusal,
    Result,
    TokenCounts,
    chunk_of,
    encode_chunk,
    encode_reply,
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
                            found[at_position] = Position(at_position, token, sequence.texts[offset], logprobs)
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


class ResultsReader:
    """Turns `positions.show`, `request.ended` and `reader.refused` into chunks on reply subjects."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects

    async def show(self, message: Message) -> None:
        """Show what the cell said to the reader. Never raises for what is gone or a bus that is away for long."""
        try:
            if isinstance(message, RequestEnded) and message.replies:
                await self._ended(message)
            elif isinstance(message, ShowPositions):
                await self._positions(message)
            elif isinstance(message, ReaderRefused):
                await self._refused(message)
        except BusError:
            return

    async def _positions(self, message: ShowPositions) -> None:
        replies = [reply for reply in message.replies if not reply.single]
        if not replies:
            return
        try:
            positions = await self._patiently(message.request, message.spans)
        except PagesGone:
            return
        for reply in replies:
            for chunk in _chunks(message.request, positions, reply.start):
                await self._publish(reply, chunk)

    async def _ended(self, message: RequestEnded) -> None:
        error = error_of(message)
        positions: list[Position] = []
        try:
            positions = await self._patiently(message.request, message.spans)
        except PagesGone:
            error = ErrorBody("expired", f"the tokens of request {message.request} are no longer kept")
        usage = TokenCounts(message.prompt_tokens, message.positions)
        for reply in message.replies:
            # The end stands behind the last position, whatever this reader wants to see of the answer.
            if reply.single:
                wanted = [one for one in positions if one.position >= reply.start]
                start = wanted[0].position if wanted else min(reply.start, message.positions)
                chunks = [_chunk(message.request, start, wanted)]
            else:
                chunks = _chunks(message.request, positions, reply.start)
            last = chunks.pop() if chunks else Chunk(message.request, message.positions, (), "")
            end = cast(ChunkEnd, end_of(message) if error is None or error.code != "expired" else "failed")
            for chunk in chunks:
                await self._publish(reply, chunk)
            closing = msgspec.structs.replace(last, end=end, usage=usage, error=error)
            await self._publish(reply, closing)
            if not reply.single:
                await self._bus.publish(reply.subject, b"")

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
        payload = encode_chunk(chunk, reply.encoding)
        if len(payload) > REPLY_LIMIT_BYTES:
            payload = encode_chunk(too_large(chunk, len(payload)), reply.encoding)
        await self._bus.publish(reply.subject, payload, headers=reply_headers(reply.encoding) or None)

    async def result(self, ended: RequestEnded) -> Result:
        """The whole answer of an ended request, or its error."""
        error = error_of(ended)
        positions: list[Position] = []
        try:
            positions = await read_spans(self._bus, self._subjects, ended.request, ended.spans)
        except PagesGone:
            error = ErrorBody("expired", f"the tokens of request {ended.request} are no longer kept")
        return Result(
            status="ended",
            request=ended.request,
            positions=ended.positions,
            end=cast(ChunkEnd, end_of(ended)),
            text="".join(one.text for one in positions),
            tokens=tuple(one.token for one in positions),
            logprobs=tuple(one.logprobs for one in positions if one.logprobs is not None),
            usage=TokenCounts(ended.prompt_tokens, ended.positions),
            error=error,
        )


def end_of(message: RequestEnded) -> str:
    """The `end` that clients read: how the answer stopped, or the outcome where there is no answer."""
    return message.end if message.outcome == "finished" else message.outcome


def error_of(message: RequestEnded) -> ErrorBody | None:
    if message.outcome in ("failed", "quarantined"):
        return ErrorBody(message.code or message.outcome, message.reason, message.retry_ms)
    return None


def _chunks(request: str, positions: list[Position], start: int) -> list[Chunk]:
    wanted = [one for one in positions if one.position >= start]
    chunks = []
    while wanted:
        count = 1
        limit = CHUNK_TOKENS if wanted[0].logprobs is None else CHUNK_TOKENS_LOGPROBS
        while count < min(len(wanted), limit) and wanted[count].position == wanted[0].position + count:
            count += 1
        part, wanted = wanted[:count], wanted[count:]
        chunks.append(_chunk(request, part[0].position, part))
    return chunks


def _chunk(request: str, position: int, part: list[Position]) -> Chunk:
    logprobs = [one.logprobs for one in part if one.logprobs is not None]
    return chunk_of(request, position, [one.token for one in part], [one.text for one in part], logprobs=logprobs)
