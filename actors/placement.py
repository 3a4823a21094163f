"""The actor that decides where models start and which slot a request gets.

    request ──▶ queue of its model ──▶ a free slot of a running instance          (nothing to start: at once)
                                  └──▶ no slot: start an instance where it is ready soonest

Start-up time of a candidate (PAPER, contribution 3; DESIGN 6), in nanoseconds:
    queue  bytes already queued on that server's loading path / bandwidth    q
    load   bytes of the model / bandwidth of the slowest stage, 0 in DRAM    n/b
    free   to detach idle instances that make room, least recently used first
    attach from DRAM to usable parameters
The least sum wins; the decision says what it weighed, and reserves memory and slots in the same step.

Rules
* Requests are served in order of acceptance within a model. A model that runs somewhere gets a further instance from
  free memory; idle instances of others are evicted for it only when a whole instance's worth of requests waits.
* A model that runs nowhere and finds no room, on a device or in DRAM, gets one drained: the instances with the least
  to do stop taking sequences, unless an older request waits for them; what comes free is kept for the oldest request.
* The queue is bounded. What can never fit is refused at once.
* A request that finds a free slot costs the same however many models, workers and waiting requests there are.
"""

from __future__ import annotations

from actors.learning import learned
from actors.placement_state import FAILURES_LIMIT, Server, Waiting, Worker, WorkerSize
from actors.placement_warming import PlacementWarming
from bus.messages import (
    DropModel,
    InstanceFailed,
    InstanceReady,
    InstanceStopped,
    LookForModel,
    ModelAdded,
    ModelGone,
    ModelHeld,
    ModelRemoved,
    ModelReplaced,
    PlacementConfigured,
    PlaceRequest,
    ServerGone,
    ServerReady,
    SlotReleased,
    To,
    WorkerGone,
    WorkerReady,
)


