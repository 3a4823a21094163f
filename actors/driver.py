"""The shell that every driver runs in: it gives epochs, effects and facts, and begins anew when an epoch is over.

    open ─▶ started appended ─▶ own started read ─▶ run: effects in, facts out, heartbeats ─▶ over ─▶ pause ─▶ open

Rules
* One ledger reader per epoch, from the ledger's end as it was when the epoch began. It survives reconnects by itself;
  when the ledger turns out to be another one (`LogChanged`), the epoch is over.
* A fact is sent again, under the same message id, until it is acknowledged; none is dropped while its epoch lives.
  While too many are not acknowledged, no effect is handed out.
* Heartbeats carry the epoch and are sent only once it is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from actors.driver_core import DriverCore, Effect, EpochOver, OutgoingFact, Replaced
from bus.contract import Appended, Bus, BusError, LogFull, NoAnswer, Reader
from bus.messages import DriverLost, FactEnvelope, Message, encode, kind_of
from bus.subjects import Subjects
from bus.tasks import Tasks

HEARTBEAT_SECONDS = 0.25
FACTS_IN_FLIGHT = 256
"""Facts that may wait for their acknowledgement; with more, no effect is handed out until some have it."""
RETRY_SECONDS = 0.05
FULL_RETRY_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
LEAVE_SECONDS = 2.0
"""How long the word that a driver leaves may take; without it, watch counts its silence."""
STEADY_SECONDS = 10.0
"""An epoch that lived this long was no failed start: the next pause is short again."""

logger = logging.getLogger("longshore.driver")


class Epoch(Protocol):
    """An open epoch, as its driver sees it."""

    @property
    def number(self) -> int:
        """The epoch: the ledger sequence of the `started` that opened it."""

    @property
    def boot(self) -> str: ...

    @property
    def backlog(self) -> int:
        """Facts that are not acknowledged yet."""

    async def effect(self) -> Effect:
        """The next effect, in order; waits while too many facts are not acknowledged."""
        ...

    def state(self, message: Message, *, answers: int = 0) -> None:
        """State a fact; `answers` is the number of the effect that it answers, 0 for none."""
        ...


class Driver(Protocol):
    """What does the work. `open` and `run` are called in turn, once per epoch."""

    @property
    def name(self) -> str:
        """The name of the deciding half: `store/s1`, `gpu/s1/0`."""

    async def open(self) -> Message:
        """Let go of whatever an earlier epoch left, look around, and say what is there: the body of `started`."""
        ...

    async def run(self, epoch: Epoch) -> None:
        """Obey effects until cancelled. An exception ends the epoch. Leaves no task of its own behind."""
        ...


class DriverShell:
    """Runs one driver on one bus for as long as `run` is not cancelled.

    `boot` makes a random id for each epoch. `epoch` is the number of the open epoch, 0 between two; `endings` counts
    the epochs that are over, `replaced` those that another process of this name ended; `last_ending` says why the
    last one is over.
    """

    def __init__(self, bus: Bus, subjects: Subjects, driver: Driver, *, boot: Callable[[], str]) -> None:
        self._bus = bus
        self._subjects = subjects
        self._driver = driver
        self._boot = boot
        self._boots: dict[str, int] = {}
        self._life: _Life | None = None
        self.endings = 0
        self.replaced = 0
        self.last_ending = ""

    @property
    def epoch(self) -> int:
        return self._life.number if self._life is not None else 0

    async def run(self) -> None:
        """Live epoch after epoch. Ends by cancellation only."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_SECONDS
        while True:
            began = loop.time()
            name = self._driver.name
            try:
                await self._live()
            except (EpochOver, BusError) as over:
                self.last_ending = str(over)
                self.replaced += isinstance(over, Replaced)
                logger.warning("%s: %s", name, over, extra={"driver": name, "epoch": self.epoch})
            except Exception as error:
                self.last_ending = f"{type(error).__name__}: {error}"
                logger.exception("%s failed and starts anew", name, extra={"driver": name, "epoch": self.epoch})
            finally:
                self._life = None
            self.endings += 1
            if loop.time() - began >= STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def leave(self, running: asyncio.Task[None], reason: str) -> None:
        """End `running`, which is `run`, and say so in the ledger: nobody has to wait for a silence then."""
        epoch, driver = self.epoch, self._driver.name
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        if not epoch:
            return
        await state_lost(self._bus, self._subjects, DriverLost(driver, epoch, reason, leaving=True))

    async def _live(self) -> None:
        body = await self._driver.open()
        core = DriverCore(self._subjects, self._driver.name, self._boot(), self._boots)
        usage = await self._bus.ledger.usage()
        reader = await self._bus.ledger.read(core.filters, start=usage.last_sequence + 1)
        try:
            self._life = _Life(self._bus, self._subjects, self._driver, core, reader)
            await self._life.run(body)
        finally:
            await reader.close()


