"""The pump of placement: whoever can run, runs; whoever cannot, gets a start, or room is made for it.

It runs after everything that may have freed or changed something. See the head of `actors.placement` for the rules.
"""

from __future__ import annotations

from actors.placement_books import PlacementBooks
from actors.placement_sources import sources_for
from actors.placement_start import Option, best_options, choose_drain
from actors.placement_state import (
    FAILURES_LIMIT,
    KnownModel,
    Lease,
    Placed,
    Room,
    RunningInstance,
    Waiting,
    Worker,
)
from bus.messages import (
    AbandonStart,
    InstanceDraining,
    PlacementDecided,
    RequestPlaced,
    StartInstance,
    StopInstance,
    To,
)

CANDIDATES_SHOWN = 8
KEPT_NAMED = 16


class PlacementPump(PlacementBooks):
    """Dispatches waiting requests, starts instances, drains and stops them."""

    def _use_slot(self, model: KnownModel, instance: RunningInstance, now: int) -> list[To]:
        """A slot of this instance came free: for its own queue first, and for others where it is idle by that."""
        state, name = self.state, model.card.model
        said = self._serve_wishes(now) if self.rules >= 3 and state.wishes else []
        said += self._dispatch(name, now) if name in state.queues else []
        if not instance.active:
            return [*said, *self._pump(now)] if state.queues or state.removing or state.replacing else said
        if said and len(state.queues) > (name in state.queues) and self._older_starves(name):
            said += self._pump(now)
        return said

    def _older_starves(self, name: str) -> bool:
        """Whether somebody who waits longer than this model's queue has neither an instance nor room in the making."""
        state = self.state
        head = state.head(name) if name in state.queues else None
        return any(
            not state.models[other].instances and other not in state.room
            for other in state.queues
            if other != name and (head is None or state.head(other) < head)
        )

    def _serve_wishes(self, now: int) -> list[To]:
        """Slots for those who move come first; see `actors.placement_moves`."""
        raise NotImplementedError

    def _exchange(self, name: str, model: KnownModel, options: list[Option], now: int) -> list[To] | None:
        """Whether what runs somewhere moves away for this model; see `actors.placement_exchanges`."""
        raise NotImplementedError

    def _note_placed(self, request: str, tokens: int) -> None:
        raise NotImplementedError

    def _forget_sequence(self, request: str) -> None:
        raise NotImplementedError

    def _got_away(self, request: str) -> None:
        raise NotImplementedError

    def _pump(self, now: int) -> list[To]:
        said = self._serve_wishes(now) if self.state.wishes else []
        for name in sorted(self.state.queues, key=self.state.head):
            said += self._dispatch(name, now)
        for name in sorted(self.state.queues, key=self.state.head):
            said += self._start(name, now) if name in self.state.queues else []
        for name in [name for name in self.state.room if name not in self.state.queues]:
            said += self._undrain(name, now)
        return said + self._stop_removed()

    def _dispatch(self, name: str, now: int) -> list[To]:
        model = self.state.models[name]
        said = []
        queue = self.state.queues[name]
        while queue and (worker := self._free_instance(model)) is not None:
            request = next(iter(queue))
            waiting = queue[request]
            self._dequeue(name, request)
            said.append(self._place(model, request, waiting, worker, now))
        if name in self.state.room and name not in self.state.queues:
            said += self._undrain(name, now)
        return said

    def _free_instance(self, model: KnownModel) -> str | None:
        """The running instance with the most free slots; None where all are full."""
        return next(iter(model.open[max(model.open)])) if model.open else None

    def _place(self, model: KnownModel, request: str, waiting: Waiting, worker: str, now: int) -> To:
        name = model.card.model
        instance = self.state.workers[worker].instances[name]
        instance.active[request] = waiting.attempt
        instance.used_at = now
        self._index(worker, model, instance)
        self.state.placed[request] = Placed(worker, name, waiting.attempt, now, waiting.priority, waiting.deadline)
        self._note_placed(request, waiting.tokens)
        tier = instance.tier if waiting.since < instance.ready_at else "running"
        return To("requests", RequestPlaced(request, waiting.attempt, worker, tier, now - waiting.since))

    def _start(self, name: str, now: int) -> list[To]:
        """Start as many instances as those who wait for this model are worth, or have room made for the first."""
        model = self.state.models[name]
        model.enough = 0
        said: list[To] = []
        while True:
            starting, running = 0, False
            for worker in model.instances:
                if self.state.workers[worker].server in self.state.draining:
                    continue
                instance = self.state.workers[worker].instances[name]
                starting += instance.slots if instance.status == "starting" else 0
                running = running or instance.status in ("starting", "running")
            unmet = len(self.state.queues[name]) - starting
            if unmet <= 0:
                model.enough = starting
                return said
            if running and model.failures >= FAILURES_LIMIT:
                return said
            options, enough = best_options(self.state, model, unmet=unmet, running=running, rules=self.rules)
            if self.rules >= 3 and not running:
                exchanged = self._exchange(name, model, options, now)
                if exchanged is not None:
                    return [*said, *exchanged]
            if not options:
                model.enough = starting + enough
                return said if running else [*said, *self._make_room(name, model)]
            said += self._begin(name, model, options, now)

    def _begin(
        self, name: str, model: KnownModel, options: list[Option], now: int, request: str = "", *, urgent: bool = True
    ) -> list[To]:
        """Start on the first of `options`: for `request`, or for the first who waits. Not `urgent`: nobody waits."""
        chosen = options[0]
        candidate = chosen.candidate
        worker = self.state.workers[candidate.worker]
        for victim in candidate.evict:
            self._stopping(candidate.worker, worker, victim)
        worker.instances[name] = RunningInstance(
            chosen.slots, model.card.weight_bytes + chosen.kv_bytes, active={}, used_at=now
        )
        model.instances[candidate.worker] = True
        server = self.state.servers[worker.server]
        in_dram = 0 if self.rules >= 3 and server.streams(model.card) else model.card.weight_bytes
        lease = server.leased.setdefault(name, Lease(0, in_dram))
        lease.workers += 1
        sources = sources_for(self.state, model, worker.server) if candidate.tier == "remote" else ()
        self._note_loading(worker.server, server, model)
        undrained = self._undrain(name, now)
        queue = self.state.queues.get(name, {})
        decided = PlacementDecided(
            model=name,
            worker=candidate.worker,
            request=request or next(iter(queue)),
            waiting=len(queue),
            candidates=tuple(option.candidate for option in options[:CANDIDATES_SHOWN]),
            weighed=len(options),
        )
        start = StartInstance(
            name,
            chosen.slots,
            chosen.kv_bytes,
            model.card.context,
            candidate.evict,
            sources,
            urgent,
            card=model.card if candidate.tier == "remote" else None,
            keep=self._waited_for(worker.server, name) if candidate.tier != "dram" else (),
        )
        return [To(candidate.worker, start), To("record", decided), *undrained]

    def _waited_for(self, server: str, name: str) -> tuple[str, ...]:
        """Other models that lie on this server and that requests wait for (rule version 3); those who wait longest."""
        if self.rules < 3 or len(self.state.queues) < 2:
            return ()
        others = sorted((other for other in self.state.queues if other != name), key=self.state.head)
        return tuple(one for one in others if server in self.state.models[one].servers)[:KEPT_NAMED]

    def _abandon(self, name: str) -> list[To]:
        """What starts for a queue that is empty now, and for nobody who moves, need not go on (rule version 3)."""
        if self.rules < 3 or name in self.state.queues or any(w.model == name for w in self.state.wishes.values()):
            return []
        starting = self.state.models[name].instances
        return [
            To(worker, AbandonStart(name))
            for worker in starting
            if self.state.workers[worker].instances[name].status == "starting"
        ]

    def _make_room(self, name: str, model: KnownModel) -> list[To]:
        """Drain for this model, unless that is under way; what is drained and idle stops."""
        said: list[To] = []
        room = self.state.room.get(name)
        if room is None or not room.victims:
            self.state.room.pop(name, None)
            chosen = choose_drain(self.state, model, rules=self.rules)
            if chosen is None:
                return []
            room = self.state.room[name] = Room(*chosen)
            for worker, victim in room.victims:
                instance = self.state.workers[worker].instances[victim]
                instance.status = "draining"
                self._index(worker, self.state.models[victim], instance)
                said.append(To("record", InstanceDraining(worker, victim, name)))
        return said + self._stop_idle(name)

    def _stop_idle(self, name: str) -> list[To]:
        """What is drained for this model and idle stops."""
        room, said = self.state.room[name], []
        for worker, victim in list(room.victims):
            if not self.state.workers[worker].instances[victim].active:
                room.victims.remove((worker, victim))
                said.append(self._stop(worker, victim))
        return said

    def _stop_removed(self) -> list[To]:
        said = []
        for name in self.state.removing:
            model = self.state.models.get(name)
            for worker in list(model.instances) if model is not None else ():
                instance = self.state.workers[worker].instances[name]
                if instance.status in ("running", "draining") and not instance.active:
                    said.append(self._stop(worker, name))
        for name in list(self.state.replacing):
            model = self.state.models.get(name)
            if model is None or not model.replaced:
                del self.state.replacing[name]
                continue
            for worker in list(model.instances):
                instance = self.state.workers[worker].instances[name]
                if instance.outdated and instance.status in ("running", "draining") and not instance.active:
                    said.append(self._stop(worker, name))
        return said

    def _stop(self, worker: str, name: str) -> To:
        self._stopping(worker, self.state.workers[worker], name)
        return To(worker, StopInstance(name))

    def _stopping(self, worker_name: str, worker: Worker, name: str) -> None:
        model, instance = self.state.models[name], worker.instances[name]
        self._leave_room(worker_name, name)
        instance.status = "stopping"
        self._index(worker_name, model, instance)
        del model.instances[worker_name]

    def _undrain(self, name: str, now: int) -> list[To]:
        """Room for this model is no longer wanted: what is still drained for it takes sequences again."""
        room = self.state.room.pop(name, None)
        self.state.exchange.rooms.pop(name, None)
        said: list[To] = []
        for worker, victim in room.victims if room is not None else ():
            said += self._undrain_one(worker, victim, now)
        return said

    def _undrain_one(self, worker: str, victim: str, now: int) -> list[To]:
        instance = self.state.workers[worker].instances[victim]
        if instance.status != "draining":
            return []
        instance.status = "running"
        self._index(worker, self.state.models[victim], instance)
        return self._dispatch(victim, now) if victim in self.state.queues else []

    def _leave_room(self, worker: str, name: str) -> None:
        """Whoever had this instance drained need not wait for it any longer."""
        for room in self.state.room.values():
            if (worker, name) in room.victims:
                room.victims.remove((worker, name))

    def _remove_instance(self, worker_name: str, worker: Worker, name: str) -> None:
        """Nothing of this instance is left: not on the device, not in DRAM, not in any index."""
        instance = worker.instances.get(name)
        if instance is None:
            return
        self._leave_room(worker_name, name)
        model = self.state.models.get(name)
        if model is not None and instance.status != "stopping":
            instance.status = "stopping"
            self._index(worker_name, model, instance)
            model.instances.pop(worker_name, None)
        del worker.instances[name]
        server = self.state.servers[worker.server]
        server.leased[name].workers -= 1
        if not server.leased[name].workers:
            del server.leased[name]

    def _lose(self, name: str, now: int) -> list[To]:
        """A worker is gone with all that ran on it; its requests come back after its tokens are sealed.

        What was on its way to DRAM for it still comes.
        """
        worker = self.state.workers.get(name)
        if worker is None:
            return []
        said = []
        for model_name, instance in list(worker.instances.items()):
            for request in instance.active:
                for slots in (self.state.placed, self.state.kept):
                    if request in slots and slots[request].worker == name:
                        del slots[request]
                self._got_away(request)
                self._forget_sequence(request)
            self._remove_instance(name, worker, model_name)
            said += self._settle(model_name)
        del self.state.workers[name]
        for model_name in [model for model, room in self.state.room.items() if room.worker == name]:
            said += self._undrain(model_name, now)
        return said
