"""Where a worker finds what it is to go on with: the prompt in the ledger, earlier tokens in the ledger or in pages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import msgspec

from bus.contract import BusError, Log, NoAnswer, Record
from bus.logprobs import TokenLogprobs
from bus.messages import (
    Generation,
    Message,
    RequestAccepted,
    SequencesSealed,
    Span,
    StartSequence,
    decode_fact,
    decode_fact_body,
)
from bus.pages import Page, decode_page
from bus.parts import PartsRefused, assemble, fetch
from bus.subjects import Subjects

RETRY_SECONDS = 0.1
PAGES_SECONDS = 30.0
"""How long pages that were there a moment ago may take to arrive."""
REMEMBERED = 16
"""Facts kept after they were read: several sequences of one worker cite the same seal."""

Got = TypeVar("Got")


class NotKept(Exception):
    """What a sequence is to go on from is not there (any more); one sentence."""


class Earlier(NamedTuple):
    """Positions of an answer that others computed; `logprobs` and `vectors` may be empty."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    vectors: tuple[bytes, ...] = ()


class Prompts:
    """Reads what `sequence.start` cites. An outage is waited for; only what is certainly not there is `NotKept`."""

    def __init__(self, ledger: Log, tokens: Log, parts: Log, subjects: Subjects) -> None:
        self._ledger = ledger
        self._tokens = tokens
        self._parts = parts
        self._subjects = subjects
        self._facts: dict[int, Message] = {}

    async def generation(self, start: StartSequence) -> Generation:
        """What the request asks for. Raises `NotKept`."""
        fact = await self._fact(start.accepted)
        name = start.choice.family if start.choice is not None else start.request
        if not isinstance(fact, RequestAccepted) or fact.request != name:
            raise NotKept(f"ledger sequence {start.accepted} does not hold request {start.request}")
        return fact.generation

    async def asked(self, sequence: int, model: str) -> Generation | None:
        """What the request asks for that was accepted there, if one for this model was. Raises `NotKept`."""
        fact = await self._fact(sequence)
        if not isinstance(fact, RequestAccepted) or fact.model != model:
            return None
        return await self.assembled(fact.generation)

    async def assembled(self, generation: Generation) -> Generation:
        """The same with its prompt in the place of parts. Raises `NotKept` where they are missing or make no prompt."""
        cited = generation.parts
        if cited is None:
            return generation

        async def parts() -> bytes:
            return await fetch(self._parts, self._subjects, cited)

        try:
            data = await _patiently(parts)
            return assemble(generation, data)
        except PartsRefused as refused:
            raise NotKept(str(refused)) from None

    async def earlier(self, start: StartSequence, *, logprobs: bool = False, vectors: bool = False) -> Earlier:
        """The answer before `start.position`, with `logprobs` or `vectors` if wanted: only pages have these. Raises
        `NotKept`.
        """
        tokens: list[int] = []
        found_logprobs: list[TokenLogprobs] = []
        found_vectors: list[bytes] = []
        for span in start.history:
            if span.first > len(tokens):
                break
            sealed = span.sealed and not (logprobs or vectors)
            found = await (self._sealed(start, span) if sealed else self._paged(start, span))
            del tokens[span.first :], found_logprobs[span.first :], found_vectors[span.first :]
            tokens += found.tokens
            found_logprobs += found.logprobs
            found_vectors += found.vectors
        known = min(len(tokens), len(found_logprobs)) if logprobs else len(tokens)
        known = min(known, len(found_vectors)) if vectors else known
        if known < start.position:
            raise NotKept(f"positions {known} to {start.position - 1} of the answer are not kept any more")
        until = start.position
        return Earlier(tuple(tokens[:until]), tuple(found_logprobs[:until]), tuple(found_vectors[:until]))

    async def _sealed(self, start: StartSequence, span: Span) -> Earlier:
        fact = await self._fact(span.sealed)
        if isinstance(fact, SequencesSealed):
            for sealed in fact.sequences:
                if sealed.request == start.request and sealed.attempt == span.attempt:
                    return Earlier(sealed.tokens[span.first - sealed.first :][: span.next - span.first])
        return Earlier()

    async def _paged(self, start: StartSequence, span: Span) -> Earlier:
        async def last_page() -> Record | None:
            return await self._tokens.get(span.last_page)

        async def pages() -> Earlier:
            return await self._read_pages(start, span)

        if await _patiently(last_page) is None:
            return Earlier()
        return await _patiently(pages)

    async def _read_pages(self, start: StartSequence, span: Span) -> Earlier:
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        vectors: list[bytes] = []
        size = span.next - span.first
        subject = self._subjects.tokens(span.worker, span.epoch)
        reader = await self._tokens.read([subject], start=span.first_page)
        try:
            async with asyncio.timeout(PAGES_SECONDS):
                while True:
                    for record in await reader.batch():
                        if record.sequence > span.last_page:
                            return Earlier(tuple(tokens), tuple(logprobs), tuple(vectors))
                        page = decode_page(record.payload)
                        for part in page.sequences if isinstance(page, Page) else ():
                            if (part.request, part.attempt) != (start.request, span.attempt):
                                continue
                            if part.position == span.first + len(tokens):
                                tokens += part.tokens
                                logprobs += part.logprobs
                                vectors += part.vectors
                        if record.sequence == span.last_page:
                            return Earlier(tuple(tokens[:size]), tuple(logprobs[:size]), tuple(vectors[:size]))
        except TimeoutError:
            raise NoAnswer(f"{subject} did not arrive within {PAGES_SECONDS:g} s") from None
        except ValueError:  # a record that is no page: what lies behind it counts as not kept
            return Earlier(tuple(tokens), tuple(logprobs), tuple(vectors))
        finally:
            await reader.close()

    async def _fact(self, sequence: int) -> Message:
        known = self._facts.pop(sequence, None)
        if known is None:

            async def record_at() -> Record | None:
                return await self._ledger.get(sequence)

            record = await _patiently(record_at)
            if record is None:
                raise NotKept(f"the ledger holds nothing at sequence {sequence}")
            try:
                known = decode_fact_body(decode_fact(record.payload).body)
            except msgspec.DecodeError:
                raise NotKept(f"ledger sequence {sequence} does not hold a fact") from None
        self._facts[sequence] = known
        while len(self._facts) > REMEMBERED:
            del self._facts[next(iter(self._facts))]
        return known


async def _patiently(ask: Callable[[], Coroutine[Any, Any, Got]]) -> Got:
    """Ask until there is an answer: no answer proves nothing."""
    while True:
        try:
            return await ask()
        except BusError:
            await asyncio.sleep(RETRY_SECONDS)
