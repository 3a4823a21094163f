"""The bus in memory: one cell's server and its connections inside one event loop, for simulation and tests.

Time is the event loop's own (`time`, `call_later`), so under a loop with virtual time a day passes in a moment. There
are no threads and no chance: the same calls give the same run. What may go wrong is injected (`bus.memory_faults`).

    server = MemoryServer("main")
    bus = server.bus("control-1")
    server.observe(lambda log, record: ...)   # after each store; may kill what it likes
    server.cut(bus); server.heal(bus)         # or server.outage(3.0, bus)
    server.kill(bus)                          # as SIGKILL would: nothing of it arrives any more, nothing returns
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from bus.contract import Appended, Bus, BusError, Delivery, NoAnswer, NoResponders, Record
from bus.delivery_queue import DeliveryQueue
from bus.memory_faults import Faults, NoFaults
from bus.memory_log import MemoryLog, check_size
from bus.memory_stream import DEDUPE_SECONDS, MemoryStream, Pipe, subject_matches
from bus.part_limits import PARTS_SECONDS
from bus.subjects import Subjects
from bus.wire import header_block, publish_frame

API_SECONDS = 5.0
EPOCH_NS = 1_700_000_000_000_000_000
"""Where the virtual wall clock starts unless told otherwise."""


class _Interest:
    """Somebody who wants the core messages on a subject."""

    __slots__ = ("bus", "deliver", "pattern", "pipe", "queue")

    def __init__(self, bus: MemoryBus, pattern: str, queue: str, deliver: Callable[[Delivery], None]) -> None:
        self.bus = bus
        self.pattern = pattern
        self.queue = queue
        self.deliver = deliver
        self.pipe = Pipe()


class MemoryServer:
    """Streams and subscriptions of one cell."""

    def __init__(
        self,
        cell: str,
        *,
        epoch_ns: int = EPOCH_NS,
        ledger_limit_bytes: int = 0,
        tokens_limit_bytes: int = 0,
        parts_limit_bytes: int = 0,
        result_retention_seconds: float = 3600.0,
        dedupe_seconds: float = DEDUPE_SECONDS,
    ) -> None:
        self.subjects = Subjects(cell)
        self._epoch_ns = epoch_ns
        self.ledger = MemoryStream(
            self.subjects.ledger_stream,
            "ledger",
            self.subjects.ledger_filters,
            self.wall,
            limit_bytes=ledger_limit_bytes,
            dedupe_seconds=dedupe_seconds,
        )
        self.tokens = MemoryStream(
            self.subjects.tokens_stream,
            "tokens",
            [self.subjects.tokens_filter],
            self.wall,
            limit_bytes=tokens_limit_bytes,
            max_age_seconds=result_retention_seconds,
            dedupe_seconds=min(dedupe_seconds, result_retention_seconds),
        )
        self.snapshots = MemoryStream(
            self.subjects.snapshots_stream,
            "snapshots",
            [self.subjects.snapshots_filter],
            self.wall,
            dedupe_seconds=dedupe_seconds,
        )
        self.parts = MemoryStream(
            self.subjects.parts_stream,
            "parts",
            [self.subjects.parts_filter],
            self.wall,
            limit_bytes=parts_limit_bytes,
            max_age_seconds=PARTS_SECONDS,
            dedupe_seconds=dedupe_seconds,
            once_per_subject=True,
        )
        self._buses: dict[int, MemoryBus] = {}
        self._interests: dict[int, _Interest] = {}
        self._turns: dict[tuple[str, str], int] = {}
        self._next_number = 0

    def wall(self) -> int:
        """Nanoseconds since the epoch, by the loop's clock."""
        return self._epoch_ns + round(asyncio.get_running_loop().time() * 1e9)

    def bus(
        self, name: str, *, faults: Faults | None = None, ack_timeout: float = 5.0, clock_offset_ns: int = 0
    ) -> MemoryBus:
        """A connection, for one simulated process. `clock_offset_ns`: how far its clock is ahead of the server's."""
        number = self._number()
        bus = MemoryBus(self, number, name, faults or NoFaults(), ack_timeout, clock_offset_ns)
        self._buses[number] = bus
        return bus

    def observe(self, observer: Callable[[str, Record], None]) -> None:
        """Have `observer(log, record)` called after each store, before its acknowledgement leaves."""
        self.ledger.observers.append(observer)
        self.tokens.observers.append(observer)
        self.snapshots.observers.append(observer)
        self.parts.observers.append(observer)

    # failures
    def outage(self, seconds: float, bus: MemoryBus | None = None) -> None:
        """Cut one connection, or all, now, and heal them after `seconds`."""
        loop = asyncio.get_running_loop()
        for cut in [bus] if bus is not None else list(self._buses.values()):
            self.cut(cut)
            loop.call_later(seconds, self.heal, cut)

    def cut(self, bus: MemoryBus) -> None:
        bus._cut()

    def heal(self, bus: MemoryBus) -> None:
        bus._heal()

    def kill(self, bus: MemoryBus) -> None:
        """Its process is dead: what it sent and had not arrived vanishes, and no call of it ever returns."""
        bus.kill()

    # core messages
    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    def _forget(self, bus: MemoryBus) -> None:
        self._buses.pop(bus.number, None)
        self._interests = {n: interest for n, interest in self._interests.items() if interest.bus is not bus}

    def _route(self, delivery: Delivery, delay: float) -> int:
        """Hand a message to all who want it, and to one of each queue group in turn. Returns how many got it."""
        streams = (self.ledger, self.tokens, self.snapshots, self.parts)
        stream = next((stream for stream in streams if stream.takes(delivery.subject)), None)
        if stream is not None:
            self._capture(stream, delivery)
        groups: dict[tuple[str, str], list[_Interest]] = {}
        chosen = []
        for interest in self._interests.values():
            if interest.bus.connected and subject_matches(interest.pattern, delivery.subject):
                if interest.queue:
                    groups.setdefault((interest.pattern, interest.queue), []).append(interest)
                else:
                    chosen.append(interest)
        for group, members in groups.items():
            turn = self._turns.get(group, 0)
            self._turns[group] = turn + 1
            chosen.append(members[turn % len(members)])
        for interest in chosen:
            self._hand_over(interest, delivery, delay)
        return len(chosen) + (stream is not None)

    def _hand_over(self, interest: _Interest, delivery: Delivery, delay: float) -> None:
        interest.pipe.put(delay, lambda: interest.deliver(delivery))

    def _capture(self, stream: MemoryStream, delivery: Delivery) -> None:
        """A stream takes what is published on its subjects, and answers whoever left a reply subject."""
        headers = header_block(delivery.headers)
        answer: dict[str, object]
        try:
            stored: Appended = stream.append(delivery.subject, delivery.payload, header_bytes=len(headers))
            answer = {"stream": stream.name, "seq": stored.sequence}
        except BusError as error:
            answer = {"error": {"description": str(error)}}
        if delivery.reply:
            self._route(Delivery(delivery.reply, json.dumps(answer).encode()), 0.0)


