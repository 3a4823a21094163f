"""One answer as its reader wants it: every position once and in order, whatever happens on the way.

What goes wrong, and what is done about it:

* no answer to the request, or `unknown`        repeat it with the same key: the cell knows it by that
* a hole, a lost last chunk, silence, reconnect  ask `resume.<request>` for the first missing position
* repeats and overlaps                           dropped and cut (`bus.reassembly`)
* a reader slower than the cell                  what finds no room is dropped, and asked for when it is wanted
* nobody listens, or nobody says anything        `RequestFailed` once patience is over

Questions repeat after 50 ms, doubling up to 30 s while no new position comes, or to what a refusal says about coming
again; silence alone asks after `silence`, no answer at all after `unanswered`.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType

from bus.contract import Bus, BusError, Delivery, Inbox
from bus.messages.requests import Encoding
from bus.reassembly import Choices
from bus.replies import (
    Chunk,
    ChunkEnd,
    ErrorBody,
    Result,
    Status,
    TokenCounts,
    counted,
    decode_reply,
    end_of_all,
    merged,
)

FIRST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 30.0
GRACE_SECONDS = 5.0
"""So long after its acceptance a request may be unknown to a replica that is behind."""
UNREAD_LIMIT = 4096
UNREAD_LIMIT_BYTES = 16 << 20
"""What waits for a slow reader of one answer, at most."""
_LOOK_SECONDS = 0.5


class RequestFailed(Exception):
    """A request that did not end well: `code` is a name, `message` one sentence, `retry_ms` when to come again (0:
    repeating is of no use, or may be done at any time).

    `code` is one of the contract's (`queue_full`, `bad_request`, ...), or one of the library's own: `no_answer` (nobody
    said anything), `no_connection`, `timeout` (the caller's own), `bad_reply`, `bus`.
    """

    def __init__(self, code: str, message: str, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_ms = retry_ms


@dataclass(frozen=True, slots=True)
class Patience:
    """In seconds: `unanswered` until a question without any answer is repeated (who took it may be dead), `silence`
    until one asks again, `nobody` until no listener means that there is none, `total` at most without a word."""

    unanswered: float = 0.5
    silence: float = 2.0
    nobody: float = 5.0
    total: float = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """How to ask for an answer from a position on: where, with which body, and after what (which may be repeated)."""

    subject: str
    body: Callable[[int], bytes]
    headers: dict[str, str]
    before: Callable[[], Awaitable[None]] | None = None


class Answer:
    """The chunks of one request, in order: `async for chunk in answer`. It asks when iteration begins.

    The last chunk carries `end` and `usage`. With `n` above 1 the chunks of its answers come mixed, each answer in
    order (`choice` says which) and with an end of its own; this object's `end` and `usage` are those of all together,
    after the last. An answer that ends as failed or quarantined raises `RequestFailed` after its last position. Use it
    as `async with` where you may leave early; with `cancel_on_close` the request then ends, too. One that is let go of
    half read is not read any further, and takes no more memory. One task reads it.
    """

    def __init__(
        self,
        bus: Bus,
        request_id: str,
        *,
        first: Question | None,
        resume: Question,
        start: int,
        choices: int = 1,
        encoding: Encoding,
        patience: Patience,
        cancel: Callable[[], Awaitable[object]],
        cancel_on_close: bool = False,
        timeout: float | None = None,
        fresh: bool = False,
        closed: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        self.request_id = request_id
        self.end: ChunkEnd = ""
        self.usage: TokenCounts | None = None
        self.questions = 0
        self._bus = bus
        self._first = first
        self._resume = resume
        self._encoding = encoding
        self._patience = patience
        self._cancel = cancel
        self._cancel_on_close = cancel_on_close
        self._timeout = timeout
        self._limit = float("inf")
        self._tell_closed = closed
        self._positions = Choices(start, choices)
        self._ends: dict[int, Chunk] = {}
        self._ready: deque[Chunk] = deque()
        self._failure: ErrorBody | None = None
        self._inbox: Inbox | None = None
        self._dropped = 0
        self._accepted = first is None
        self._forgiving = fresh or first is not None
        self._done = False
        self._heard = self._moved = self._asked = self._taken = 0.0
        self._absent_since = -1.0
        self._answered = False
        self._excuse: ErrorBody | None = None
        self._wait = FIRST_WAIT_SECONDS
        self._prompted = False
        self._connections = 0

    @property
    def position(self) -> int:
        """The first position not yet seen (with several answers: that one of them still misses)."""
        return min([self._positions.next, *(chunk.position for chunk in self._ready)])

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk. Raises `RequestFailed`."""
        try:
            while not self._ready:
                if self._done or self._positions.ended:
                    await self._finish()
                await self._step()
        except (StopAsyncIteration, RequestFailed):
            raise
        except BusError as error:
            await self._fail("bus", f"request {self.request_id} cannot be read: {error}")
        except BaseException:
            await self.aclose()
            raise
        return self._ready.popleft()

    async def batch(self, wait: float) -> list[Chunk]:
        """All chunks that have come; nothing where none comes for `wait` seconds. Nothing follows the one with `end`.

        That one says how it ended; `RequestFailed` is raised where the answer cannot be had.
        """
        now = asyncio.get_running_loop().time
        until = now() + wait
        while not self._ready and not self._done and now() < until:
            await self._step()
        chunks = list(self._ready)
        self._ready.clear()
        return chunks

    async def _finish(self) -> None:
        """Nothing is left: close, and say how it ended."""
        first_time = not self._done
        self._done = True
        await self._close()
        if self._failure is not None and first_time:
            raise RequestFailed(self._failure.code, self._failure.message, self._failure.retry_ms)
        raise StopAsyncIteration

    async def text(self) -> str:
        """All that is left of the answer, as one text."""
        return "".join([chunk.text async for chunk in self])

    async def whole(self) -> Result:
        """All that is left of the answer, with its tokens, its end and its usage; of several answers, its `choices`."""
        chunks = [chunk async for chunk in self]
        if len(self._ends) > 1:
            choices = [[chunk for chunk in chunks if chunk.choice == choice] for choice in sorted(self._ends)]
            positions = sum(part[-1].next for part in choices if part)
            return Result(
                "ended",
                self.request_id,
                positions,
                self.end,
                usage=self.usage,
                choices=tuple(merged(part) for part in choices if part),
            )
        return Result(
            "ended",
            self.request_id,
            self.position,
            end=self.end,
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            usage=self.usage,
            logprobs=tuple(one for chunk in chunks for one in chunk.logprobs),
        )

    async def cancel(self) -> None:
        """Have the request ended in the cell. Go on reading: its last chunk then says `cancelled`."""
        await self._cancel()

    # asking
    async def _step(self) -> None:
        now = asyncio.get_running_loop().time
        if self._inbox is None:
            self._inbox = await self._bus.open_inbox(limit=UNREAD_LIMIT, limit_bytes=UNREAD_LIMIT_BYTES)
            self._abandoned = weakref.finalize(self, self._inbox.leave)
            self._connections = self._bus.connections
            self._heard = self._moved = self._taken = now()
            if self._timeout is not None:
                self._limit = now() + self._timeout
            await self._ask()
        elif self._bus.connections != self._connections:
            self._connections = self._bus.connections
            self._wait = FIRST_WAIT_SECONDS
            self._prompted = True
        due = max(self._asked, self._moved) + max(self._patience.silence, self._wait)
        if self._heard <= self._asked:
            due = min(due, self._asked + max(self._patience.unanswered, self._wait))
        if self._inbox.dropped != self._dropped and not self._inbox.unread:
            self._dropped = self._inbox.dropped
            self._prompted = True
        if self._prompted or self._positions.hole:
            due = min(due, self._asked + self._wait)
        if now() >= self._limit:
            await self._time_out()
        if now() >= due:
            await self._ask()
            return
        try:
            async with asyncio.timeout_at(min(due, self._limit, now() + _LOOK_SECONDS)):
                delivery = await self._inbox.next()
        except TimeoutError:
            await self._check_patience(now())
            return
        await self._take(delivery, now())

    async def _ask(self) -> None:
        question = self._resume if self._accepted or self._first is None else self._first
        self.questions += 1
        self._prompted = False
        self._asked = asyncio.get_running_loop().time()
        if self.questions > 1:
            self._wait = min(self._wait * 2, LONGEST_WAIT_SECONDS)
        assert self._inbox is not None
        if question.before is not None:
            await question.before()
            self._asked = self._heard = asyncio.get_running_loop().time()
        body = question.body(self._positions.next)
        await self._bus.publish(question.subject, body, reply=self._inbox.subject, headers=question.headers)

    async def _time_out(self) -> None:
        if self._cancel_on_close:
            await self._cancel_quietly()
        then = "it is being cancelled" if self._cancel_on_close else "it goes on: resume it, or cancel it"
        await self._fail(
            "timeout",
            f"request {self.request_id} has not ended within {self._timeout:g} s at position "
            f"{self._positions.next}; {then}",
        )

    async def _check_patience(self, now: float) -> None:
        if now - self._heard <= self._patience.total:
            return
        if not self._bus.connected:
            await self._fail(
                "no_connection",
                f"the connection to the NATS server is down, and request {self.request_id} was not heard of for "
                f"{self._patience.total:g} s; it may still run: resume it, or repeat it with the same key",
            )
        last = self._excuse or ErrorBody(
            "no_answer",
            f"the cell said nothing about request {self.request_id} for {self._patience.total:g} s; it may still run: "
            "ask for its result later, or repeat it with the same key",
        )
        await self._fail(last.code, last.message, last.retry_ms)

    async def _fail(self, code: str, message: str, retry_ms: int = 0) -> None:
        self._done = True
        await self._close()
        raise RequestFailed(code, message, retry_ms)

    # hearing
    async def _take(self, delivery: Delivery, now: float) -> None:
        if not delivery.payload:
            await self._take_empty(now)
            return
        try:
            reply = decode_reply(delivery.payload, self._encoding)
        except ValueError as error:
            await self._fail("bad_reply", str(error))
            return
        self._answered = True
        if isinstance(reply, Chunk):
            self._heard = now
            if reply.request == self.request_id:
                self._take_chunk(reply, now)
        elif isinstance(reply, Status):
            await self._take_status(reply, now)

    async def _take_empty(self, now: float) -> None:
        """The end of a stream whose last chunk got lost; before any word, the server's sign that nobody listens."""
        self._prompted = True
        if self._absent_since < 0:
            self._absent_since = now
        elif not self._answered and now - self._absent_since >= self._patience.nobody:
            await self._fail(
                "not_ready",
                f"nobody listens on {self._question_subject}: check the name of the cell, and that it is up",
            )

    @property
    def _question_subject(self) -> str:
        return (self._first or self._resume).subject

    def _take_chunk(self, chunk: Chunk, now: float) -> None:
        self._accept(now)
        ready = self._positions.feed(chunk)
        if not ready:
            return
        self._moved = now
        self._wait = FIRST_WAIT_SECONDS
        last = ready[-1]
        if last.end:
            self._ends[last.choice] = last
            if last.end in ("failed", "quarantined"):
                told = last.error or ErrorBody(last.end, f"request {self.request_id} ended as {last.end}")
                self._failure = self._failure or told
        if self._positions.ended:
            ends = [self._ends[choice] for choice in sorted(self._ends)]
            self.end = end_of_all([chunk.end for chunk in ends])
            self.usage = ends[0].usage if len(ends) == 1 else counted(ends)
        self._ready.extend(ready)

    def _accept(self, now: float) -> None:
        if not self._accepted:
            self._accepted = True
            self._taken = now

    async def _take_status(self, status: Status, now: float) -> None:
        error = status.error or ErrorBody(status.status, f"request {self.request_id} is {status.status}")
        if status.status == "accepted":
            self._heard = now
            self._excuse = None
            self._accept(now)
        elif status.status == "unknown" or self._forgives(error.code, now):
            self._excuse = error
            self._prompted = True
            # Who says when to come again knows better than a doubling how long it may take.
            if error.retry_ms:
                self._wait = min(self._wait, max(FIRST_WAIT_SECONDS, error.retry_ms / 1000))
        else:
            await self._fail(error.code, error.message, error.retry_ms)

    def _forgives(self, code: str, now: float) -> bool:
        """Whether to ask again after this refusal: the request may stand in the ledger all the same."""
        if code == "unknown_request":
            return self._forgiving and now - self._taken < GRACE_SECONDS
        in_doubt = self._first is None or self._accepted or self.questions > 1
        return in_doubt and code in ("not_ready", "ledger_full", "queue_full")

    # leaving
    async def aclose(self) -> None:
        """Stop reading; with `cancel_on_close`, an answer that has not ended is cancelled in the cell."""
        if self._done:
            return
        self._done = True
        ended = self._positions.ended or self._inbox is None
        try:
            if self._cancel_on_close and not ended:
                await asyncio.shield(asyncio.ensure_future(self._cancel_quietly()))
        finally:
            await self._close()

    async def _cancel_quietly(self) -> None:
        try:
            await self._cancel()
        except Exception:
            pass  # the reader is leaving anyway; the deadline and the length end the request otherwise

    async def _close(self) -> None:
        self._tell_closed(self)
        inbox, self._inbox = self._inbox, None
        if inbox is not None:
            self._abandoned.detach()
            await inbox.close()

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
