"""A stream in memory, with the rules of a JetStream one: limits, dedupe, expected sequences, expiry."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

from bus.contract import Appended, BusError, LogFull, Record, Usage, WrongLastSequence

DEDUPE_SECONDS = 120.0


@lru_cache(maxsize=1 << 15)
def subject_matches(pattern: str, subject: str) -> bool:
    """Whether a subject falls under a pattern: `*` stands for one token, a trailing `>` for one or more."""
    if pattern == subject:
        return True
    wanted = pattern.split(".")
    tokens = subject.split(".")
    for i, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > i
        if i >= len(tokens) or (token not in ("*", tokens[i])):
            return False
    return len(wanted) == len(tokens)


class Pipe:
    """One direction of a connection: things happen after their delay, but never before those put in earlier.

    Timers of an event loop that are due at the same moment fire in no promised order; this keeps theirs.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._handle: asyncio.Handle | None = None

    def put(self, delay: float, action: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._queue.append((loop.time() + delay, action))
        if self._handle is None:
            self._arm()

    def clear(self) -> None:
        """Everything on the way is lost."""
        self._queue.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        due = self._queue[0][0]
        self._handle = loop.call_soon(self._run) if due <= loop.time() else loop.call_at(due, self._run)

    def _run(self) -> None:
        self._handle = None
        now = asyncio.get_running_loop().time()
        while self._queue and self._queue[0][0] <= now:
            self._queue.popleft()[1]()
        if self._queue and self._handle is None:
            self._arm()


class Watcher(Protocol):
    """A reader that hears of every record and of a stream that was replaced."""

    def appended(self, record: Record) -> None: ...

    def replaced(self) -> None: ...

    def dropping(self, records: list[Record]) -> None:
        """These are about to be given up."""
        ...


class MemoryStream:
    """Records of one stream. `wall` gives the server's clock in nanoseconds."""

    def __init__(
        self,
        name: str,
        log: str,
        patterns: list[str],
        wall: Callable[[], int],
        *,
        limit_bytes: int = 0,
        max_age_seconds: float = 0.0,
        dedupe_seconds: float = DEDUPE_SECONDS,
        once_per_subject: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self.patterns = patterns
        self.limit_bytes = limit_bytes
        self.max_age_seconds = max_age_seconds
        self.dedupe_seconds = dedupe_seconds
        self.once_per_subject = once_per_subject
        self.observers: list[Callable[[str, Record], None]] = []
        self._wall = wall
        self._watchers: dict[int, Watcher] = {}
        self._next_watcher = 0
        self._clear()

    def _clear(self) -> None:
        self._records: list[Record] = []
        self._sizes: list[int] = []
        self._first = 1
        self._bytes = 0
        self._last_of: dict[str, int] = {}
        self._ids: dict[str, tuple[int, int]] = {}

    # storing
    def append(
        self,
        subject: str,
        payload: bytes,
        *,
        header_bytes: int = 0,
        message_id: str = "",
        expected_last: int | None = None,
        publisher: str = "",
    ) -> Appended:
        """Store a record and tell readers and observers. Raises as `Log.send` says."""
        now = self._wall()
        self._expire(now)
        if not self.takes(subject):
            raise BusError(f"no stream takes {subject}")
        if expected_last is not None:
            # Before the message id, as the server does: a repetition under the same id is refused here.
            last = self._last_of.get(subject, 0)
            if last != expected_last:
                raise WrongLastSequence(f"{subject} has moved on: wrong last sequence: {last}")
        if message_id:
            known = self._ids.get(message_id)
            if known is not None:
                return Appended(known[0], True)
        size = stored_size(subject, header_bytes, payload)
        if self.once_per_subject and subject in self._last_of:
            raise LogFull(f"stream {self.name} is full (maximum messages per subject exceeded)")
        if self.limit_bytes and self._bytes + size > self.limit_bytes:
            raise LogFull(
                f"stream {self.name} is full (maximum bytes exceeded): raise its limit or shorten its retention"
            )
        sequence = self.last_sequence + 1
        timestamp = max(now, self._records[-1].timestamp) if self._records else now
        record = Record(sequence, timestamp, subject, payload, publisher)
        self._records.append(record)
        self._sizes.append(size)
        self._bytes += size
        self._last_of[subject] = sequence
        if message_id:
            self._ids[message_id] = (sequence, now + int(self.dedupe_seconds * 1e9))
        for watcher in list(self._watchers.values()):
            watcher.appended(record)
        for observer in list(self.observers):
            observer(self.log, record)
        return Appended(sequence, False)

    def _expire(self, now: int) -> None:
        forgotten = []
        for message_id, (_, until) in self._ids.items():
            if until > now:
                break
            forgotten.append(message_id)
        for message_id in forgotten:
            del self._ids[message_id]
        if not self.max_age_seconds:
            return
        oldest = now - int(self.max_age_seconds * 1e9)
        expired = 0
        while expired < len(self._records) and self._records[expired].timestamp <= oldest:
            expired += 1
        if expired:
            self._forget_first(expired)

    # reading
    def takes(self, subject: str) -> bool:
        return any(subject_matches(pattern, subject) for pattern in self.patterns)

    @property
    def first_sequence(self) -> int:
        return self._first

    @property
    def last_sequence(self) -> int:
        return self._first + len(self._records) - 1

    def get(self, sequence: int) -> Record | None:
        self._expire(self._wall())
        at = sequence - self._first
        return self._records[at] if 0 <= at < len(self._records) else None

    def last(self, subject: str) -> Record | None:
        self._expire(self._wall())
        sequence = self._last_of.get(subject)
        return self.get(sequence) if sequence is not None else None

    def since(self, sequence: int) -> list[Record]:
        self._expire(self._wall())
        return self._records[max(0, sequence - self._first) :]

    def usage(self) -> Usage:
        self._expire(self._wall())
        age = int(self.max_age_seconds * 1e9)
        return Usage(len(self._records), self._bytes, self.limit_bytes, self._first, self.last_sequence, age)

    # readers
    def watch(self, watcher: Watcher) -> int:
        self._next_watcher += 1
        self._watchers[self._next_watcher] = watcher
        return self._next_watcher

    def unwatch(self, number: int) -> None:
        self._watchers.pop(number, None)

    def drop(self, before: int) -> None:
        """Give up everything below a sequence."""
        count = min(max(0, before - self._first), len(self._records))
        for watcher in list(self._watchers.values()):
            watcher.dropping(self._records[:count])
        self._forget_first(count)

    def _forget_first(self, count: int) -> None:
        for record, size in zip(self._records[:count], self._sizes[:count], strict=True):
            if self._last_of.get(record.subject) == record.sequence:
                del self._last_of[record.subject]
            self._bytes -= size
        del self._records[:count]
        del self._sizes[:count]
        self._first += count

    # what an operator or a disaster does
    def alter(self, sequence: int, payload: bytes) -> None:
        """Another payload at a sequence, as a broken disk may have it."""
        at = sequence - self._first
        self._records[at] = self._records[at]._replace(payload=payload)

    def truncate(self, last_sequence: int) -> None:
        """Drop everything behind a sequence, as a restored backup does."""
        kept = [(record, size) for record, size in zip(self._records, self._sizes, strict=True)]
        first = self._first
        self._clear()
        self._first = first
        for record, size in kept:
            if record.sequence <= last_sequence:
                self._records.append(record)
                self._sizes.append(size)
                self._bytes += size
                self._last_of[record.subject] = record.sequence
        self._tell_replaced()

    def load(self, records: list[Record]) -> None:
        """Take records as they stand, with sequences and timestamps, in place of what there is."""
        self._clear()
        self._first = records[0].sequence if records else 1
        for record in records:
            self._records.append(record)
            self._sizes.append(stored_size(record.subject, 0, record.payload))
            self._bytes += self._sizes[-1]
            self._last_of[record.subject] = record.sequence
        self._tell_replaced()

    def recreate(self) -> None:
        """Delete the stream and create it anew, empty."""
        self._clear()
        self._tell_replaced()

    def _tell_replaced(self) -> None:
        for watcher in list(self._watchers.values()):
            watcher.replaced()


def stored_size(subject: str, header_bytes: int, payload: bytes) -> int:
    """Bytes that nats-server's file store counts for a message."""
    return 22 + len(subject.encode()) + (4 + header_bytes if header_bytes else 0) + len(payload) + 8
