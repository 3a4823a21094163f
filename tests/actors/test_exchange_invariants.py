"""Whatever comes in whatever order: exchanges reserve no more than there is, and leave nothing behind.

Workers and migration are played here: instances start or fail, moves are described or not, kept slots are taken or
given back, requests end at any moment, workers are lost. After every message memory and slots are counted, and a copy
of the actor that was written and read back has to have said the same.
"""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
from cell_bench import MS, card
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.placement import Placement
from actors.placement_state import PlacementState
from bus.messages import (
    AbandonStart,
    HeldModel,
    InstanceFailed,
    InstanceReady,
    InstanceStopped,
    Message,
    MoveWanted,
    PlacementExchanged,
    PlacementRefused,
    PlacementSpread,
    PlaceRequest,
    RequestPlaced,
    ServerReady,
    SlotDenied,
    SlotKept,
    SlotReleased,
    SlotTaken,
    StartInstance,
    StopInstance,
    WantSlot,
    WorkerGone,
    WorkerReady,
)

MODELS = "abcd"
WORKERS = ("gpu/s/0", "gpu/t/0", "gpu/t/1", "gpu/u/0")
SLOTS = 2
GOING = {"stopping", "given up"}


class Play:
    """`running`: (attempt, worker) by request; `moving`: (heir's attempt, its worker once kept) by request;
    `instances`: what each worker was told, as it is there: starting, running, stopping, given up."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.actor = Placement("placement")
        self.actor.rules = 3 + seed % 2
        self.now, self.accepted, self.exchanges, self.spreads = 1, 0, 0, 0
        self.model: dict[str, str] = {}
        self.lost: str | None = None
        """The worker whose end is being told: moves to it have ended with it."""
        self.attempts: dict[str, int] = {}
        self.waiting: dict[str, bool] = {}
        self.running: dict[str, str] = {}
        self.moving: dict[str, tuple[int, str]] = {}
        self.described: dict[str, str] = {}
        self.instances: dict[str, dict[str, str]] = {}
        for number, server in enumerate("stu"):
            held = [HeldModel(msgspec.structs.replace(card(m), weight_bytes=40), self.random.choice(("ssd", "dram")))
                    for place, m in enumerate(MODELS) if m == "a" or place % 3 == number]  # fmt: skip
            self.tell(ServerReady(server, self.random.choice((80, 400)), tuple(held)))
        for worker in WORKERS:
            self.worker_up(worker)

    def worker_up(self, worker: str) -> None:
        self.instances[worker] = {}
        self.tell(WorkerReady(worker, worker.split("/")[1], self.random.choice((55, 60, 120)), SLOTS))

    def tell(self, message: Message) -> None:
        self.now += self.random.choice((1, MS, 50 * MS, 900 * MS, 12_000 * MS))
        copy = Placement("placement")
        copy.rules = self.actor.rules
        copy.state = msgspec.msgpack.decode(msgspec.msgpack.encode(self.actor.state), type=PlacementState)
        said = self.actor.handle(message, self.now)
        assert copy.handle(message, self.now) == said
        self.check()
        for to in said:
            self.hear(to.receiver, to.message)

    def hear(self, receiver: str, message: Any) -> None:
        if isinstance(message, PlacementExchanged):
            self.exchanges += 1
            assert message.migrate_ns > message.move_ns and (message.moves or message.stops)
        elif isinstance(message, PlacementSpread):
            self.spreads += 1
            assert not self.waiting and not [r for r, at in self.running.items() if at == message.to]
        elif isinstance(message, StartInstance):
            for victim in message.evict:
                self.stopping(receiver, victim)
            self.instances[receiver][message.model] = "starting"
        elif isinstance(message, StopInstance):
            self.stopping(receiver, message.model)
        elif isinstance(message, AbandonStart):
            assert not [r for r in self.waiting if self.model[r] == message.model]
            if self.random.random() < 0.5:  # else it has come as far as the device
                self.instances[receiver][message.model] = "given up"
        elif isinstance(message, RequestPlaced):
            del self.waiting[message.request]
            assert self.instances[message.worker][self.model[message.request]] == "running"
            self.running[message.request] = message.worker
        elif isinstance(message, PlacementRefused):
            del self.waiting[message.request]
        elif isinstance(message, MoveWanted):
            _, heir = self.moving.get(message.request, (0, self.lost))
            assert message.request in self.running and heir == self.lost, "it moves already, to a worker that lives"
            self.described[message.request] = message.to
        elif isinstance(message, SlotKept):
            self.moving[message.request] = (message.attempt, message.worker)
        elif isinstance(message, SlotDenied):
            del self.moving[message.request]

    def stopping(self, worker: str, model: str) -> None:
        assert self.instances[worker][model] == "running"
        busy = [r for r, at in self.running.items() if at == worker and self.model[r] == model]
        busy += [r for r, (_, at) in self.moving.items() if at == worker and self.model[r] == model]
        assert not busy, f"{model} stops on {worker} under {busy}"
        self.instances[worker][model] = "stopping"

    def check(self) -> None:
        state = self.actor.state
        for name, worker in state.workers.items():
            held = sum(one.memory for one in worker.instances.values() if one.status != "stopping")
            assert held <= worker.memory_bytes, name
            assert all(len(one.active) <= one.slots for one in worker.instances.values())
        for model, under_way in state.exchange.rooms.items():
            assert state.room[model].worker == under_way.worker and model in state.queues
        assert not [r for r in state.exchange.sequences if r not in state.placed and r not in state.kept]
        assert all(known.moves <= 2 for known in state.exchange.sequences.values())

    # ---- what may happen ----------------------------------------------------------------------------------------

    def ask(self) -> None:
        self.accepted += 1
        request = f"r{self.accepted}"
        self.model[request], self.attempts[request] = self.random.choice(MODELS), 1
        self.waiting[request] = True
        self.tell(PlaceRequest(request, 1, self.model[request], self.accepted, tokens=self.random.randint(0, 9)))

    def end(self, request: str) -> None:
        """Whether it waits, runs, or moves."""
        model = self.model[request]
        self.described.pop(request, None)
        if request in self.running or request in self.waiting:
            self.running.pop(request, None)
            self.waiting.pop(request, None)
            self.tell(SlotReleased(request, self.attempts[request], model, self.random.randint(0, 5)))
        if request in self.moving:
            attempt, _ = self.moving.pop(request)
            self.tell(SlotReleased(request, attempt, model))

    def start(self, worker: str, model: str) -> None:
        if GOING & {*self.instances[worker].values()}:
            self.stopped(worker)
        if self.random.random() < 0.1:
            del self.instances[worker][model]
            self.tell(InstanceFailed(worker, model, "it did not", retry=True))
        else:
            self.instances[worker][model] = "running"
            self.tell(InstanceReady(worker, model, SLOTS, "dram", 5 * MS))

    def stopped(self, worker: str) -> None:
        for model in [model for model, status in self.instances[worker].items() if status in GOING]:
            del self.instances[worker][model]
            self.tell(InstanceStopped(worker, model))

    def describe(self, request: str) -> None:
        to = self.described.pop(request)
        self.moving[request] = (self.attempts[request] + 1, "")
        self.tell(WantSlot(request, self.attempts[request] + 1, self.model[request], self.running[request], to))

    def finish_move(self, request: str) -> None:
        attempt, worker = self.moving.pop(request)
        if not worker or self.random.random() < 0.2:
            self.tell(SlotReleased(request, attempt, self.model[request]))
            return
        del self.running[request]
        before, self.attempts[request] = self.attempts[request], attempt
        self.running[request] = worker
        self.tell(SlotReleased(request, before, self.model[request], 3))
        self.tell(SlotTaken(request, attempt, 20))

    def lose(self, worker: str) -> None:
        lost = [request for request, at in self.running.items() if at == worker]
        heirs = [request for request, (_, at) in self.moving.items() if at == worker]
        self.instances[worker] = {}
        for request in lost:
            del self.running[request]
            self.described.pop(request, None)
        self.lost = worker
        self.tell(WorkerGone(worker))
        self.lost = None
        for request in heirs:
            if request in self.moving:
                attempt, _ = self.moving.pop(request)
                self.tell(SlotReleased(request, attempt, self.model[request]))
        for request in lost:
            if request in self.moving:
                attempt, _ = self.moving.pop(request)
                self.tell(SlotReleased(request, attempt, self.model[request]))
            self.attempts[request] += 2
            self.waiting[request] = True
            again = PlaceRequest(request, self.attempts[request], self.model[request], int(request[1:]), tokens=7)
            self.tell(again)
        self.worker_up(worker)

    def something(self, ending: bool) -> bool:
        """One thing that may happen now; False where there is none."""
        found: list[tuple[Any, ...]] = [
            (self.start, worker, model)
            for worker, models in self.instances.items()
            for model, status in models.items()
            if status == "starting"
        ]
        found += [(self.stopped, worker) for worker, models in self.instances.items() if GOING & {*models.values()}]
        found += [(self.describe, request) for request in self.described]
        found += [(self.finish_move, request) for request, (_, at) in self.moving.items() if at]
        found += [(self.end, request) for request in self.running if ending or self.random.random() < 0.2]
        if not ending:
            found += [(self.ask,), (self.ask,)]
            found += [(self.end, request) for request in self.waiting if self.random.random() < 0.05]
            found += [(self.lose, worker) for worker in WORKERS if self.random.random() < 0.02]
        if not found:
            return False
        action, *arguments = self.random.choice(found)
        action(*arguments)
        return True


def play(seed: int, steps: int = 60) -> Play:
    playing = Play(seed)
    for _ in range(steps):
        playing.something(ending=False)
    for _ in range(2000):
        if not playing.something(ending=True):
            break
    else:
        raise AssertionError("it never ends")
    state = playing.actor.state
    assert not playing.waiting and not playing.running, "everybody is served"
    left = (state.room, state.kept, state.wishes, state.placed, state.exchange.rooms, state.exchange.sequences)
    assert not any(left) and not state.exchange.tried and not state.queues
    return playing


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_whatever_happens_nothing_is_reserved_twice_or_for_ever(seed: int) -> None:
    play(seed)


def test_exchanges_happen_in_what_is_played() -> None:
    played = [play(seed) for seed in range(40)]
    assert sum(one.exchanges for one in played) >= 5 and sum(one.spreads for one in played)
