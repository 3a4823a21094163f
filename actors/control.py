"""The control shell: one replica of the cell on a bus, with what belongs to every control beside it.

    ledger ─▶ replica (actors.replica) ─▶ publish, lead or rescue
                 ├─▶ timers   state what is due
                 ├─▶ sealer   seals the tokens of closed epochs
                 ├─▶ reader   shows what no worker shows
                 ├─▶ watch    states who is lost
                 ├─▶ intake   answers clients
                 └─▶ snapshots (actors.cell_snapshots), from which the next control starts

It needs only the `Bus` contract, so it runs unchanged on NATS and in a simulated world. A difference, a changed ledger
or an unknown rule version end it with an exception that says what and where; whoever runs it decides what follows.

It takes requests only while it is live, and before it ends it gives them back: a request that the server hands to a
control that cannot take it would wait for its client to ask again, although another control is there.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import cast

import structlog

from actors.cell import Cell, Said, Step
from actors.cell_snapshots import SNAPSHOT_FACTS, Capture, SnapshotTaker, find_start
from actors.gpu_state import GpuState
from actors.intake import Intake
from actors.readback import accepted_differences
from actors.replica import Replica, is_urgent
from actors.results import ResultsReader
from actors.rules import KNOWN_RULES, UnknownRules
from actors.sealer import seal
from actors.timers import Timers
from actors.unshown import Unshown
from actors.watch import LOOK_SECONDS, SILENCE_SECONDS, Watch
from bus.contract import Appended, Bus, BusError, LogFull, Reader
from bus.messages import RequestEnded, SealTokens, decode_said, decode_said_body
from bus.replies import REASON_LIMIT
from bus.subjects import Subjects
from bus.tasks import Tasks

POLL_SECONDS = 0.05
RECORDS_SECONDS = 0.003
"""By how much records come after the effects and answers of their step. A server that fsyncs each message has handed
the effect to its driver by then, instead of storing what nobody waits for first.
"""
TIMER_SECONDS = 0.001
"""How long a timer that is due is waited for at least: two clocks may differ by their rounding."""
STANDBY_SECONDS = 0.5
"""How much later a replica that does not lead does what the leading one should have done by then."""

MEASURE_SECONDS = 1.0

FULL_RETRY_SECONDS = 1.0
FULL_LOG_SECONDS = 10.0
FULL_REASON = "what must be said finds no room: `longshore ledger limit SIZE` gives it more, `rotate` drops what is old"
LEAVE_SECONDS = 2.0
"""How long what was taken from clients may need to be answered, when a control ends."""

SHOWN_BY_WORKER = b'"shown":true'
"""How a `request.ended` reads whose end the worker's own page carries (text in a message has its quotes escaped)."""

log = structlog.get_logger("longshore.control")


