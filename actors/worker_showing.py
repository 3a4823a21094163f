"""Showing durable positions to readers. Core messages: a reader that misses one asks for the hole."""

from __future__ import annotations

import logging

from actors.worker_sequences import HeldSequence, ReplyReader
from bus.contract import Bus, BusError
from bus.embeddings import encode_answer
from bus.messages import OUTPUT_LIMIT_BYTES
from bus.replies import Chunk, ChunkEnd, TokenCounts, chunk_of, encode_chunk, reply_headers, too_large

POSITIONS_PER_CHUNK = 2000
VECTORS_PER_CHUNK_BYTES = 300_000

logger = logging.getLogger("longshore.driver")


class Showing:
    """Publishes chunks on reply subjects. One caller at a time, so that a reader's chunks leave in order."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._encoded: dict[tuple[int, int, str], bytes] = {}

    async def show(self, sequence: HeldSequence) -> None:
        """Bring every reader up to what is durable; those that come meanwhile as well."""
        self._encoded.clear()
        while (reader := _behind(sequence)) is not None:
            try:
                await self._bring_up(sequence, reader)
            except (BusError, ValueError) as error:
                reader.done = True
                logger.warning("%s cannot be shown to %s: %s", sequence.key, reader.reply.subject, error)

    async def _bring_up(self, sequence: HeldSequence, reader: ReplyReader) -> None:
        reply = reader.reply
        headers = reply_headers(reply.encoding)
        while not reader.done:
            first = min(reader.next, sequence.durable) if sequence.over else reader.next
            if first >= sequence.durable and not sequence.over:
                return
            following = sequence.durable if reply.single else min(sequence.durable, first + _most(sequence))
            payload = self._chunk(sequence, first, following, reader)
            while len(payload) > OUTPUT_LIMIT_BYTES and following - first > 1 and not reply.single:
                following = first + max(1, (following - first) // (len(payload) // OUTPUT_LIMIT_BYTES + 2))
                payload = self._chunk(sequence, first, following, reader)
            if len(payload) > OUTPUT_LIMIT_BYTES and reply.single and not reply.form:
                usage = TokenCounts(sequence.prompt_tokens, sequence.durable)
                whole = Chunk(sequence.effect.request, first, (), "", usage=usage)
                payload = encode_chunk(too_large(whole, len(payload)), reply.encoding)
            reader.next = following
            last = sequence.over and following == sequence.durable
            reader.done = last
            await self._bus.publish(reply.subject, payload, headers=headers)
            # The streams of a request with several answers end when all of them have: the reader of control says so.
            if last and not reply.single and sequence.effect.choice is None:
                await self._bus.publish(reply.subject, b"")

    def _chunk(self, sequence: HeldSequence, first: int, following: int, reader: ReplyReader) -> bytes:
        form = reader.reply.form
        key = (first, following, f"{reader.reply.encoding} {form}")
        payload = self._encoded.get(key)
        if payload is None:
            end: ChunkEnd = ""
            usage = None
            if sequence.over and following == sequence.durable:
                assert sequence.end != "handed-over", "a hand-over is not the end of an answer"
                end, usage = sequence.end, TokenCounts(sequence.prompt_tokens, sequence.durable)
            choice = sequence.effect.choice
            chunk = chunk_of(
                sequence.effect.request if choice is None else choice.family,
                first,
                sequence.tokens[first:following],
                sequence.texts[first:following],
                end=end,
                usage=usage,
                logprobs=sequence.logprobs[first:following],
                choice=choice.index if choice is not None else 0,
                n=choice.of if choice is not None and end else 1,
                vectors=sequence.vectors[first:following],
            )
            encoding = reader.reply.encoding
            payload = encode_answer(chunk, form, encoding) if form else encode_chunk(chunk, encoding)
            self._encoded[key] = payload
        return payload


def _most(sequence: HeldSequence) -> int:
    """Positions of one chunk, at the most."""
    vector = len(sequence.vectors[0]) if sequence.vectors else 0
    return max(1, VECTORS_PER_CHUNK_BYTES // vector) if vector else POSITIONS_PER_CHUNK


def _behind(sequence: HeldSequence) -> ReplyReader | None:
    """The first reader that was not shown all that it can be shown now."""
    for reader in sequence.readers:
        showable = sequence.over or (not reader.reply.single and reader.next < sequence.durable)
        if showable and not reader.done:
            return reader
    return None
