"""The driver's shell on the bus in memory, in virtual time: epochs, facts that are never dropped, heartbeats."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from actors.driver import FACTS_IN_FLIGHT, DriverShell, Epoch
from actors.driver_core import Effect
from bus.contract import Record
from bus.memory import MemoryServer
from bus.memory_faults import FINE, AppendFate, NoFaults
from bus.messages import (
    DetachModel,
    DriverLost,
    FactEnvelope,
    Message,
    ModelDetached,
    ProgressReported,
    SaidEnvelope,
    WorkerStarted,
    decode_fact,
    encode,
    extend_chain,
    kind_of,
)
from bus.ordering import FactOrder
from bus.subjects import FactSubject
from chaos.virtual_time import run as run_virtual

NAME = "gpu/s1/0"


class Answering:
    """A driver that answers every effect at once, and states what it is told to."""

    name = NAME

    def __init__(self) -> None:
        self.opened = 0
        self.opening = asyncio.Event()
        self.taken: list[Effect] = []
        self.epochs: list[Epoch] = []
        self.fail = ""

    async def open(self) -> Message:
        self.opened += 1
        self.opening.set()
        return WorkerStarted("s1", 0, memory_bytes=1000, max_slots=4)

    async def run(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        while True:
            effect = await epoch.effect()
            if self.fail:
                raise RuntimeError(self.fail)
            self.taken.append(effect)
            assert isinstance(effect.message, DetachModel)
            epoch.state(ModelDetached(effect.message.model), answers=effect.number)


class Faults(NoFaults):
    def __init__(self) -> None:
        self.fate: Callable[[str], AppendFate] = lambda subject: FINE

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        return self.fate(subject)


class World:
    def __init__(self) -> None:
        self.server = MemoryServer("main")
        self.faults = Faults()
        self.bus = self.server.bus("driver", faults=self.faults, ack_timeout=0.5)
        self.cell = self.server.bus("cell")
        self.driver = Answering()
        self.boots = 0
        self.shell = DriverShell(self.bus, self.bus.subjects, self.driver, boot=self.boot)
        self.chain = ""
        self.number = 0

    def boot(self) -> str:
        self.boots += 1
        return f"boot-{self.boots}"

    async def effect(self) -> None:
        """Say the next effect to the open epoch."""
        epoch = self.driver.epochs[-1]
        if self.number == 0:
            self.chain = epoch.boot
        self.number += 1
        body = encode(DetachModel(f"m{self.number}"))
        self.chain = extend_chain(self.chain, body)
        said = SaidEnvelope(1, 0, 1, msgspec.Raw(body), -1, epoch.number, epoch.boot, self.number, self.chain)
        subject = self.bus.subjects.said(NAME, f"driver/{NAME}", "model.detach")
        await self.cell.ledger.append(subject, encode(said))

    async def lose(self) -> None:
        lost = FactEnvelope("watch", msgspec.Raw(encode(DriverLost(NAME, self.shell.epoch, "silence"))))
        await self.cell.ledger.append(self.bus.subjects.fact(NAME, "driver.lost"), encode(lost))

    def facts(self, kind: str) -> list[Record]:
        subject = self.bus.subjects.fact(NAME, kind)
        return [record for record in self.server.ledger.since(1) if record.subject == subject]

    def taken_facts(self) -> list[Message]:
        """What the cell's order of facts takes of the ledger: every fact once, in order."""
        order = FactOrder()
        taken = []
        for record in self.server.ledger.since(1):
            subject = self.bus.subjects.parse(record.subject)
            if isinstance(subject, FactSubject):
                taken += [fact.message for fact in order.admit(record, subject) if fact.message is not None]
        assert not order.troubles()
        return taken


