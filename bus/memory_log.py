"""The `Log` and `Reader` that a process of the in-memory world holds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from bus.contract import Appended, BusError, LogChanged, NoAnswer, Record, Usage
from bus.memory_faults import Faults
from bus.memory_stream import MemoryStream, Pipe, subject_matches
from bus.wire import MAX_PAYLOAD, append_headers, publish_frame

REFUSAL_SECONDS = 0.25
"""How long an append fails after, while there is no connection."""


class Line(Protocol):
    """The connection, as logs and readers see it."""

    up: Pipe
    down: Pipe
    faults: Faults
    dead: bool
    ended: bool
    connected: bool

    async def wait_connected(self) -> None: ...

    async def round_trip(self, what: str) -> None: ...


class MemoryLog:
    """See `bus.contract.Log`."""

    def __init__(self, line: Line, stream: MemoryStream, ack_timeout: float) -> None:
        self.stream = stream
        self._line = line
        self._ack_timeout = ack_timeout
        self._next_token = 0
        self._flying: dict[int, tuple[asyncio.Future[Appended], asyncio.TimerHandle, str]] = {}
        self._readers: dict[int, MemoryReader] = {}

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
        line = self._line
        future: asyncio.Future[Appended] = loop.create_future()
        if line.dead:
            return future
        try:
            headers = append_headers(message_id, expected_last, publisher)
            publish_frame(subject, "", headers, b"")
            check_size(subject, len(headers), payload)
        except (BusError, ValueError) as error:
            future.set_exception(BusError(str(error)))
            return future
        if not line.connected:
            loop.call_later(min(REFUSAL_SECONDS, self._ack_timeout), self._fail, future, subject, "no connection")
            return future
        self._next_token += 1
        token = self._next_token
        self._flying[token] = (future, loop.call_later(self._ack_timeout, self._expire, token), subject)
        fate = line.faults.append(self.stream.log, subject, message_id)
        if not fate.stored:
            return future

        def arrive() -> None:
            answer: Appended | BusError
            try:
                answer = self.stream.append(
                    subject,
                    payload,
                    header_bytes=len(headers),
                    message_id=message_id,
                    expected_last=expected_last,
                    publisher=publisher,
                )
                if fate.repeated and not answer.duplicate and expected_last is None:
                    self.stream.append(subject, payload, header_bytes=len(headers), publisher=publisher)
            except BusError as error:
                answer = error
            # Storing may have ended this process: an observer kills at message k.
            if fate.acknowledged and not line.dead and line.connected:
                line.down.put(fate.acknowledgement_delay, lambda: self._answered(token, answer))

        line.up.put(fate.delay, arrive)
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

    def _answered(self, token: int, answer: Appended | BusError) -> None:
        waiting = self._flying.pop(token, None)
        if waiting is None:
            return
        future, timer, _ = waiting
        timer.cancel()
        if future.done():
            return
        if isinstance(answer, BusError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _expire(self, token: int) -> None:
        waiting = self._flying.pop(token, None)
        if waiting is not None:
            self._fail(waiting[0], waiting[2], f"no acknowledgement within {self._ack_timeout:g} s")

    def _fail(self, future: asyncio.Future[Appended], subject: str, reason: str) -> None:
        if not future.done() and not self._line.dead:
            future.set_exception(NoAnswer(f"{reason}: whether {subject} is stored in {self.stream.name} is not known"))

    async def read(self, filters: Sequence[str] = (), *, start: int = 1) -> MemoryReader:
        await self._line.wait_connected()
        reader = MemoryReader(self._line, self.stream, filters, start, self._readers.pop)
        self._readers[reader.number] = reader
        return reader

    async def get(self, sequence: int) -> Record | None:
        await self._line.round_trip(self.stream.name)
        return self.stream.get(sequence)

    async def last(self, subject: str) -> Record | None:
        await self._line.round_trip(self.stream.name)
        return self.stream.last(subject)

    async def usage(self) -> Usage:
        await self._line.round_trip(self.stream.name)
        return self.stream.usage()

    async def drop(self, before: int) -> None:
        await self._line.round_trip(self.stream.name)
        self.stream.drop(before)

    # the connection's news
    def lost(self, reason: str) -> None:
        waiting = list(self._flying.values())
        self._flying.clear()
        for future, timer, subject in waiting:
            timer.cancel()
            self._fail(future, subject, reason)
        for reader in list(self._readers.values()):
            reader.lost()

    def restored(self) -> None:
        for reader in list(self._readers.values()):
            reader.resume()

    def ended(self) -> None:
        """The connection was closed (readers say so) or its process is dead (nobody says anything any more)."""
        if self._line.dead:
            for _, timer, _ in self._flying.values():
                timer.cancel()
            self._flying.clear()
        else:
            self.lost("the connection was closed")
        for reader in list(self._readers.values()):
            reader.end(BusError("the connection is closed"))


class MemoryReader:
    """See `bus.contract.Reader`."""

    def __init__(
        self,
        line: Line,
        stream: MemoryStream,
        filters: Sequence[str],
        start: int,
        forget: Callable[[int, None], object],
    ) -> None:
        self._line = line
        self._stream = stream
        self._filters = list(filters)
        self._wanted: dict[str, bool] = {}
        self._forget = forget
        self._pipe = Pipe()
        self._position = max(0, start - 1)
        self._anchor = stream.get(self._position)
        self._beyond_end = self._position > stream.last_sequence
        self._hidden: deque[int] = deque()
        self._ready: deque[Record] = deque()
        self._error: BusError | None = None
        self._missed = 0
        self._waiter: asyncio.Future[None] | None = None
        self.number = stream.watch(self)
        self._catch_up()

    async def batch(self, limit: int = 512) -> list[Record]:
        while True:
            if self._error is not None:
                raise self._error
            if self._ready:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    async def close(self) -> None:
        self.end(BusError(f"this reader of {self._stream.name} is closed"))

    def end(self, error: BusError) -> None:
        self._stream.unwatch(self.number)
        self._forget(self.number, None)
        self._pipe.clear()
        if not self._line.dead:
            self._fail(error)

    def _wants(self, subject: str) -> bool:
        wanted = self._wanted.get(subject)
        if wanted is None:
            wanted = not self._filters or any(subject_matches(pattern, subject) for pattern in self._filters)
            self._wanted[subject] = wanted
        return wanted

    # what the stream says
    def appended(self, record: Record) -> None:
        if record.sequence <= self._position or not self._wants(record.subject):
            return
        self._hidden.append(record.sequence)
        if self._line.connected:
            self._show_later(self._line.faults.deliver(self._stream.log, record), record.sequence)

    def replaced(self) -> None:
        if self._line.connected:
            self.resume()

    def dropping(self, records: list[Record]) -> None:
        if any(record.sequence > self._position and self._wants(record.subject) for record in records):
            self._missed = records[-1].sequence

    # what the connection says
    def lost(self) -> None:
        self._pipe.clear()

    def resume(self) -> None:
        """Compare what was taken with what the stream holds, then go on behind it."""
        self._pipe.clear()
        error = self._difference()
        if error is None:
            self._catch_up()
        else:
            self._fail(error)

    def _catch_up(self) -> None:
        behind = self._stream.since(self._position + 1)
        self._hidden = deque(record.sequence for record in behind if self._wants(record.subject))
        if self._hidden:
            self._show_later(0.0, self._hidden[-1])

    def _difference(self) -> LogChanged | None:
        name, position, anchor = self._stream.name, self._position, self._anchor
        if self._missed:
            return dropped(name, self._missed, position)
        if self._stream.last_sequence < position and not (self._beyond_end and anchor is None):
            return LogChanged(
                f"stream {name} ends at {self._stream.last_sequence}, but it was read up to {position}: "
                "it was restored or created anew"
            )
        if anchor is None:
            return None
        now = self._stream.get(anchor.sequence)
        if anchor.sequence < self._stream.first_sequence:  # expired since
            return None
        if now is None or now[:4] != anchor[:4]:
            return LogChanged(
                f"stream {name} holds something else at {anchor.sequence} than what was read there: "
                "it was restored or created anew"
            )
        return None

    def _show_later(self, delay: float, sequence: int) -> None:
        self._pipe.put(delay, lambda: self._show(sequence))

    def _show(self, sequence: int) -> None:
        """Everything up to a sequence has arrived."""
        while self._hidden and self._hidden[0] <= sequence:
            record = self._stream.get(self._hidden.popleft())
            if record is None and self._missed:
                self._fail(dropped(self._stream.name, self._missed, self._position))
                return
            if record is None:  # expired before it was delivered
                continue
            self._position = record.sequence
            self._anchor = record
            self._ready.append(record._replace(pending=len(self._hidden)))
        if self._ready and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: BusError) -> None:
        if self._error is None:
            self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def dropped(name: str, last: int, position: int) -> LogChanged:
    return LogChanged(f"the beginning of {name} up to {last} was given up while a reader of it stood at {position}")


def check_size(subject: str, header_bytes: int, payload: bytes) -> None:
    """Raise `BusError` where a message is larger than a server takes."""
    size = header_bytes + len(payload)
    if size > MAX_PAYLOAD:
        raise BusError(f"a message of {size} bytes on {subject} is over the server's limit of {MAX_PAYLOAD} bytes")
