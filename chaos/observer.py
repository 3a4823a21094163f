"""Sees everything while a simulated world runs: each stored record, each published chunk, each position read.

It is told by the server (every record, in order, at the moment of its storing), by the buses (every core message, at
the moment of its publishing) and by the readers; what it holds against each other is in `chaos.promises`.
"""

from __future__ import annotations

from collections.abc import Callable

from bus.contract import Record
from bus.logprobs import TokenLogprobs
from bus.pages import Page, PageSequence, Seal, decode_page
from bus.replies import Chunk, Result, decode_reply
from chaos.promises import Promise, Violations


class Answer:
    """What is durable of one request, as TOKENS tells it. `ends`: (attempt, how) of the pages that end one."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.vectors: list[bytes] = []
        self.attempt = 0
        self.ends: list[tuple[int, str]] = []


class Observer:
    """`clock` gives virtual seconds."""

    def __init__(self, violations: Violations, clock: Callable[[], float]) -> None:
        self.answers: dict[str, Answer] = {}
        self.choices: dict[tuple[str, int], str] = {}
        """The id inside the cell of one of several answers, by the request's id and its number."""
        self.records: list[Record] = []
        self.pages: list[Record] = []
        self.shown = 0
        self.early: list[str] = []
        """Streams of several answers that were ended before each of these was: only faults excuse that."""
        self._streams: dict[str, dict[str, bool]] = {}
        self._violations = violations
        self._clock = clock
        self._sealed: dict[str, int] = {}
        self._page_counts: dict[str, int] = {}

    def attempt(self, request: str) -> int:
        """The latest attempt of which a page is durable; 0 for none."""
        return self.answers.get(request, _NOTHING).attempt

    def violation(self, promise: Promise, text: str) -> None:
        self._violations.add(promise, self._clock(), text)

    # ---- what is stored ---------------------------------------------------------------------------------------

    def stored(self, log: str, record: Record) -> None:
        if log == "ledger":
            self.records.append(record)
            return
        self.pages.append(record)
        if record.subject in self._sealed:
            where = f"{record.subject}, sealed at {self._sealed[record.subject]}, took {record.sequence}"
            self.violation(Promise.SEALED, where)
        page = decode_page(record.payload)
        if isinstance(page, Seal):
            self._sealed[record.subject] = record.sequence
            return
        self._count(record, page)
        for part in page.sequences:
            self._part(record, part)

    def _count(self, record: Record, page: Page) -> None:
        expected = self._page_counts.get(record.subject, page.page)
        if page.page != expected:
            self.violation(Promise.NO_HOLES, f"page {page.page} of {record.subject} where {expected} is next")
        self._page_counts[record.subject] = page.page + 1

    def _part(self, record: Record, part: PageSequence) -> None:
        answer = self.answers.setdefault(part.request, Answer())
        where = f"request {part.request}, attempt {part.attempt}, TOKENS {record.sequence}"
        durable = len(answer.tokens)
        if part.position < durable:
            again = list(part.tokens) == answer.tokens[part.position : part.position + len(part.tokens)]
            how = "is stored once more" if again else "is stored with another token"
            self.violation(Promise.NEVER_CHANGES, f"{where}: position {part.position} {how}")
            return
        if part.position > durable:
            self.violation(Promise.IN_ORDER, f"{where}: position {part.position} is stored, {durable} is missing")
            return
        if part.attempt < answer.attempt:
            self.violation(Promise.SEALED, f"{where}: attempt {answer.attempt} has stored a page already")
        answer.attempt = max(answer.attempt, part.attempt)
        answer.tokens += part.tokens
        answer.texts += part.texts
        answer.logprobs += part.logprobs
        answer.vectors += part.vectors
        if part.end:
            answer.ends.append((part.attempt, part.end))

    # ---- what is shown ----------------------------------------------------------------------------------------

    def published(self, process: str, subject: str, payload: bytes) -> None:
        if not subject.startswith("_INBOX."):
            return
        if not payload:
            open_ones = [member for member, ended in self._streams.get(subject, {}).items() if not ended]
            if open_ones:
                self.early.append(f"{process} says the last word on {subject} before the ends of {open_ones}")
            return
        try:
            reply = decode_reply(payload, "json" if payload[:1] == b"{" else "msgpack")
        except ValueError:
            return  # heartbeats' and operators' answers have forms of their own
        if isinstance(reply, Chunk):
            self.shown += 1
            self._durable(process, reply)
            self._note_end(subject, reply)
            if reply.end in ("stop", "length"):
                self._ends(process, self._member(reply), reply.next, reply.end)
        elif isinstance(reply, Result) and reply.status == "ended" and reply.error is None:
            whole = Chunk(reply.request, 0, reply.tokens, reply.text, logprobs=reply.logprobs, vectors=reply.vectors)
            for chunk in reply.choices or (whole,):
                self._durable(process, chunk)

    def _note_end(self, subject: str, chunk: Chunk) -> None:
        of = [member for (request, _), member in self.choices.items() if request == chunk.request]
        if len(of) > 1:
            stream = self._streams.setdefault(subject, dict.fromkeys(of, False))
            stream[self._member(chunk)] |= bool(chunk.end)

    def _member(self, chunk: Chunk) -> str:
        return self.choices.get((chunk.request, chunk.choice), chunk.request)

    def _durable(self, process: str, chunk: Chunk) -> None:
        request, position, tokens, text = self._member(chunk), chunk.position, chunk.tokens, chunk.text
        answer = self.answers.get(request, _NOTHING)
        end = position + len(tokens)
        if end > len(answer.tokens):
            what = f"{process} shows positions up to {end} of {request}, durable are {len(answer.tokens)}"
            self.violation(Promise.DURABLE_FIRST, what)
        elif list(tokens) != answer.tokens[position:end]:
            what = f"{process} shows {tokens} at {position} of {request}, durable is {answer.tokens[position:end]}"
            self.violation(Promise.NEVER_CHANGES, what)
        elif text != "".join(answer.texts[position:end]):
            what = f"{process} shows the text {text!r} at {position} of {request}, durable is another"
            self.violation(Promise.NEVER_CHANGES, what)
        elif list(chunk.logprobs) != answer.logprobs[position:end]:
            what = f"{process} shows other logprobs at {position} of {request} than are durable"
            self.violation(Promise.NEVER_CHANGES, what)
        elif list(chunk.vectors) != answer.vectors[position:end]:
            what = f"{process} shows {len(chunk.vectors)} vectors at {position} of {request}, durable are others"
            self.violation(Promise.NEVER_CHANGES, what)

    def _ends(self, process: str, request: str, positions: int, end: str) -> None:
        answer = self.answers.get(request, _NOTHING)
        if positions != len(answer.tokens) or end not in [how for _, how in answer.ends]:
            what = f"{process} shows the end {end!r} of {request} behind {positions} positions, durable are "
            self.violation(Promise.DURABLE_FIRST, f"{what}{len(answer.tokens)} and the ends {answer.ends}")

    # ---- what is read -----------------------------------------------------------------------------------------

    def read(self, reader: str, expected: int, chunk: Chunk) -> int:
        """An application was given a chunk while it expected this position. Returns what it expects next."""
        if chunk.position != expected:
            what = f"{reader} expected position {expected} of {chunk.request} and was given {chunk.position}"
            self.violation(Promise.IN_ORDER, what)
        self._durable(reader, chunk)
        return chunk.next


_NOTHING = Answer()
