"""What the rest of the project may expect of a message bus: the contract, no implementation.

Two implementations stand behind it, `bus.jetstream` (a real NATS server) and `bus.memory` (virtual or real
time, with injected faults), and one contract test runs against both (`tests/bus/test_contract.py`).

Rules that every implementation keeps and every caller relies on:

* A `Log` is an append-only stream. Sequences start at 1 and rise without holes; a stored record never changes.
* No answer is not "not stored": `NoAnswer` leaves open whether the append happened. Callers read back or repeat
  under the same message id; they never decide twice.
* A message id saves traffic only. Within the server's dedupe window a repeated id answers the first sequence with
  `duplicate=True`; outside of it the record is stored again. Readers drop repeats by what the payload says.
* The beginning of a log may be given up (`drop`). A reader that has not read all that it wants of it raises
  `LogChanged`, never passes over it in silence.
* A reader yields records in stream order, each sequence at most once, without holes among those that match its
  filters. It survives reconnects by itself; on every reconnect it compares the record at its position with the
  one it took and raises `LogChanged` when they differ or when its position lies beyond the end.
* Core messages (`publish`, `subscribe`, `request`) are at most once: an outage loses them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from bus.errors import UserError

PUBLISHER_HEADER = "Longshore-Publisher"
"""Header that names the process (its boot id) which appended a record. Never part of what is compared."""


class BusError(UserError):
    """A bus operation failed; the message is one sentence for the user."""


class NoAnswer(BusError):
    """An append was sent and no acknowledgement came in time: it may or may not be stored."""


class NotTaken(NoAnswer):
    """An append reached no stream, because none takes its subject now: it is not stored, and may be sent again."""


class WrongLastSequence(BusError):
    """The expected last sequence of the subject was outdated: the append was refused and is not stored."""


class LogFull(BusError):
    """The stream's limit is reached: the append was refused and is not stored."""


class LogChanged(BusError):
    """What the stream holds at a position is no longer what was read there: all that follows from it is void."""


class Unreachable(BusError):
    """No server answers at the given address."""


class NotAllowed(BusError):
    """The server does not let this user publish on a subject, or listen to it: nothing was done."""


class NoResponders(BusError):
    """Nobody listens on the requested subject."""


class Record(NamedTuple):
    """One stored message of a log.

    `timestamp` is the stream's own, in nanoseconds since the epoch. `pending` counts the records behind this one
    that match the reader's filters at the time of delivery (0: this was the newest); -1 where it is not known.
    """

    sequence: int
    timestamp: int
    subject: str
    payload: bytes
    publisher: str = ""
    pending: int = -1


class Appended(NamedTuple):
    """Acknowledgement of an append: where the record stands, and whether it was there before."""

    sequence: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a log is. `limit_bytes` is 0 where there is no limit, `max_age_ns` where nothing expires."""

    messages: int
    stored_bytes: int
    limit_bytes: int
    first_sequence: int
    last_sequence: int
    max_age_ns: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One core message. `reply` is empty where no answer is wanted."""

    subject: str
    payload: bytes
    reply: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """Ordered reading of a log from a position on."""

    async def batch(self, limit: int = 512) -> list[Record]:
        """Wait for at least one record, then return what is there, at most `limit`, in stream order.

        Raises `LogChanged` (see the module's rules). Cancellation loses no record.
        """
        ...

    async def close(self) -> None: ...


class Log(Protocol):
    """One append-only stream."""

    def send(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        publisher: str = "",
    ) -> asyncio.Future[Appended]:
        """Append without waiting; appends of one caller are stored in the order of their `send` calls.

        `expected_last` is the sequence of the last record on this very subject (0: none yet). The future raises
        `NoAnswer` (after the log's acknowledgement time-out, or when the connection was lost), `WrongLastSequence`
        or `LogFull`.
        """
        ...

    async def append(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        publisher: str = "",
    ) -> Appended:
        """`send`, awaited."""
        ...

    async def read(self, filters: Sequence[str] = (), *, start: int = 1) -> Reader:
        """Open a reader at the first record with sequence >= `start` that matches one of the subject `filters`.

        No filter means everything. Wildcards are those of NATS: `*` one token, a trailing `>` one or more.
        """
        ...

    async def get(self, sequence: int) -> Record | None:
        """The record at a sequence; None where there is none (deleted, or beyond the end)."""
        ...

    async def last(self, subject: str) -> Record | None:
        """The newest record on exactly this subject."""
        ...

    async def usage(self) -> Usage: ...

    async def drop(self, before: int) -> None:
        """Give up all records below a sequence; sequences go on as if they were there. May be repeated."""
        ...


class Deliveries(Protocol):
    """Core messages that come in, one after the other."""

    async def next(self) -> Delivery:
        """Wait for the next core message. The queue is bounded: what overflows is dropped and counted.

        Raises `BusError` once it is closed and the queue empty.
        """
        ...

    async def close(self) -> None: ...


class Subscription(Deliveries, Protocol):
    """Core messages on one subject."""

    async def drain(self) -> None:
        """Have nothing more sent here, then close: what the server has handed out by then can still be taken."""
        ...


class Inbox(Deliveries, Protocol):
    """A subscription on a subject of its own, for replies. All inboxes of a bus are one subscription at the server."""

    @property
    def subject(self) -> str: ...

    def leave(self) -> None:
        """`close`, without waiting for anything."""
        ...

    @property
    def unread(self) -> int:
        """How many messages wait."""
        ...

    @property
    def dropped(self) -> int:
        """How many messages found no room: whoever reads slower than others write asks for them again."""
        ...


class Bus(Protocol):
    """One connection of one process to one cell's streams."""

    @property
    def ledger(self) -> Log: ...

    @property
    def tokens(self) -> Log: ...

    @property
    def snapshots(self) -> Log:
        """Where snapshots of the cell are kept (`bus.snapshots`)."""
        ...

    @property
    def parts(self) -> Log:
        """Where prompts that are too large for one message lie in parts (`bus.parts`); they expire."""
        ...

    @property
    def connected(self) -> bool: ...

    @property
    def connections(self) -> int:
        """How often a connection was established, so 1 after the first; a rise tells of a reconnect."""
        ...

    def wall(self) -> int:
        """Wall clock of this process in nanoseconds since the epoch (virtual in a simulated world)."""
        ...

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None: ...

    async def subscribe(self, subject: str, *, queue: str = "") -> Subscription: ...

    async def request(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, timeout: float = 2.0
    ) -> Delivery:
        """Core request; raises `NoResponders` at once or `NoAnswer` after `timeout` seconds."""
        ...

    def new_inbox(self) -> str: ...

    async def open_inbox(self, *, limit: int, limit_bytes: int) -> Inbox:
        """An inbox that holds at most so many unread messages, and about so many bytes of them."""
        ...

    async def close(self) -> None: ...
