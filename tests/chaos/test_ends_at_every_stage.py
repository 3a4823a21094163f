"""Cancellations and deadlines that come while a request is queued, its model loads, its prompt is computed, or it
decodes: it ends within a step, and what went on for it alone ends, too. On real shells in virtual time.

That they come while it moves is in `test_move_failures`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from staged import LENGTH, MOVE_AT, Staged, nothing, options, plan

from actors.placement_state import PlacementState
from actors.replay import state_at
from actors.rules import KNOWN_RULES
from actors.store_state import StoreState
from bus.contract import Record
from bus.messages import decode_fact, decode_said
from bus.subjects import FactSubject
from chaos.clients import Plan
from chaos.options import Options
from chaos.run import Verdict, run_world
from chaos.world import CELL

MODEL = "model-0"
BEGIN = 3.0
"""When requests come: by then a control leads, so that nobody waits for its silence."""
LOAD_SECONDS = 2.0
SHORTEST_STEP_SECONDS, STEP_SECONDS = 0.005, 0.035
"""Of a simulated device of `step_ms` 20."""
WAYS_SECONDS = 0.03
"""For the order to reach the worker, and for its answer to be durable and come back."""
PROMPT = "x" * 2000
CHUNK = 8
END = {"cancel.requested": "cancelled", "timer.fired": "deadline"}


@dataclass(frozen=True)
class Stage:
    """`kind`: the first record after which the end is ordered, so many virtual seconds later; with `position`, once
    that is durable. `held`: a worker has it by then. `others`: when further requests for the model come, in seconds
    from `BEGIN` on; `late`: the first comes when the model is loaded; `away`: it lies on no disk of the cell;
    `moved`: there is a second server, and the first is to move to it."""

    kind: str = ""
    delay: float = 0.0
    position: int = 0
    held: bool = False
    prompt: str = "hello"
    others: tuple[float, ...] = ()
    away: bool = False
    late: bool = False
    moved: bool = False


STAGES = {
    "queued behind another": Stage("request.place", 0.2, others=(-0.2,), late=True),
    "queued while the model loads for another": Stage("request.place", 0.2, others=(-0.2,)),
    "loading": Stage("model.load", 0.5),
    "attaching": Stage("model.attach", 0.0),
    "its prompt is gathered": Stage("sequence.start", 0.0, held=True),
    "prefill": Stage("sequence.start", 0.5, held=True, prompt=PROMPT),
    "decode": Stage(position=20, held=True),
}


class Ending(Staged):
    """The first request is to end at a stage. `seen`: records about it, and about models, with time and cause."""

    def __init__(self, options: Options, say: Any, stage: Stage, act: Callable[[Ending], None], plans: list[Plan]):
        super().__init__(options, say, "", nothing, plans, moves=int(stage.moved))
        self.at, self.what, self.done = stage, act, False
        self.seen: list[tuple[str, float, int, dict[str, Any]]] = []
        (card,) = options.models
        for storage in self._storages.values():
            storage.cards = {} if stage.away else {card.model: card}
            storage.bytes_per_second = int(card.weight_bytes / LOAD_SECONDS)

    async def _configure(self) -> None:
        await super()._configure()
        for at in (1.0, 1.6, 2.2):
            asyncio.get_running_loop().call_later(at, self.migrate, "", "0" * 32)

    def _stored(self, log: str, record: Record) -> None:
        super()._stored(log, record)
        if log == "tokens" and not self.at.kind and self.durable >= self.at.position:
            self._do()
        if log != "ledger":
            return
        is_fact = isinstance(self.subjects.parse(record.subject), FactSubject)
        envelope: Any = (decode_fact if is_fact else decode_said)(record.payload)
        fields = msgspec.json.decode(envelope.body)
        request = self.plans[0].request
        if request not in (fields.get("request", request), fields.get("about")):
            return
        kind = ".".join(record.subject.rsplit(".", 2)[1:])
        cause = record.sequence if is_fact else envelope.fact
        self.seen.append((kind, self.now(), cause, fields))
        mine = fields.get("request") == request or kind.startswith("model.")
        if mine and kind == self.at.kind:
            asyncio.get_running_loop().call_later(self.at.delay, self._do)

    def _do(self) -> None:
        if not self.done:
            self.done = True
            self.seen.append(("reached", self.now(), 0, {}))
            self.what(self)

    def of(self, *kinds: str) -> list[tuple[float, int]]:
        return [(at, cause) for kind, at, cause, _ in self.seen if kind in kinds]

    def kinds_of_the_first(self) -> list[str]:
        request = self.plans[0].request
        return [kind for kind, _, _, fields in self.seen if fields.get("request") == request]

    def resident(self) -> list[str]:
        return [model for storage in self._storages.values() for model in storage.resident]


@dataclass
class Case:
    stage: Stage
    deadline_ms: int = 0
    plans: list[Plan] = field(init=False)

    def __post_init__(self) -> None:
        at = BEGIN + (LOAD_SECONDS + 0.5 if self.stage.late else 0.0)
        first = replace(plan(0, MODEL), at=at, prompt=self.stage.prompt, deadline_ms=self.deadline_ms)
        others = [replace(plan(n, MODEL), at=BEGIN + at) for n, at in enumerate(self.stage.others, 1)]
        self.plans = [first, *others]

    def run(self, act: Callable[[Ending], None]) -> tuple[Verdict, Ending]:
        card = options().models[0]
        card = msgspec.structs.replace(card, context=4096)
        chosen = options(
            servers=2 if self.stage.moved else 1,
            models=(card,),
            memory_bytes=card.weight_bytes + 4096 * card.kv_bytes_per_token,
            max_slots=1,
            requests=len(self.plans),
            prefill_chunk=CHUNK,
            fault_seconds=10.0,
            rules=KNOWN_RULES[-1],
            sources=(MODEL,) if self.stage.away else (),
            remote_times=1,
        )
        worlds: list[Ending] = []

        def make(options: Options, say: Any) -> Ending:
            worlds.append(Ending(options, say, self.stage, act, self.plans))
            return worlds[0]

        return run_world(chosen, make=make), worlds[0]


def wait(world: Ending) -> None:
    return


def ended(stage: Stage, order: str) -> Ending:
    """A world in which the first request has been ended so at this stage, and nothing else went wrong."""
    if order == "cancel.requested":
        verdict, world = Case(stage).run(lambda world: world.cancel())
    else:
        _, calm = Case(stage).run(wait)
        ((accepted, _),) = calm.of("request.accepted")
        ((reached, _),) = calm.of("reached")
        verdict, world = Case(stage, max(1, round((reached - accepted) * 1000))).run(wait)
    assert verdict.passed, f"{list(map(str, verdict.violations))}\n{verdict.events}"
    first, *others = world.applications
    assert world.done, "the stage was not reached"
    assert first.end == END[order]
    assert all(other.end == "length" and other.read == [LENGTH] for other in others)
    return world


@pytest.mark.parametrize("order", END)
@pytest.mark.parametrize("name", STAGES)
def test_it_ends_within_a_step(name: str, order: str) -> None:
    stage = STAGES[name]
    world = ended(stage, order)
    ((ordered, fact),) = world.of(order)
    (end, cause), *_ = world.of("request.ended")
    positions = world.applications[0].read[0]
    if order == "timer.fired":
        ((_, _, _, timer),) = [one for one in world.seen if one[0] == "timer.fired"]
        assert ordered - (timer["due"] / 1e9 - 1.7e9) <= 2 * WAYS_SECONDS, "stated when it is due"
    if stage.held:
        assert end - ordered <= STEP_SECONDS + WAYS_SECONDS
        assert positions <= stage.position + (STEP_SECONDS + 3 * WAYS_SECONDS) / SHORTEST_STEP_SECONDS
        assert stage.prompt != PROMPT or not positions, "its prompt was not computed to its end"
    else:
        assert cause == fact, "in the very step of the order"
        assert not positions and "sequence.start" not in world.kinds_of_the_first()


@pytest.mark.parametrize("order", END)
@pytest.mark.parametrize("away", [False, True], ids=["on the disk", "elsewhere"])
def test_a_load_for_it_alone_is_abandoned(away: bool, order: str) -> None:
    world = ended(replace(STAGES["loading"], away=away), order)
    ((ordered, fact),) = world.of(order)
    ((_, cause),) = world.of("load.cancel")
    assert cause == fact, "the load is broken off in the very step of the order"
    ((_, _, _, failed),) = [one for one in world.seen if one[0] == "load.failed"]
    assert failed["cancelled"] and world.of("load.failed")[0][0] - ordered <= WAYS_SECONDS
    assert not world.of("model.loaded", "model.attach") and not world.resident()
    records = world.observer.records
    actors = state_at(CELL, records, records[-1].sequence).actors
    placement, store = actors["placement"].state, actors["store/s0"].state
    assert isinstance(placement, PlacementState) and isinstance(store, StoreState)
    assert not placement.workers["gpu/s0/0"].instances and not placement.servers["s0"].loading
    assert not store.models[MODEL].loading and not store.models[MODEL].leases and not store.dram_used()


@pytest.mark.parametrize("order", END)
def test_a_load_for_its_move_alone_is_abandoned(order: str) -> None:
    world = ended(Stage("slot.want", 0.5, MOVE_AT, held=True, moved=True), order)
    ((ordered, _),) = world.of(order)
    ((cancelled, _),) = world.of("load.cancel")
    assert cancelled - ordered <= STEP_SECONDS + WAYS_SECONDS
    assert len(world.of("model.load")) == 2 and len(world.of("model.loaded", "model.attach")) == 2, "there and not here"
    placement = state_at(CELL, world.observer.records, world.observer.records[-1].sequence).actors["placement"].state
    assert isinstance(placement, PlacementState) and not placement.wishes and not placement.kept
    assert sorted(len(worker.instances) for worker in placement.workers.values()) == [0, 1]
    assert not any(server.loading for server in placement.servers.values())


@pytest.mark.parametrize("order", END)
def test_a_load_that_another_one_waits_for_goes_on(order: str) -> None:
    world = ended(replace(STAGES["loading"], delay=1.0, others=(0.5,)), order)
    assert len(world.of("model.load")) == len(world.of("model.loaded")) == 1 and not world.of("load.cancel")


def test_who_comes_while_a_load_is_being_abandoned_gets_it_all_the_same() -> None:
    """The other one is accepted within a few milliseconds of the cancellation, before it and after it."""
    for early in range(-6, 7, 2):
        _, calm = Case(STAGES["loading"]).run(wait)
        ((reached, _),) = calm.of("reached")
        world = ended(replace(STAGES["loading"], others=(reached - BEGIN + early / 1000,)), "cancel.requested")
        assert len(world.of("model.loaded")) == 1 and world.resident() == [MODEL]