class MemorySubscription(DeliveryQueue):
    """See `bus.contract.Subscription`."""

    def __init__(self, drop: Callable[[], None], flushed: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._drop = drop
        self._flushed = flushed

    async def drain(self) -> None:
        self._drop()
        await self._flushed()
        self.end()

    async def close(self) -> None:
        self._drop()
        self.end()


class MemoryInbox(DeliveryQueue):
    """See `bus.contract.Inbox`."""

    def __init__(self, bus: MemoryBus, limit: int, limit_bytes: int) -> None:
        super().__init__(limit, limit_bytes)
        self.subject = bus.new_inbox()
        self._bus = bus
        self._number = bus.server._number()
        bus._subscriptions[self._number] = self
        if not bus.ended:
            bus.server._interests[self._number] = _Interest(bus, self.subject, "", self.put)

    async def close(self) -> None:
        self.leave()

    def leave(self) -> None:
        self._bus.server._interests.pop(self._number, None)
        self._bus._subscriptions.pop(self._number, None)
        self.end()


class MemoryBus:
    """See `bus.contract.Bus`. Made by `MemoryServer.bus`."""

    def __init__(
        self,
        server: MemoryServer,
        number: int,
        name: str,
        faults: Faults,
        ack_timeout: float,
        clock_offset_ns: int,
    ) -> None:
        self.server = server
        self.number = number
        self.name = name
        self.faults = faults
        self.subjects = server.subjects
        self.up = Pipe()
        self.down = Pipe()
        self.dead = False
        self.ended = False
        self.connected = True
        self._connections = 1
        self._clock_offset_ns = clock_offset_ns
        self._next_inbox = 0
        self._asked: dict[int, asyncio.Future[Delivery]] = {}
        self._subscriptions: dict[int, DeliveryQueue] = {}
        self._healed: list[asyncio.Future[None]] = []
        self._logs = (
            MemoryLog(self, server.ledger, ack_timeout),
            MemoryLog(self, server.tokens, ack_timeout),
            MemoryLog(self, server.snapshots, ack_timeout),
            MemoryLog(self, server.parts, ack_timeout),
        )

    @property
    def ledger(self) -> MemoryLog:
        return self._logs[0]

    @property
    def tokens(self) -> MemoryLog:
        return self._logs[1]

    @property
    def snapshots(self) -> MemoryLog:
        return self._logs[2]

    @property
    def parts(self) -> MemoryLog:
        return self._logs[3]

    @property
    def connections(self) -> int:
        return self._connections

    def wall(self) -> int:
        return self.server.wall() + self._clock_offset_ns

    # core messages
    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        self._publish(subject, payload, reply, headers or {}, None)

    def _publish(
        self,
        subject: str,
        payload: bytes,
        reply: str,
        headers: dict[str, str],
        nobody: Callable[[], None] | None,
    ) -> None:
        block = header_block(headers)
        check_size(subject, len(block), payload)
        publish_frame(subject, reply, block, b"")
        if not self.connected:
            return
        delay = self.faults.core(subject)
        if delay is None:
            return
        delivery = Delivery(subject, payload, reply, {name: value.strip() for name, value in headers.items()})

        def arrive() -> None:
            if self.server._route(delivery, delay) == 0 and nobody is not None:
                self.down.put(0.0, nobody)

        self.up.put(0.0, arrive)

    async def subscribe(self, subject: str, *, queue: str = "") -> MemorySubscription:
        number = self.server._number()

        def drop() -> None:
            self.server._interests.pop(number, None)
            self._subscriptions.pop(number, None)

        subscription = MemorySubscription(drop, self._flushed)
        self._subscriptions[number] = subscription
        if not self.ended:
            self.server._interests[number] = _Interest(self, subject, queue, subscription.put)
        return subscription

    async def request(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, timeout: float = 2.0
    ) -> Delivery:
        await self._not_if_dead()
        inbox = self.new_inbox()
        number = self.server._number()
        answer: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer

        def answered(delivery: Delivery) -> None:
            if not answer.done():
                answer.set_result(Delivery(subject, delivery.payload, "", delivery.headers))

        def nobody() -> None:
            if not answer.done():
                answer.set_exception(NoResponders(f"nobody listens on {subject}"))

        self.server._interests[number] = _Interest(self, inbox, "", answered)
        try:
            self._publish(subject, payload, inbox, headers or {}, nobody)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            await self._not_if_dead()
            raise NoAnswer(f"no answer on {subject} within {timeout:g} s") from None
        finally:
            self._asked.pop(number, None)
            self.server._interests.pop(number, None)

    def new_inbox(self) -> str:
        self._next_inbox += 1
        return f"_INBOX.{self.number}.{self._next_inbox}"

    async def open_inbox(self, *, limit: int, limit_bytes: int) -> MemoryInbox:
        return MemoryInbox(self, limit, limit_bytes)

    # the connection
    async def wait_connected(self) -> None:
        """Return once the connection stands; never in a dead process. Raises `BusError` where it was closed."""
        while not self.connected:
            if self.ended and not self.dead:
                raise BusError("the connection is closed")
            healed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._healed.append(healed)
            await healed

    async def round_trip(self, what: str) -> None:
        """To the server and back. Raises `NoAnswer` where there is no connection."""
        await self._not_if_dead()
        number = self.server._number()
        back: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        self._asked[number] = back

        def returned() -> None:
            if not back.done():
                back.set_result(Delivery(what, b""))

        if self.connected:
            self.up.put(0.0, lambda: self.down.put(0.0, returned))
        try:
            async with asyncio.timeout(API_SECONDS):
                await back
        except TimeoutError:
            await self._not_if_dead()
            raise NoAnswer(f"no answer about {what} within {API_SECONDS:g} s") from None
        finally:
            self._asked.pop(number, None)

    async def _not_if_dead(self) -> None:
        """Never returns in a dead process: what a task of it still calls has no effect and no end."""
        if self.dead:
            await asyncio.get_running_loop().create_future()

    def _silence(self) -> None:
        """Everything on the way is lost, in both directions."""
        self.connected = False
        self.up.clear()
        self.down.clear()
        for interest in self.server._interests.values():
            if interest.bus is self:
                interest.pipe.clear()

    def _cut(self) -> None:
        if self.connected:
            self._silence()
            self._fail_asked("the connection was lost before an answer came")
            for log in self._logs:
                log.lost("the connection was lost")

    def _heal(self) -> None:
        if self.connected or self.ended:
            return
        self.connected = True
        self._connections += 1
        self._release_waiters()
        for log in self._logs:
            log.restored()

    def _fail_asked(self, reason: str) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(NoAnswer(reason))

    def _release_waiters(self) -> None:
        waiters, self._healed = self._healed, []
        for healed in waiters:
            if not healed.done():
                healed.set_result(None)

    def kill(self) -> None:
        """See `MemoryServer.kill`. Cancelling its tasks is the business of whoever started them."""
        if self.ended:
            return
        self.dead = self.ended = True
        self._silence()
        for log in self._logs:
            log.ended()
        self.server._forget(self)

    async def close(self) -> None:
        """Let what was published leave, then close for good."""
        await self._not_if_dead()
        if self.ended:
            return
        if self.connected:
            await self._flushed()
        self.ended = True
        self._silence()
        self._fail_asked("the connection was closed")
        self._release_waiters()
        for log in self._logs:
            log.ended()
        for subscription in list(self._subscriptions.values()):
            subscription.end()
        self.server._forget(self)

    async def _flushed(self) -> None:
        try:
            await self.round_trip("closing")
        except NoAnswer:
            pass


if TYPE_CHECKING:

    def _keeps_the_contract(bus: MemoryBus) -> Bus:
        return bus