class _Life:
    """One epoch at work; see `Epoch`."""

    def __init__(self, bus: Bus, subjects: Subjects, driver: Driver, core: DriverCore, reader: Reader) -> None:
        self._bus = bus
        self._subjects = subjects
        self._driver = driver
        self._core = core
        self._reader = reader
        self._tasks = Tasks()
        self._ended = False
        self._unacknowledged: dict[str, OutgoingFact] = {}
        self._moved = asyncio.Event()

    @property
    def number(self) -> int:
        return self._core.epoch

    @property
    def boot(self) -> str:
        return self._core.boot

    @property
    def backlog(self) -> int:
        return len(self._unacknowledged)

    async def run(self, body: Message) -> None:
        """Until the epoch is over: raises `EpochOver`, or what the driver or the bus raised."""
        try:
            self._send(self._core.started(body))
            self._tasks.start(self._read(), "reads the ledger")
            await self._tasks.wait()
        finally:
            self._ended = True
            await self._tasks.stop()

    async def effect(self) -> Effect:
        while not self._core.effects or len(self._unacknowledged) >= FACTS_IN_FLIGHT:
            self._moved.clear()
            await self._moved.wait()
        return self._core.effects.popleft()

    def state(self, message: Message, *, answers: int = 0) -> None:
        self._send(self._core.state(message, answers))

    # ---- facts ------------------------------------------------------------------------------------------------

    def _send(self, fact: OutgoingFact) -> None:
        if self._ended:
            return
        self._unacknowledged[fact.message_id] = fact
        future = self._bus.ledger.send(
            fact.subject, fact.payload, message_id=fact.message_id, publisher=self._core.boot
        )
        future.add_done_callback(lambda done: self._answered(fact, done))

    def _answered(self, fact: OutgoingFact, future: asyncio.Future[Appended]) -> None:
        error = None if future.cancelled() else future.exception()
        if self._ended:
            return
        if error is None and not future.cancelled():
            self._unacknowledged.pop(fact.message_id, None)
            self._moved.set()
        elif error is None or isinstance(error, NoAnswer | LogFull):
            pause = FULL_RETRY_SECONDS if isinstance(error, LogFull) else RETRY_SECONDS
            asyncio.get_running_loop().call_later(pause, self._send, fact)
        else:
            self._tasks.spawn(_fail(error), "refused fact")

    # ---- effects ----------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            for record in await self._reader.batch():
                known = self._core.epoch
                self._core.read(record)
                if self._core.epoch != known:
                    self._opened()
            self._moved.set()

    def _opened(self) -> None:
        name = self._driver.name
        logger.info("%s is up in epoch %d", name, self.number, extra={"driver": name, "epoch": self.number})
        self._tasks.start(self._beat(), "heartbeats")
        self._tasks.start(self._drive(), "driver")

    async def _drive(self) -> None:
        await self._driver.run(self)
        raise EpochOver(f"{self._driver.name} stopped by itself")

    async def _beat(self) -> None:
        name = self._driver.name
        subject = self._subjects.heartbeat(name)
        payload = json.dumps({"driver": name, "epoch": self.number, "boot": self.boot}).encode()
        while True:
            try:
                await self._bus.publish(subject, payload)
            except BusError:
                pass  # watch counts silence; there is nothing else to do about it here
            await asyncio.sleep(HEARTBEAT_SECONDS)


async def state_lost(bus: Bus, subjects: Subjects, lost: DriverLost) -> None:
    """Say that an epoch of one of our own drivers is over. Where that takes too long, watch says it."""
    with contextlib.suppress(BusError, TimeoutError):
        async with asyncio.timeout(LEAVE_SECONDS):
            await bus.ledger.append(
                subjects.fact(lost.driver, kind_of(lost)),
                encode(FactEnvelope(lost.driver, msgspec.Raw(encode(lost)))),
                message_id=f"fact.{lost.driver}.over.{lost.epoch}",
                publisher=lost.driver,
            )


async def _fail(error: BaseException) -> None:
    raise error