def in_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time with a shell at work, which is up when the test begins."""

    async def main() -> None:
        world = World()
        running = asyncio.get_running_loop().create_task(world.shell.run())
        await asyncio.sleep(0.1)
        await test(world)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    def run() -> None:
        run_virtual(main())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@in_world
async def test_effects_are_answered_in_an_epoch_of_its_own(world: World) -> None:
    await world.effect()
    await world.effect()
    await asyncio.sleep(0.1)
    assert [effect.number for effect in world.driver.taken] == [1, 2]
    (started,) = world.facts("worker.started")
    assert world.shell.epoch == started.sequence
    answers = [decode_fact(record.payload) for record in world.facts("model.detached")]
    assert [(a.epoch, a.boot, a.count, a.answers) for a in answers] == [
        (started.sequence, "boot-1", 1, 1),
        (started.sequence, "boot-1", 2, 2),
    ]


@in_world
async def test_heartbeats_carry_the_epoch(world: World) -> None:
    beats = await world.cell.subscribe(world.bus.subjects.heartbeats())
    first = await beats.next()
    assert json.loads(first.payload) == {"driver": NAME, "epoch": world.shell.epoch, "boot": "boot-1"}
    began = asyncio.get_running_loop().time()
    await beats.next()
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.25)


def test_no_heartbeat_before_the_epoch_is_known() -> None:
    async def main() -> None:
        world = World()
        world.faults.fate = lambda subject: replace(FINE, stored=False)
        beats = await world.cell.subscribe(world.bus.subjects.heartbeats())
        running = asyncio.get_running_loop().create_task(world.shell.run())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3.0):
                await beats.next()
        world.faults.fate = lambda subject: FINE
        await beats.next()
        assert world.driver.opened == 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run_virtual(main())


@in_world
async def test_a_fact_is_sent_until_it_is_acknowledged(world: World) -> None:
    """Lost on the way, or stored and its answer lost: the ledger gets it, the cell takes it once."""
    fates = [replace(FINE, stored=False), replace(FINE, acknowledged=False), FINE]
    world.faults.fate = lambda subject: fates.pop(0) if fates else FINE
    for _ in range(3):
        await world.effect()
    await asyncio.sleep(5.0)
    assert world.driver.epochs[-1].backlog == 0
    assert world.taken_facts()[1:] == [ModelDetached("m1"), ModelDetached("m2"), ModelDetached("m3")]
    assert world.shell.endings == 0


@in_world
async def test_an_outage_drops_no_fact(world: World) -> None:
    epoch = world.driver.epochs[-1]
    world.server.cut(world.bus)
    for _ in range(10):
        epoch.state(ProgressReported(()))
    await asyncio.sleep(4.0)
    assert epoch.backlog == 10
    world.server.heal(world.bus)
    await asyncio.sleep(1.0)
    assert epoch.backlog == 0
    assert len(world.taken_facts()) == 11
    assert world.shell.endings == 0


@in_world
async def test_no_effect_is_handed_out_while_too_many_facts_wait(world: World) -> None:
    world.faults.fate = lambda subject: replace(FINE, stored=False)
    epoch = world.driver.epochs[-1]
    for _ in range(FACTS_IN_FLIGHT):
        epoch.state(ProgressReported(()))
    await world.effect()
    await asyncio.sleep(3.0)
    assert world.driver.taken == []
    world.faults.fate = lambda subject: FINE
    await asyncio.sleep(3.0)
    assert len(world.driver.taken) == 1


@in_world
async def test_its_own_closing_starts_a_new_epoch(world: World) -> None:
    first = world.shell.epoch
    await world.lose()
    await asyncio.sleep(0.5)
    assert world.driver.opened == 2
    assert world.shell.epoch > first
    assert "declared lost" in world.shell.last_ending
    world.number = 0
    await world.effect()
    await asyncio.sleep(0.1)
    assert [effect.number for effect in world.driver.taken] == [1]


@in_world
async def test_a_ledger_that_is_another_one_starts_a_new_epoch(world: World) -> None:
    world.server.ledger.recreate()
    await asyncio.sleep(0.5)
    assert world.driver.opened == 2
    assert world.shell.epoch == 1
    assert len(world.facts("worker.started")) == 1


@in_world
async def test_an_exception_in_the_driver_starts_a_new_epoch(world: World) -> None:
    world.driver.fail = "the disk is on fire"
    await world.effect()
    await asyncio.sleep(0.5)
    assert "the disk is on fire" in world.shell.last_ending
    assert world.driver.opened == 2


@in_world
async def test_pauses_between_failing_epochs_grow(world: World) -> None:
    world.driver.fail = "no"
    openings: list[float] = []
    world.driver.opening.clear()
    for _ in range(7):
        world.number = 0
        await world.effect()
        await world.driver.opening.wait()
        world.driver.opening.clear()
        openings.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.001)
    pauses = [late - early for early, late in itertools.pairwise(openings)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0], abs=0.01)
    world.driver.fail = ""
    before = world.driver.opened
    await asyncio.sleep(20.0)
    world.driver.fail = "again"
    world.number = 0
    await world.effect()
    await asyncio.sleep(0.1)
    assert world.driver.opened == before + 1


@in_world
async def test_a_killed_process_leaves_nothing_behind(world: World) -> None:
    world.server.kill(world.bus)
    world.driver.epochs[-1].state(ProgressReported(()))
    await asyncio.sleep(10.0)
    assert [kind_of(message) for message in world.taken_facts()] == ["worker.started"]