class Control:
    """One control process. `me` is its boot id. `run` lasts until something forbids it to go on.

    `silent`: why it takes no part any more, where its program does not know the rules in force.
    """

    def __init__(
        self,
        bus: Bus,
        cell: str,
        me: str,
        *,
        silence: float = SILENCE_SECONDS,
        snapshot_facts: int = SNAPSHOT_FACTS,
        capture: Capture | None = None,
        known_rules: tuple[int, ...] = KNOWN_RULES,
    ) -> None:
        self.bus = bus
        self.me = me
        self.subjects = Subjects(cell)
        self.tasks = Tasks()
        self.answering = Tasks()
        self.silent = ""
        self.replica: Replica | None = None
        self.started = asyncio.Event()
        self.watch = Watch(bus, self.subjects, me, silence=silence)
        self.intake = Intake(bus, self.subjects, me, self._cell, self._has_read_the_past, self._position)
        self._known_rules = known_rules
        self._empty = Cell(cell, known_rules)
        self._serving: list[asyncio.Task[None]] = []
        self._records: list[tuple[int, Said]] = []
        self._records_due: asyncio.TimerHandle | None = None
        self._timers = Timers()
        self._next_timer: asyncio.TimerHandle | None = None
        self._reader = ResultsReader(bus, self.subjects)
        self._unshown = Unshown()
        self._seals: dict[bytes, SealTokens] = {}
        self._told_full = float("-inf")
        self.intake.wants_snapshot = self.want_snapshot
        self.snapshots = SnapshotTaker(bus, self.subjects, me, facts=snapshot_facts, capture=capture)

    @property
    def live(self) -> bool:
        """Whether the past is read: from here on this control takes part."""
        return self._has_read_the_past() and not self.silent

    def _has_read_the_past(self) -> bool:
        """Whether what a client asks can be looked up; of what was taken before a control fell silent, too."""
        return self.replica is not None and self.replica.live

    def obstacles(self) -> list[str]:
        """Why this control cannot serve now, one sentence each; none: it can."""
        found = [] if self.bus.connected else ["there is no connection to the NATS server"]
        if self.replica is None:
            found.append("it looks for where to begin in the ledger")
        elif not self.live:
            found.append(f"it reads the ledger and is at sequence {self.replica.position}")
        return found + self.intake.obstacles()

    def _cell(self) -> Cell:
        return self.replica.cell if self.replica is not None else self._empty

    def _position(self) -> int:
        return self.replica.position if self.replica is not None else 0

    async def run(self) -> None:
        """Raises Difference, LogChanged, UnknownRules, NoBeginning or BusError; cancellation ends it cleanly."""
        try:
            await self._open()
            await self.tasks.wait()
        except UnknownRules as error:
            self.silent = str(error)
            await self._stop()
            await self.leave()
            raise
        finally:
            await self._stop()
            await self.answering.stop()

    async def _stop(self) -> None:
        if self._records_due is not None:
            self._records_due.cancel()
        if self._next_timer is not None:
            self._next_timer.cancel()
        await self.tasks.stop()

    async def leave(self) -> None:
        """Take nothing more from clients, and answer what was taken; in a bounded time."""
        with contextlib.suppress(TimeoutError, BusError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self.intake.leave()
                await asyncio.gather(*self._serving)
                await self.answering.settle()

    async def _open(self) -> None:
        start = await find_start(self.bus, self.subjects, self._known_rules)
        end = (await self.bus.ledger.usage()).last_sequence
        accepted = start.accepted | await self._accepted_differences(start.cell.position + 1)
        reader = await self.bus.ledger.read(start=start.cell.position + 1)
        self.replica = Replica(start.cell, self.me, end_at_start=end, accepted=accepted)
        self._unshown = Unshown(start.lately)
        self._timers.start_from(start.cell)
        self.snapshots.started_from(start)
        if start.snapshot is not None:
            log.info("starting from a snapshot", position=start.cell.position, end=end, me=self.me)
        for payload in start.seals:
            self._order_seal(self.replica, payload)
        self.tasks.start(self._read(reader, self.replica), "control reads")
        self.tasks.start(self._rescue(self.replica), "control rescues")
        self.tasks.start(self._tick(self.replica), "control ticks")
        self.tasks.start(self._measure(), "control measures")
        self.tasks.start(self.watch.listen(), "watch listens")
        self.tasks.start(self._serve(), "control serves")
        self.tasks.start(self.answering.wait(), "control answers")

    async def _serve(self) -> None:
        await self.started.wait()
        for verb in self.intake.verbs:
            self._serving.append(self.answering.start(self.intake.serve(verb, self.answering), f"intake {verb}"))

    async def _accepted_differences(self, start: int) -> frozenset[tuple[int, int]]:
        """Differences that an operator lets stand are known before the replica comes to them."""
        subject = self.subjects.fact("cell", "difference.accepted")
        last = await self.bus.ledger.last(subject)
        if last is None or last.sequence < start:
            return frozenset()
        found: list[tuple[int, int]] = []
        reader = await self.bus.ledger.read([subject], start=start)
        try:
            at = 0
            while at < last.sequence:
                for record in await reader.batch():
                    at = record.sequence
                    key = accepted_differences(record)
                    if key is not None:
                        found.append(key)
        finally:
            await reader.close()
        return frozenset(found)

    # ---- the replica ------------------------------------------------------------------------------------------

    async def _read(self, reader: Reader, replica: Replica) -> None:
        loop = asyncio.get_running_loop()
        behind = True
        try:
            while True:
                if behind and replica.live:
                    behind = False
                    self._caught_up(replica)
                if not behind:
                    self._take_if_due(replica)
                records = await reader.batch()
                at = loop.time()
                for record in records:
                    steps = replica.take(record, at)
                    self._publish(replica)
                    for step in steps:
                        self._follow(replica, step, behind)
                    self._unshown.read(record)
                self.snapshots.read(records, replica.cell.position)
                if behind:
                    await asyncio.sleep(0)
        finally:
            await reader.close()

    def _caught_up(self, replica: Replica) -> None:
        """The past is read: show what may not have been shown, and take part."""
        for _, payload in self._unshown.noted(replica.cell.now):
            self.tasks.spawn(self._show(replica, payload), "show")
        self.started.set()
        log.info("live", position=replica.position, facts=replica.cell.facts, me=self.me)

    def _publish(self, replica: Replica) -> None:
        """What somebody waits for at once; the rest of a step a moment later, out of its way."""
        for fact, said in replica.outgoing():
            if is_urgent(said):
                self._send(replica, fact, said)
            else:
                self._records.append((fact, said))
        if self._records and self._records_due is None:
            self._records_due = asyncio.get_running_loop().call_later(RECORDS_SECONDS, self._publish_records, replica)

    def _publish_records(self, replica: Replica) -> None:
        self._records_due = None
        records, self._records = self._records, []
        for fact, said in records:
            self._send(replica, fact, said)

    def _send(self, replica: Replica, fact: int, said: Said) -> None:
        replica.sent(fact, said.place, asyncio.get_running_loop().time())
        future = self.bus.ledger.send(
            said.subject, said.payload, message_id=f"said.{fact}.{said.place}", publisher=self.me
        )
        future.add_done_callback(lambda done: self._answered(replica, fact, said, done))

    def _answered(self, replica: Replica, fact: int, said: Said, future: asyncio.Future[Appended]) -> None:
        replica.answered(fact, said.place)
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, LogFull):
            self._found_no_room(replica)
        elif error is not None and not isinstance(error, BusError):
            raise error

    def _found_no_room(self, replica: Replica) -> None:
        """What is not stored stays expected, and is said again as what is missing, a moment later."""
        now = asyncio.get_running_loop().time()
        replica.disturbed(now + FULL_RETRY_SECONDS)
        if now - self._told_full >= FULL_LOG_SECONDS:
            self._told_full = now
            log.error("ledger full", missing=len(replica.readback.expected), reason=FULL_REASON)

    async def _rescue(self, replica: Replica) -> None:
        """Publish what the leading replica should have published, once the head of the stream lacks it."""
        loop = asyncio.get_running_loop()
        connections = self.bus.connections
        while True:
            before = loop.time()
            await asyncio.sleep(POLL_SECONDS)
            now = loop.time()
            if now - before > 4 * POLL_SECONDS or self.bus.connections != connections or not self.bus.connected:
                connections = self.bus.connections
                replica.disturbed(now)
                continue
            if not self.started.is_set() and replica.live:
                self.started.set()
            if replica.wants_rescue(now):
                try:
                    usage = await self.bus.ledger.usage()
                except BusError:
                    replica.disturbed(loop.time())
                    continue
                was = replica.leading
                replica.rescue(loop.time(), usage.last_sequence)
                self._publish(replica)
                if replica.leading and not was:
                    log.info("leading", position=replica.position, me=self.me)

    # ---- what follows from a step -------------------------------------------------------------------------------

    def _follow(self, replica: Replica, step: Step, behind: bool) -> None:
        self._timers.note(step)
        self._wake_for_timer(replica)
        for said in step.said:
            if said.receiver == "sealer":
                self._order_seal(replica, said.payload)
            elif said.receiver == "reader" and SHOWN_BY_WORKER in said.payload:
                continue  # the usual end: nothing is left to show, and a task for it would be all that happens
            elif said.receiver == "reader":
                self._unshown.said(said.payload)
                if not behind:
                    self.tasks.spawn(self._show(replica, said.payload), "show")

    def _order_seal(self, replica: Replica, payload: bytes) -> None:
        order = decode_said_body(decode_said(payload).body)
        if isinstance(order, SealTokens):
            self._seals[payload] = order
            self.tasks.spawn(self._seal(replica, order), "seal")

    def _take_if_due(self, replica: Replica) -> None:
        if self.snapshots.due(replica):
            self.tasks.spawn(self.snapshots.take(replica, lambda: self._beside(replica)), "snapshot")

    def want_snapshot(self) -> None:
        """Take one as soon as there is anything new."""
        self.snapshots.want()
        if self.replica is not None:
            self._take_if_due(self.replica)

    def _beside(self, replica: Replica) -> tuple[list[tuple[int, bytes]], list[bytes]]:
        """What a snapshot holds beside the cell: what may be unshown, and which seals were ordered and not stated."""
        self._seals = {text: order for text, order in self._seals.items() if self._is_sealing(replica.cell, order)}
        return self._unshown.noted(replica.cell.now), list(self._seals)

    async def _show(self, replica: Replica, payload: bytes) -> None:
        if not replica.leading:
            await asyncio.sleep(STANDBY_SECONDS / 2)
        ended = decode_said_body(decode_said(payload).body)
        if replica.leading and isinstance(ended, RequestEnded):
            how = {"outcome": ended.outcome, "code": ended.code, "reason": ended.reason[:REASON_LIMIT]}
            log.info("request ended", request=ended.request, **how)
        await self._reader.show(ended)

    async def _seal(self, replica: Replica, order: SealTokens) -> None:
        """Until the cell has taken the statement, whoever made it."""
        await self.started.wait()
        pause = 0.1
        if not replica.leading:
            await asyncio.sleep(STANDBY_SECONDS)
        while self._is_sealing(replica.cell, order):
            try:
                await seal(self.bus, self.subjects, order, self.me)
                log.info("sealed", worker=order.worker, epoch=order.epoch, sequences=len(order.sequences))
            except BusError as error:
                log.warning("seal waits", worker=order.worker, epoch=order.epoch, reason=str(error))
            await asyncio.sleep(pause)
            pause = min(2.0, pause * 2)

    @staticmethod
    def _is_sealing(cell: Cell, order: SealTokens) -> bool:
        actor = cell.actors.get(order.worker)
        return actor is not None and order.epoch in cast(GpuState, actor.state).sealing

    async def _tick(self, replica: Replica) -> None:
        """Timers and watch, in small regular steps; nothing that waits for long, or watch takes it for a stall."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._fire_due(replica)
            await self.watch.look(replica.cell.order, live=replica.live)

    def _fire_due(self, replica: Replica) -> None:
        if replica.live:
            for actor, message_id, payload in self._timers.fired(
                replica.cell, self.bus.wall(), leading=replica.leading
            ):
                self.tasks.spawn(self._fire(replica, actor, message_id, payload), "timer")
        self._wake_for_timer(replica)

    def _wake_for_timer(self, replica: Replica) -> None:
        """Be there when the next timer is due, where that is before the next look: deadlines are not to be late.

        Those who do not lead wait for the look: the leader has stated the fact by then.
        """
        due = self._timers.next_due if replica.live and replica.leading else None
        delay = (due - self.bus.wall()) / 1e9 if due is not None else LOOK_SECONDS
        if self._next_timer is not None:
            self._next_timer.cancel()
            self._next_timer = None
        if delay < LOOK_SECONDS:
            loop = asyncio.get_running_loop()
            self._next_timer = loop.call_later(max(delay, TIMER_SECONDS), self._fire_due, replica)

    async def _measure(self) -> None:
        """The ledger's fill. The answer may take long where the server has much to do."""
        while True:
            with contextlib.suppress(BusError):
                await self.intake.measure()
            await asyncio.sleep(MEASURE_SECONDS)

    async def _fire(self, replica: Replica, actor: str, message_id: str, payload: bytes) -> None:
        try:
            await self.bus.ledger.append(
                self.subjects.fact(actor, "timer.fired"), payload, message_id=message_id, publisher=self.me
            )
        except BusError:
            fact, place = message_id.rsplit(".", 2)[1:]
            self._timers.again(replica.cell, int(fact), int(place))
