"""The sequences that a worker holds, and the pages that make their positions durable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from bus.logprobs import TokenLogprobs
from bus.messages import (
    ReplyTo,
    SequenceFailed,
    SequenceFinished,
    SequenceProgress,
    SequenceReleased,
    StartSequence,
    extend_chain,
)
from bus.pages import Page, PageEnd, PageSequence, encode_page
from models.contract import SequenceStart

PAGE_LIMIT_BYTES = 500_000
"""Pages beyond this are split; a server takes 1 MB by default."""

Stop = Literal["", "cancelled", "deadline", "handed-over"]


def tokens_digest(tokens: Iterable[int], digest: str = "") -> str:
    """A rolling hash over token ids, continued from `digest`: 16 hexadecimal digits, empty for no token."""
    for token in tokens:
        digest = extend_chain(digest, token.to_bytes(8, "little"))
    return digest


@dataclass(slots=True)
class ReplyReader:
    """Somebody who is shown an answer; `next` is the first position not yet shown. `done`: the end was shown."""

    reply: ReplyTo
    next: int
    done: bool = False


@dataclass(slots=True)
class HeldSequence:
    """One attempt of one request, from the effect that started it to the fact that answers it.

    `tokens`, `texts`, `logprobs` and `vectors` (the last two empty where nobody asks for them) begin at position 0,
    whoever computed them; those before `durable` are acknowledged, and `digest` covers these. `end` is set when a page
    that ends it is on its way, `ended` once that is acknowledged.
    """

    effect: StartSequence
    number: int
    arrived: float
    readers: list[ReplyReader]
    start: SequenceStart | None = None
    running: bool = False
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    vectors: list[bytes] = field(default_factory=list)
    durable: int = 0
    digest: str = ""
    stopping: Stop = ""
    end: PageEnd = ""
    failure: str = ""
    ended: bool = False
    first_page: int = 0
    last_page: int = 0
    first_token_at: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.effect.request}/{self.effect.attempt}"

    @property
    def prompt_tokens(self) -> int:
        return self.start.prompt_tokens if self.start is not None else 0

    @property
    def over(self) -> bool:
        """The answer ends here, and its readers are told so: it is not merely handed over."""
        return self.ended and self.end != "handed-over"

    @property
    def leaving(self) -> bool:
        """Nothing more is decoded for it."""
        return bool(self.end or self.failure)

    def prepare(
        self,
        start: SequenceStart,
        texts: Iterable[str],
        logprobs: Iterable[TokenLogprobs] = (),
        vectors: Iterable[bytes] = (),
    ) -> None:
        """Everything is known that the engine needs. What is durable from earlier attempts counts as such here."""
        self.start = start
        self.tokens, self.texts = list(start.generated), list(texts)
        assert len(self.tokens) == len(self.texts) == self.effect.position, "one text for each earlier token"
        if start.sampling.logprobs >= 0:
            self.logprobs = list(logprobs)
            assert len(self.logprobs) == len(self.tokens), "logprobs for each earlier token"
        if start.inputs:
            self.vectors = list(vectors)
            assert len(self.vectors) == len(self.tokens), "a vector for each earlier input"
        self.durable = len(self.tokens)
        self.digest = tokens_digest(self.tokens)

    def acknowledge(self, part: PageSequence, sequence: int) -> None:
        """The page with this part is durable at `sequence` of TOKENS."""
        assert part.position == self.durable, "pages are acknowledged in order"
        self.durable += len(part.tokens)
        self.digest = tokens_digest(part.tokens, self.digest)
        self.first_page = self.first_page or sequence
        self.last_page = sequence
        self.ended = part.end != ""

    def finished(self, now: float) -> SequenceFinished:
        prefill = max(0.0, self.first_token_at - self.arrived) if self.first_token_at else 0.0
        return SequenceFinished(
            request=self.effect.request,
            attempt=self.effect.attempt,
            reason=self.end,
            first=self.effect.position,
            next=self.durable,
            first_page=self.first_page,
            last_page=self.last_page,
            prompt_tokens=self.prompt_tokens,
            tokens_digest=self.digest,
            prefill_ns=int(prefill * 1e9),
            total_ns=int(max(0.0, now - self.arrived) * 1e9),
        )

    def released(self) -> SequenceReleased:
        return SequenceReleased(
            request=self.effect.request,
            attempt=self.effect.attempt,
            first=self.effect.position,
            next=self.durable,
            first_page=self.first_page,
            last_page=self.last_page,
            prompt_tokens=self.prompt_tokens,
            tokens_digest=self.digest,
        )

    def failed(self) -> SequenceFailed:
        return SequenceFailed(
            request=self.effect.request,
            attempt=self.effect.attempt,
            reason=self.failure[:4000],
            first=self.effect.position,
            next=self.durable,
            first_page=self.first_page,
            last_page=self.last_page,
        )

    def progress(self) -> SequenceProgress:
        return SequenceProgress(self.effect.request, self.effect.attempt, self.durable, self.digest, self.prompt_tokens)


class PageEntry(NamedTuple):
    """What a page says of one sequence."""

    sequence: HeldSequence
    part: PageSequence


class Batch:
    """What one step led to: entries for the next page, and sequences that failed."""

    def __init__(self) -> None:
        self.entries: list[PageEntry] = []
        self.failed: list[HeldSequence] = []

    def __bool__(self) -> bool:
        return bool(self.entries or self.failed)

    def add(
        self,
        sequence: HeldSequence,
        tokens: tuple[int, ...],
        texts: tuple[str, ...],
        end: PageEnd,
        logprobs: tuple[TokenLogprobs, ...] = (),
        vectors: tuple[bytes, ...] = (),
    ) -> None:
        """The next positions of a sequence, and how it ended with them if it did."""
        position = len(sequence.tokens)
        sequence.tokens += tokens
        sequence.texts += texts
        sequence.logprobs += logprobs
        sequence.vectors += vectors
        sequence.end = end
        part = PageSequence(
            request=sequence.effect.request,
            attempt=sequence.effect.attempt,
            position=position,
            tokens=tokens,
            texts=texts,
            end=end,
            prompt_tokens=sequence.prompt_tokens if end else 0,
            logprobs=logprobs,
            vectors=vectors,
        )
        self.entries.append(PageEntry(sequence, part))

    def fail(self, sequence: HeldSequence, reason: str) -> None:
        sequence.failure = reason
        self.failed.append(sequence)


def split_pages(entries: list[PageEntry], page: int) -> list[tuple[bytes, list[PageEntry]]]:
    """The entries as encoded pages, counted from `page`: one, or several where one would be too large."""
    payload = encode_page(Page(page, tuple(entry.part for entry in entries)))
    if len(payload) <= PAGE_LIMIT_BYTES or len(entries) == 1:
        return [(payload, entries)]
    middle = len(entries) // 2
    first = split_pages(entries[:middle], page)
    return first + split_pages(entries[middle:], page + len(first))
