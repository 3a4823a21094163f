"""One simulated cell: real shells on the bus in memory, in virtual time, under the faults of one seed.

    faults (some seconds) ──▶ everything heals, everybody is back ──▶ until all is quiet ──▶ verdict (chaos.aftermath)

While faults last, anybody may die at any moment, also at the very moment at which a record is stored (before its
acknowledgement); connections break, processes freeze, the server is away. Afterwards nothing goes wrong any more, and
everything that was accepted has to come to its end within a bounded time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from actors.control import Control
from actors.driver import DriverShell
from actors.generations import RotationRefused, droppable_before, two_snapshots
from actors.readback import Difference
from actors.rules import KNOWN_RULES, UnknownRules
from actors.store_driver import StoreDriver
from actors.worker_driver import WorkerDriver
from bus.contract import BusError, Record
from bus.memory import MemoryServer
from bus.messages import (
    FactEnvelope,
    ModelAdded,
    RequestsConfigured,
    ServerDrained,
    decode_said,
    decode_said_body,
    encode,
    kind_of,
)
from bus.subjects import Subjects
from chaos.clients import Application, draw_plans
from chaos.deaths import Death, Deaths, of_server
from chaos.drains import Drainer
from chaos.faults import SeededFaults
from chaos.machines import SimulatedRuntime, SimulatedStorage, seeded, source_of
from chaos.moves import Mover
from chaos.observer import Observer
from chaos.operators import Operator
from chaos.options import Options
from chaos.phases import Phases
from chaos.processes import Process, WatchedBus
from chaos.promises import Promise, Violations
from chaos.starts import can_start
from chaos.upgrades import Upgrade

CELL = "sim"
QUIET_SECONDS = 120.0
"""So long after the last fault everything has to be over; the longest single wait in a shell is 30 s."""
STEADY_SECONDS = 3.0
ACK_SECONDS = 2.0
SAMPLE_SECONDS = 0.5
KEPT_SECONDS = 0.0
"""What a rotation of the ledger leaves there at the least, where it is a minute in life."""


class Sample:
    """The state of one replica at one position."""

    __slots__ = ("digest", "position", "replica")

    def __init__(self, replica: str, position: int, digest: str) -> None:
        self.replica, self.position, self.digest = replica, position, digest


class World:
    """Make it, `await run()`, then look at `violations`, `observer` and what `chaos.aftermath` makes of them."""

    def __init__(self, options: Options, say: Callable[[float, str], None] | None = None) -> None:
        self.options = options
        self.violations = Violations()
        self.events: list[tuple[float, str]] = []
        self.observer = Observer(self.violations, self.now)
        self.server = MemoryServer(CELL, dedupe_seconds=options.dedupe_seconds)
        self.subjects = Subjects(CELL)
        self.phases = Phases(self.subjects)
        self.deaths = Deaths(seeded("deaths of moves", options.seed), options.crash_at_move, [], self.phases)
        self.starts: dict[str, Any] = {}
        self.samples: list[Sample] = []
        self.troubled = True
        self.quiet_after = 0.0
        self._stored_count = 0
        self.controls: dict[str, Control] = {}
        self.processes: list[Process] = []
        self.applications: list[Application] = []
        self.operator: Operator | None = None
        self.drainer: Drainer | None = None
        self.upgrade = Upgrade(
            seeded("upgrade", options.seed), options, self.server.bus("upgrade"), self.subjects, self.note
        )
        self._say = say
        self._random = seeded("world", options.seed)
        self._snapshot_random = seeded("snapshots", options.seed)
        self._faults: list[SeededFaults] = []
        self._lines: dict[str, int] = {}
        self._boots: dict[str, Process] = {}
        self._storages = {
            f"s{n}": SimulatedStorage(options, n, self._active, self._over) for n in range(options.servers)
        }
        for storage in self._storages.values() if options.serving else ():
            storage.peers = {f"http://{server}": peer for server, peer in self._storages.items()}

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def note(self, text: str) -> None:
        """Something that a person who looks at this world wants to know."""
        self.events.append((self.now(), text))
        if self._say is not None:
            self._say(self.now(), text)

    def _active(self) -> bool:
        return self.troubled

    def _over(self, text: str) -> None:
        self.violation(Promise.BUDGETS, text)

    # ---- the whole run ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        self.server.observe(self._stored)
        self._build()
        await self._configure()
        helpers = [asyncio.ensure_future(self._sample()), asyncio.ensure_future(self._disturb())]
        if self.options.generations:
            helpers.append(asyncio.ensure_future(self._make_generations()))
        readers = self._open_applications()
        self.operator = Operator(
            seeded("operator", self.options.seed), self.options, self._connect("operator"), CELL, self.note
        )
        readers.append(asyncio.ensure_future(self.operator.run(self._storages.values())))
        mover = Mover(
            seeded("moves", self.options.seed),
            self.options,
            self._connect("mover"),
            self.subjects,
            self.note,
            self._active,
        )
        helpers.append(asyncio.ensure_future(mover.run()))
        self.drainer = Drainer(
            seeded("drains", self.options.seed),
            self.options,
            self._connect("drainer"),
            self.subjects,
            self.note,
            self._active,
        )
        readers.append(asyncio.ensure_future(self.drainer.run()))
        controls = [process for process in self.processes if process.name.startswith("control-")]
        readers.append(asyncio.ensure_future(self.upgrade.run(controls)))
        await asyncio.sleep(self.options.fault_seconds)
        self._calm_down()
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                await self._until_quiet()
            self.quiet_after = self.now() - self.options.fault_seconds
        except TimeoutError:
            what = f"{QUIET_SECONDS:g} s after the last fault: {self.unquiet() or 'it does not stay quiet'}"
            self.violation(Promise.QUIET, what)
        for task in [*helpers, *readers]:
            task.cancel()
        await asyncio.gather(*helpers, *readers, return_exceptions=True)
        for process in self.processes:
            await process.stop()

    def violation(self, promise: Promise, text: str) -> None:
        self.violations.add(promise, self.now(), text)
        self.note(f"VIOLATION {promise.name}: {text}")

    # ---- who is there -----------------------------------------------------------------------------------------

    def _build(self) -> None:
        options = self.options
        for number in range(options.controls):
            self._process(f"control-{number}", self._control)
        for server, storage in self._storages.items():
            self._process(f"store/{server}", self._store(server, storage))
            for index in range(options.workers):
                self._process(f"gpu/{server}/{index}", self._worker(server, index))
        self.deaths.names += [process.name for process in self.processes]
        for process in self.processes:
            asyncio.get_running_loop().call_later(0.2 * self._random.random(), process.start)

    def _process(self, name: str, main: Callable[[WatchedBus, str], Any]) -> None:
        self.processes.append(Process(name, main, self._connect, self._failed, self.note))

    def _connect(self, name: str) -> WatchedBus:
        self._lines[name] = self._lines.get(name, 0) + 1
        random = seeded("faults", self.options.seed, name, self._lines[name])
        faults = SeededFaults(random, self.options.odds, self.options.slow_links)
        faults.active = self.troubled
        self._faults.append(faults)
        offset = random.randint(-50_000_000, 50_000_000) if self.troubled else 0
        bus = self.server.bus(name, faults=faults, ack_timeout=ACK_SECONDS, clock_offset_ns=offset)
        return WatchedBus(bus, faults, self.observer.published)

    def _failed(self, life: str, error: BaseException) -> None:
        promise = Promise.REPLAY_AGREES if isinstance(error, Difference) else Promise.NO_FAILURE
        self.violation(promise, f"{life} ended with {type(error).__name__}: {error}")

    async def _control(self, bus: WatchedBus, life: str) -> None:
        name = life.rpartition(".")[0]
        known = self.upgrade.known_rules(name)
        control = Control(bus, CELL, life, snapshot_facts=self.options.snapshot_facts, known_rules=known)
        self.controls[name] = control
        self._boots[life] = self._named(name)
        try:
            await control.run()
        except UnknownRules as error:
            if known == KNOWN_RULES:
                raise
            self.note(f"{life} is silent: {error}")
        finally:
            if self.controls.get(name) is control:
                del self.controls[name]
        await asyncio.get_running_loop().create_future()

    def _store(self, server: str, storage: SimulatedStorage) -> Callable[[WatchedBus, str], Any]:
        async def main(bus: WatchedBus, life: str) -> None:
            driver = StoreDriver(
                server,
                dram_bytes=self.options.dram_bytes,
                storage=storage,
                ssd_bytes=self.options.ssd_bytes,
                address=f"http://{server}" if self.options.serving else "",
            )
            await DriverShell(bus, self.subjects, driver, boot=self._boot(f"store/{server}", life)).run()

        return main

    def _worker(self, server: str, index: int) -> Callable[[WatchedBus, str], Any]:
        name = f"gpu/{server}/{index}"

        async def main(bus: WatchedBus, life: str) -> None:
            random = seeded(self.options.seed, life)
            runtime = SimulatedRuntime(random, self.options, self._active, self._admitted, self._over)
            driver = WorkerDriver(
                bus,
                self.subjects,
                server,
                index,
                memory_bytes=self.options.memory_bytes,
                max_slots=self.options.max_slots,
                runtime=runtime,
            )
            await DriverShell(bus, self.subjects, driver, boot=self._boot(name, life)).run()

        return main

    def _boot(self, name: str, life: str) -> Callable[[], str]:
        epochs = 0

        def boot() -> str:
            nonlocal epochs
            epochs += 1
            made = f"{life}.{epochs}"
            self._boots[made] = self._named(name)
            return made

        return boot

    def _named(self, name: str) -> Process:
        return next(process for process in self.processes if process.name == name)

    def _admitted(self, model: str, start: Any) -> None:
        self.starts.setdefault(start.key.partition("/")[0], (model, start))

    async def _configure(self) -> None:
        """Tell the cell by whose deaths a request is quarantined and what can be fetched, as an operator would."""
        bus = self.server.bus("operator")
        configured = RequestsConfigured(deaths_limit=self.options.deaths_limit, dead_letters=True)
        added = [("placement", ModelAdded(model, source_of(model))) for model in self.options.sources]
        for actor, message in (("requests", configured), *added):
            await bus.ledger.append(
                self.subjects.fact(actor, kind_of(message)),
                encode(FactEnvelope("operator", msgspec.Raw(encode(message)))),
            )
        await bus.close()

    def _open_applications(self) -> list[asyncio.Future[None]]:
        plans = draw_plans(seeded("plans", self.options.seed), self.options)
        lines = [self._connect(f"client-{number}") for number in range(4)]
        for plan in plans:
            for index, member in enumerate(plan.members):
                self.observer.choices[plan.request, index] = member
            bus = lines[plan.number % 3]
            self.applications.append(Application(plan, bus, CELL, self.observer, self.note))
            if plan.twin:
                self.applications.append(Application(plan, lines[3], CELL, self.observer, self.note))
        return [asyncio.ensure_future(application.run()) for application in self.applications]

    # ---- what goes wrong --------------------------------------------------------------------------------------

    def _stored(self, log: str, record: Record) -> None:
        if log == "snapshots":
            self._snapshot_stored(record)
            return
        if log == "parts":
            return  # their publishers are applications, which do not die
        self.observer.stored(log, record)
        death = None
        if log != "ledger":
            self.phases.page(self.observer.attempt)
        else:
            kind = self.phases.stored(record)
            if kind == "server.drained":
                self._leave(record)
            death = self.deaths.draw(kind) if self.troubled else None
        if self._say is not None:
            text = record.payload.decode("utf-8", "replace")
            self._say(self.now(), f"{log} {record.sequence} {record.subject} [{record.publisher}] {text}")
        self._stored_count += 1
        publisher = self._boots.get(record.publisher)
        where = f"{log} {record.sequence}"
        if self._stored_count == self.options.crash_at:
            self._kill_at(publisher, where, self.options.crash_before_answer)
        elif death is not None:
            self._die(death, where)
        elif self.troubled and self._random.random() < self.options.crash_at_record:
            victim = publisher if self._random.random() < 0.5 else None
            self._kill_at(victim or self._anybody(), where, self._random.random() < 0.5)

    def _snapshot_stored(self, record: Record) -> None:
        """A piece of a snapshot, or its manifest: its writer may die of it, and the disk may lose some of it."""
        random = self._snapshot_random
        if not self.troubled:
            return
        self._see_start()
        where = f"snapshots {record.sequence}"
        if random.random() < self.options.snapshot_trouble:
            self._kill_at(self._boots.get(record.publisher), where, random.random() < 0.5)
        if random.random() < self.options.snapshot_trouble:
            cut = random.randrange(len(record.payload))
            self.note(f"the disk loses what stands in {where} behind byte {cut}")
            self.server.snapshots.alter(record.sequence, record.payload[:cut])

    def _see_start(self) -> None:
        if not can_start(self.server.ledger, self.server.snapshots, self.subjects):
            what = f"the ledger begins at {self.server.ledger.first_sequence}, and no whole snapshot leads up to it"
            self.violation(Promise.CAN_START, what)

    def _kill_at(self, victim: Process | None, where: str, before_answer: bool) -> None:
        if victim is None:
            return
        if before_answer:
            self._kill(victim, f"as {where} is stored, before its acknowledgement")
        else:
            when = f"just after {where} was stored"
            asyncio.get_running_loop().call_later(0.002, lambda: self._kill(victim, when))

    def _die(self, death: Death, where: str) -> None:
        """A death during moves; counted with what the moves have come to by then."""

        def die() -> None:
            standing = self.phases.standing()
            victims = [process for process in self.processes if process.name in death.processes and process.up]
            if not self.troubled or not (victims or death.bus) or not self.phases.moving:
                return
            self.deaths.tally.count(death, standing)
            for process in victims:
                self._kill(process, f"{when} {where} ({death.kind})")
            if death.bus:
                self.note(f"the server dies {when} {where} ({death.kind})")
                self.server.outage(self._random.uniform(0.1, 1.5))

        when = "before the acknowledgement of" if death.before_answer else "just after"
        if death.before_answer:
            die()
        else:
            asyncio.get_running_loop().call_later(0.002, die)

    def _leave(self, record: Record) -> None:
        """A server that is drained and is to leave ends, as `longshore node` does; somebody starts it again later."""
        told = decode_said_body(decode_said(record.payload).body)
        if not isinstance(told, ServerDrained) or not told.leave:
            return
        back_after = self._random.uniform(0.3, 2.0)
        self.note(f"{told.server} is drained, leaves, and comes back in {back_after:.2f} s")
        for name in of_server(self.deaths.names, told.server):
            asyncio.get_running_loop().call_later(0.002, self._named(name).die, back_after)

    def _anybody(self) -> Process:
        return self._random.choice(self.processes)

    def _kill(self, process: Process, when: str) -> None:
        if not self.troubled or not process.up:
            return
        back_after = self._random.choice((0.05, 0.3, 1.0, 2.5)) * self._random.uniform(0.5, 1.5)
        self.note(f"{process.name} dies {when}; back in {back_after:.2f} s")
        process.die(back_after)

    async def _disturb(self) -> None:
        while self.options.disturbances:
            await asyncio.sleep(self._random.expovariate(1 / self.options.disturb_every))
            if not self.troubled:
                return
            kind = self._random.choice(self.options.disturbances)
            process = self._anybody()
            seconds = self._random.choice((0.2, 0.8, 1.5, 3.0)) * self._random.uniform(0.7, 1.3)
            if kind == "outage":
                self.note(f"the server is away for {seconds:.2f} s")
                self.server.outage(seconds)
            elif process.bus is None:
                continue
            elif kind == "crash":
                self._kill(process, "out of the blue")
            elif kind == "cut":
                self.note(f"{process.name} loses its connection for {seconds:.2f} s")
                self.server.outage(seconds, process.bus.memory)
            else:
                self.note(f"nothing of {process.name} arrives, nor anything at it, for {seconds:.2f} s")
                process.bus.faults.stall(seconds)

    async def _make_generations(self) -> None:
        """Drop the ledger's beginning again and again, as `actors.generations` does once its recording is verified.

        What is kept is so young that processes which are away miss something, and have to find that out.
        """
        bus = self._connect("rotation")
        while True:
            await asyncio.sleep(self._snapshot_random.uniform(0.5, 3.0))
            try:
                first = (await bus.ledger.usage()).first_sequence
                newest, cut = await two_snapshots(bus, self.subjects, first, KEPT_SECONDS)
                before, _ = droppable_before(CELL, newest, cut)
                if before > first:
                    self.note(f"the ledger before {before} is dropped")
                    await bus.ledger.drop(before)
                    self._see_start()
            except (RotationRefused, BusError) as error:
                if self._say is not None:
                    self._say(self.now(), f"nothing is dropped: {error}")

    def _calm_down(self) -> None:
        self.note("the faults are over")
        self.troubled = False
        for faults in self._faults:
            faults.end()
        for process in self.processes:
            if process.bus is not None:
                self.server.heal(process.bus.memory)
            process.start()

    # ---- when it is over --------------------------------------------------------------------------------------

    async def _until_quiet(self) -> None:
        """Until all has been quiet for a while: also until nobody is missed who fell silent before the faults' end."""
        since = self.now()
        while self.now() - since < STEADY_SECONDS:
            if self.unquiet():
                since = self.now()
            await asyncio.sleep(0.25)

    def unquiet(self) -> str:
        """What is still going on; empty when all is quiet."""
        reading = [application.plan.key for application in self.applications if not application.done]
        if reading:
            return f"{len(reading)} answers are not read to their end: {', '.join(reading[:5])}"
        if self.operator is not None and not self.operator.done:
            return "the operator has not done everything yet"
        if self.drainer is not None and not self.drainer.done:
            return "drained servers are not back in service yet"
        if not self.upgrade.done:
            return "the upgrade is not over yet"
        last = self.server.ledger.last_sequence
        if len(self.controls) < self.options.controls:
            return f"{len(self.controls)} of {self.options.controls} controls are up"
        for name, control in self.controls.items():
            if control.replica is None or control.replica.position < last:
                return f"{name} is behind"
            if control.replica.readback.expected:
                return f"{name} misses {len(control.replica.readback.expected)} outputs"
            for driver, link in control.replica.cell.links.items():
                if link.unanswered:
                    return f"{driver} has not answered {dict(link.unanswered)}"
        drivers = next(iter(self.controls.values())).replica
        wanted = self.options.servers * (1 + self.options.workers)
        if drivers is not None and len(drivers.cell.order.state.drivers) < wanted:
            return f"{len(drivers.cell.order.state.drivers)} of {wanted} drivers are up"
        return ""

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self._see_start()
            for name, control in self.controls.items():
                if control.replica is not None and not control.silent:
                    cell = control.replica.cell
                    self.samples.append(Sample(name, cell.position, cell.digest()))