class Placement(PlacementWarming):
    """See the head of this file."""

    # ---- requests ---------------------------------------------------------------------------------------------

    def on_PlaceRequest(self, message: PlaceRequest, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None or model.removed:
            return [self._refuse(message, "unknown_model", f"no server of this cell holds a model {message.model!r}")]
        if not model.instances and (too_large := self._too_large(model)):
            return [self._refuse(message, "too_large", too_large)]
        if self._too_many(message):
            return [self._queue_full(message, model)]
        if message.model not in self.state.queues:
            worker = self._free_instance(model)
            if worker is not None:
                waiting = Waiting(
                    message.attempt, message.accepted, now, message.priority, message.deadline, message.tokens
                )
                return [self._place(model, message.request, waiting, worker, now)]
        if message.attempt == 1 and self.state.waiting >= self.state.configuration.queue_limit:
            return [self._queue_full(message, model)]
        self._enqueue(message, now)
        waiting_here = len(self.state.queues[message.model])
        return self._start(message.model, now) if waiting_here == 1 or waiting_here > model.enough else []

    def on_SlotReleased(self, message: SlotReleased, now: int) -> list[To]:
        said = [*self._release(message, now), *self._spread(now)]
        return [*said, *self._see_drained(now)] if self.state.draining else said

    def _release(self, message: SlotReleased, now: int) -> list[To]:
        placed = self.state.placed.get(message.request)
        if placed is not None and placed.attempt == message.attempt:
            del self.state.placed[message.request]
            self._note_released(message, placed, now)
            model = self.state.models.get(placed.model)
            if model is not None:
                model.service_ns = learned(model.service_ns, now - placed.since)
            instance = self._instance(placed.worker, placed.model)
            if model is None or instance is None:
                return []
            self._vacate(instance, message.request, message.attempt)
            instance.used_at = now
            self._index(placed.worker, model, instance)
            return self._use_slot(model, instance, now)
        if (given_back := self._give_back(message, now)) is not None:
            return given_back
        queue = self.state.queues.get(message.model)
        if queue is not None and message.request in queue and queue[message.request].attempt == message.attempt:
            self._dequeue(message.model, message.request)
            return [*self._abandon(message.model), *self._pump(now)]
        return []

    # ---- servers and models -----------------------------------------------------------------------------------

    def on_ServerReady(self, message: ServerReady, now: int) -> list[To]:
        server = self.state.servers.get(message.server)
        if server is None:
            server = self.state.servers[message.server] = Server(message.dram_bytes, loading={})
        server.up, server.dram_bytes, server.loading, server.fetching = True, message.dram_bytes, {}, {}
        server.address, server.ssd_bytes = message.address, message.ssd_bytes
        server.own, server.own_bytes = {}, 0
        found = {held.card.model: held for held in message.models}
        said = self._in_service(message.server, "it has started anew")
        for name, model in list(self.state.models.items()):
            if name not in found and model.servers.pop(message.server, None) is not None:
                said += self._settle(name, f"server {message.server} came back without {name}, and no other holds it")
        for held in message.models:
            known = self._know(held.card)
            known.servers[message.server] = held.tier
            self._adopt_source(known, held.source)
            if held.tier != "remote" and not held.source:
                server.note_own(held.card.model, held.card.weight_bytes)
            known.replaced.pop(message.server, None)
        # What no server knew how to fetch so far; the others are told what to fetch when it starts there.
        said += [
            To(f"store/{message.server}", LookForModel(name, source))
            for name, source in self.state.sources.items()
            if name not in self.state.models
        ]
        return [*said, *self._refuse_too_large(), *self._pump(now)]

    def on_ServerGone(self, message: ServerGone, now: int) -> list[To]:
        server = self.state.servers[message.server]
        server.up, server.loading, server.fetching = False, {}, {}
        return []

    def on_ModelHeld(self, message: ModelHeld, now: int) -> list[To]:
        server = self.state.servers[message.server]
        self._note_loaded(message.server, message.card.model)
        if message.duration_ns:
            server.learn(message.loaded_from, message.card.weight_bytes, message.duration_ns)
        model = self._know(message.card)
        self._adopt_source(model, message.source)
        own = message.tier != "remote" and not message.source
        server.note_own(message.card.model, message.card.weight_bytes if own else 0)
        model.servers[message.server] = message.tier
        model.replaced.pop(message.server, None)
        self._note_loading(message.server, server, model)
        return [*self._refuse_too_large(), *self._pump(now)]

    def on_ModelGone(self, message: ModelGone, now: int) -> list[To]:
        self._note_loaded(message.server, message.model)
        self.state.servers[message.server].note_own(message.model, 0)
        model = self.state.models.get(message.model)
        if model is not None:
            model.servers.pop(message.server, None)
            model.replaced.pop(message.server, None)
        return [*self._settle(message.model, f"no server holds {message.model} any more"), *self._pump(now)]

    def on_ModelReplaced(self, message: ModelReplaced, now: int) -> list[To]:
        """Instances of the old version on that server take nothing new, and stop when they are idle."""
        model = self.state.models.get(message.model)
        if model is None:
            return []
        model.replaced[message.server] = True
        self.state.replacing[message.model] = True
        for name in model.instances:
            if self.state.workers[name].server == message.server:
                instance = self.state.workers[name].instances[message.model]
                instance.outdated = True
                self._index(name, model, instance)
        return self._pump(now)

    def on_ModelAdded(self, message: ModelAdded, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if message.source:
            self.state.sources[message.model] = message.source
        if model is not None:
            model.removed, model.failures, model.failed_on = False, 0, {}
            self._adopt_source(model, "")
            self.state.removing.pop(message.model, None)
        # Servers that are away are asked, too: they must not delete it when they are back.
        look = LookForModel(message.model, self.state.sources.get(message.model, ""))
        return [To(f"store/{name}", look) for name in self.state.servers]

    def on_ModelRemoved(self, message: ModelRemoved, now: int) -> list[To]:
        self.state.sources.pop(message.model, None)
        model = self.state.models.get(message.model)
        if model is None:
            return []
        model.removed = True
        self.state.removing[message.model] = True
        model.source = ""
        said = self._refuse_waiting(message.model, "unknown_model", f"{message.model} was removed")
        said += self._abandon(message.model)
        # Of what came from another server only, and broke off, nobody but the disk of that server knows.
        servers = list(self.state.servers if self.rules >= 5 else model.servers)
        said += [To(f"store/{name}", DropModel(message.model)) for name in servers]
        return [*said, *self._pump(now)]

    def on_PlacementConfigured(self, message: PlacementConfigured, now: int) -> list[To]:
        self.state.configuration = message
        return []

    # ---- workers and instances --------------------------------------------------------------------------------

    def on_WorkerReady(self, message: WorkerReady, now: int) -> list[To]:
        said = self._lose(message.worker, now)
        worker = Worker(message.server, message.memory_bytes, message.max_slots, instances={})
        self.state.workers[message.worker] = worker
        self.state.sizes[message.worker] = WorkerSize(message.server, message.memory_bytes, message.max_slots)
        for model in self.state.models.values():
            model.failures = 0
            model.failed_on.pop(message.worker, None)
        return [*said, *self._refuse_too_large(), *self._pump(now)]

    def on_WorkerGone(self, message: WorkerGone, now: int) -> list[To]:
        said = [*self._lose(message.worker, now), *self._pump(now)]
        return [*said, *self._see_drained(now)] if self.state.draining else said

    def on_InstanceReady(self, message: InstanceReady, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        instance = self._instance(message.worker, message.model)
        if model is None or instance is None or instance.status != "starting":
            return []
        instance.status = "running"
        instance.slots, instance.tier = message.slots, message.tier
        instance.used_at = instance.ready_at = now
        self._index(message.worker, model, instance)
        self._note_loaded(self.state.workers[message.worker].server, message.model)
        model.failures, model.failed_on = 0, {}
        model.attach_ns = learned(model.attach_ns, message.attach_ns)
        return self._pump(now)

    def on_InstanceFailed(self, message: InstanceFailed, now: int) -> list[To]:
        worker = self.state.workers.get(message.worker)
        if worker is not None:
            self._remove_instance(message.worker, worker, message.model)
            self._note_loaded(worker.server, message.model)
        model = self.state.models.get(message.model)
        if model is None:
            return self._pump(now)
        model.failures += 1
        model.failed_on[message.worker] = model.failed_on.get(message.worker, 0) + 1
        said: list[To] = []
        hopeless = not message.retry or not model.servers or model.failures >= FAILURES_LIMIT
        if hopeless and not model.instances:
            model.failures, model.failed_on = 0, {}
            said = self._refuse_waiting(message.model, "start_failed", f"{message.model}: {message.reason}"[:4000])
        return [*said, *self._settle(message.model), *self._pump(now)]

    def on_InstanceStopped(self, message: InstanceStopped, now: int) -> list[To]:
        worker = self.state.workers.get(message.worker)
        if worker is not None:
            self._remove_instance(message.worker, worker, message.model)
        return [*self._settle(message.model), *self._pump(now)]
