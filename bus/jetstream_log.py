"""A `Log` on a JetStream stream: pipelined appends with a time-out of their own, single reads, usage.

nats-py's own asynchronous publishing never gives up on an acknowledgement and keeps what it waits for through a
lost connection, so acknowledgements are matched here: one inbox per log, one future per append.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Sequence

import msgspec

from bus.connection import Connection
from bus.contract import (
    Appended,
    BusError,
    LogFull,
    NoAnswer,
    NoResponders,
    NotTaken,
    Reader,
    Record,
    Usage,
    WrongLastSequence,
)
from bus.jetstream_api import STREAM_NOT_FOUND, ApiError, call, get_direct, get_message, stream_info
from bus.jetstream_reader import JetStreamReader
from bus.wire import append_headers, status

WINDOW_MESSAGES = 2048
WINDOW_BYTES = 16 * 1024 * 1024
"""Appends on the way at once. The server refuses, out of order, what exceeds its own bounds (10,000 messages)."""
REFUSAL_SECONDS = 0.25
"""How long an append that reached no stream is held back before it fails, so that repeating it is no busy loop."""

_WRONG_LAST = (10071, 10164)
_IN_PROCESS = 10158
"""A cluster has not decided yet about a message with the same id: it may come to be stored, or not."""
_FULL_CODES = (10023, 10028, 10047, 10077)
_FULL_WORDS = ("maximum bytes", "maximum messages", "insufficient", "resource limits", "no space")


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    duplicate: bool = False
    error: _Error | None = None


class _Append:
    """One append between `send` and its answer."""

    __slots__ = ("deadline", "doubted", "frame", "future", "subject", "token")

    def __init__(self, future: asyncio.Future[Appended], token: int, frame: bytes, subject: str) -> None:
        self.future = future
        self.token = token
        self.frame = frame
        self.subject = subject
        self.deadline = 0.0
        self.doubted = False


class JetStreamLog:
    """One stream. Make it with `JetStreamLog.open`; see `bus.contract.Log` for the promises."""

    def __init__(self, connection: Connection, stream: str, ack_timeout: float) -> None:
        self.stream = stream
        self._connection = connection
        self._ack_timeout = ack_timeout
        self._inbox = connection.new_inbox() + "."
        self._next_token = 0
        self._flying: dict[int, _Append] = {}
        self._flying_bytes = 0
        self._waiting: deque[_Append] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._decode = msgspec.json.Decoder(_Ack).decode

    @classmethod
    async def open(cls, connection: Connection, stream: str, ack_timeout: float) -> JetStreamLog:
        log = cls(connection, stream, ack_timeout)
        await connection.hook(log._inbox + "*", log._acknowledged)
        connection.listen(log)
        return log

    # appending
    def send(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        publisher: str = "",
    ) -> asyncio.Future[Appended]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Appended] = loop.create_future()
        connection = self._connection
        self._next_token += 1
        try:
            frame = connection.frame(
                subject,
                payload,
                reply=f"{self._inbox}{self._next_token}",
                headers=append_headers(message_id, expected_last, publisher),
            )
        except (BusError, ValueError) as error:
            future.set_exception(BusError(str(error)))
            return future
        append = _Append(future, self._next_token, frame, subject)
        if not connection.is_connected:
            self._fail_soon(append, f"no connection to {connection.url}", taken=False)
        elif self._waiting or not self._has_room():
            self._waiting.append(append)
        else:
            self._write(append)
        return future

    async def append(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        publisher: str = "",
    ) -> Appended:
        return await self.send(
            subject, payload, message_id=message_id, expected_last=expected_last, publisher=publisher
        )

    def _has_room(self) -> bool:
        return len(self._flying) < WINDOW_MESSAGES and self._flying_bytes < WINDOW_BYTES

    def _write(self, append: _Append) -> None:
        loop = asyncio.get_running_loop()
        append.deadline = loop.time() + self._ack_timeout
        self._flying[append.token] = append
        self._flying_bytes += len(append.frame)
        self._connection.write(append.frame)
        if self._timer is None:
            self._timer = loop.call_at(append.deadline, self._expire)

    def _pump(self) -> None:
        while self._waiting and self._has_room():
            append = self._waiting.popleft()
            if not append.future.done():
                self._write(append)

    def _acknowledged(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        append = self._flying.pop(int(subject[len(self._inbox) :]), None)
        if append is None:
            return
        self._flying_bytes -= len(append.frame)
        if self._waiting:
            self._pump()
        future = append.future
        if future.done():
            return
        if not payload and status(headers) == 503:
            self._fail_soon(append, f"no stream takes {append.subject} at {self._connection.url}", taken=False)
            self._lost_leader(append.token)
            return
        ack = self._decode(payload)
        if ack.error is None:
            future.set_result(Appended(ack.seq, ack.duplicate))
        else:
            self._refuse(append, ack.error)

    def _lost_leader(self, token: int) -> None:
        """Nobody takes messages of this stream now: what was sent before and is not answered soon went to who did."""
        older = [one for number, one in self._flying.items() if number < token and not one.doubted]
        for one in older:
            one.doubted = True
        if older:
            asyncio.get_running_loop().call_later(min(REFUSAL_SECONDS, self._ack_timeout), self._give_up, older)

    def _give_up(self, doubted: list[_Append]) -> None:
        for append in doubted:
            if self._flying.pop(append.token, None) is not None:
                self._flying_bytes -= len(append.frame)
                self._fail(append, "the stream has lost its leader")
        self._pump()

    def _refuse(self, append: _Append, error: _Error) -> None:
        if error.err_code in _WRONG_LAST:
            append.future.set_exception(
                WrongLastSequence(f"{append.subject} has moved on: {error.description or 'wrong last sequence'}")
            )
        elif error.err_code in _FULL_CODES or any(words in error.description for words in _FULL_WORDS):
            append.future.set_exception(
                LogFull(f"stream {self.stream} is full ({error.description}): raise its limit or shorten its retention")
            )
        elif error.code >= 500 or error.code == 429 or error.err_code == _IN_PROCESS:
            # A server that cannot does not know what others of its cluster have done: never "not stored".
            self._fail_soon(append, f"stream {self.stream} is not ready ({error.description})")
        else:
            append.future.set_exception(
                BusError(f"stream {self.stream} refuses a message on {append.subject}: {error.description}")
            )

    # giving up
    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        # Insertion order is deadline order: everyone waits equally long.
        while self._flying:
            token, append = next(iter(self._flying.items()))
            if append.deadline > now:
                self._timer = loop.call_at(append.deadline, self._expire)
                break
            del self._flying[token]
            self._flying_bytes -= len(append.frame)
            self._fail(append, f"no acknowledgement within {self._ack_timeout:g} s")
        self._pump()

    def _fail(self, append: _Append, reason: str, *, taken: bool = True) -> None:
        if append.future.done():
            return
        if taken:
            error = NoAnswer(f"{reason}: whether {append.subject} is stored in {self.stream} is not known")
        else:
            error = NotTaken(f"{reason}: it is not stored in {self.stream}")
        append.future.set_exception(error)

    def _fail_soon(self, append: _Append, reason: str, *, taken: bool = True) -> None:
        fail = functools.partial(self._fail, append, reason, taken=taken)
        asyncio.get_running_loop().call_later(min(REFUSAL_SECONDS, self._ack_timeout), fail)

    def _fail_all(self, reason: str) -> None:
        # What waits behind a lost append must not overtake its repetition.
        given_up = [*self._flying.values(), *self._waiting]
        self._flying.clear()
        self._waiting.clear()
        self._flying_bytes = 0
        for append in given_up:
            self._fail(append, reason)

    def lost(self) -> None:
        self._fail_all(f"the connection to {self._connection.url} was lost")

    def restored(self) -> None:
        pass

    def closed(self) -> None:
        self._fail_all(f"the connection to {self._connection.url} was closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def forbidden(self, subject: str) -> None:
        for token, append in list(self._flying.items()):
            if append.subject.lower() == subject:
                del self._flying[token]
                self._flying_bytes -= len(append.frame)
                if not append.future.done():
                    append.future.set_exception(self._connection.not_allowed(append.subject))
        self._pump()

    # reading
    async def read(self, filters: Sequence[str] = (), *, start: int = 1) -> Reader:
        return await JetStreamReader.open(self._connection, self.stream, filters, start)

    async def get(self, sequence: int) -> Record | None:
        """See the contract. Raises `NoAnswer` while no server answers."""
        if sequence < 1:
            return None
        try:
            record = await get_direct(self._connection, self.stream, sequence)
        except NoResponders:  # a stream without direct access
            record = None
        if record is not None and record.sequence == sequence:
            return record
        return await get_message(self._connection, self.stream, {"seq": sequence})

    async def last(self, subject: str) -> Record | None:
        """See the contract. Asks the stream's leader: a replica could be behind. Raises `NoAnswer` as `get` does."""
        return await get_message(self._connection, self.stream, {"last_by_subj": subject})

    async def drop(self, before: int) -> None:
        await call(self._connection, f"STREAM.PURGE.{self.stream}", {"seq": before})

    async def usage(self) -> Usage:
        try:
            info = await stream_info(self._connection, self.stream)
        except ApiError as error:
            if error.code == STREAM_NOT_FOUND:
                raise BusError(
                    f"stream {self.stream} does not exist at {self._connection.url}: start the cell with `longshore up`"
                ) from None
            raise
        state = info["state"]
        return Usage(
            messages=state["messages"],
            stored_bytes=state["bytes"],
            limit_bytes=max(0, info["config"].get("max_bytes", 0)),
            first_sequence=state["first_seq"],
            last_sequence=state["last_seq"],
            max_age_ns=max(0, info["config"].get("max_age", 0)),
        )
