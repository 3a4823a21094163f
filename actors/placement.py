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
* A model that runs nowhere and finds no room gets one drained: the instance with the least to do stops taking
  sequences, unless an older request waits for it.
* The queue is bounded. What can never fit is refused at once.
"""

from __future__ import annotations

from actors.actor import Actor
from actors.placement_start import Option, best_options, choose_drain
from actors.placement_state import (
    SECOND,
    KnownModel,
    Placed,
    PlacementState,
    RunningInstance,
    Server,
    Waiting,
    Worker,
    kv_plan,
    learned,
)
from bus.messages import (
    DropModel,
    InstanceDraining,
    InstanceFailed,
    InstanceReady,
    InstanceStopped,
    LookForModel,
    ModelAdded,
    ModelCard,
    ModelGone,
    ModelHeld,
    ModelRemoved,
    PlacementConfigured,
    PlacementDecided,
    PlacementRefused,
    PlaceRequest,
    RequestPlaced,
    ServerGone,
    ServerReady,
    SlotReleased,
    StartInstance,
    StopInstance,
    To,
    WorkerGone,
    WorkerReady,
)

FAILURES_LIMIT = 10
"""Starts of one model that may fail in a row before its waiting requests are told."""

CANDIDATES_SHOWN = 8


class Placement(Actor):
    """See the head of this file."""

    State = PlacementState
    state: PlacementState

    # ---- requests ---------------------------------------------------------------------------------------------

    def on_PlaceRequest(self, message: PlaceRequest, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None or model.removed:
            return [self._refuse(message, "unknown_model", f"no server of this cell holds a model {message.model!r}")]
        if not model.instances and (too_large := self._too_large(model)):
            return [self._refuse(message, "too_large", too_large)]
        if message.model not in self.state.queues:
            worker = self._free_instance(model)
            if worker is not None:
                waiting = Waiting(message.attempt, message.accepted, now)
                return [self._place(message.model, message.request, waiting, worker, now)]
        limit = self.state.configuration.queue_limit
        if message.attempt == 1 and self.state.waiting >= limit:
            retry_ms = self.state.retry_ms(model)
            reason = f"{self.state.waiting} requests wait already (the limit is {limit}); try again in {retry_ms} ms"
            return [self._refuse(message, "queue_full", reason, retry_ms)]
        self._enqueue(message, now)
        return self._pump(now)

    def on_SlotReleased(self, message: SlotReleased, now: int) -> list[To]:
        placed = self.state.placed.get(message.request)
        if placed is not None and placed.attempt == message.attempt:
            del self.state.placed[message.request]
            model = self.state.models.get(placed.model)
            if model is not None:
                model.service_ns = learned(model.service_ns, now - placed.since)
            instance = self._instance(placed.worker, placed.model)
            if instance is not None:
                instance.active.pop(message.request, None)
                instance.used_at = now
            return self._pump(now)
        queue = self.state.queues.get(message.model)
        if queue is not None and message.request in queue and queue[message.request].attempt == message.attempt:
            self._dequeue(message.model, message.request)
            return self._pump(now)
        return []

    # ---- servers and models -----------------------------------------------------------------------------------

    def on_ServerReady(self, message: ServerReady, now: int) -> list[To]:
        server = self.state.servers.get(message.server)
        if server is None:
            server = self.state.servers[message.server] = Server(message.dram_bytes, loading={})
        server.up, server.dram_bytes, server.loading = True, message.dram_bytes, {}
        found = {held.card.model: held for held in message.models}
        for name in list(self.state.models):
            if name not in found:
                self._forget(name, message.server)
        for held in message.models:
            self._know(held.card).servers[message.server] = held.tier
        return self._pump(now)

    def on_ServerGone(self, message: ServerGone, now: int) -> list[To]:
        server = self.state.servers[message.server]
        server.up, server.loading = False, {}
        return []

    def on_ModelHeld(self, message: ModelHeld, now: int) -> list[To]:
        server = self.state.servers[message.server]
        if message.tier == "dram":
            server.loading.pop(message.card.model, None)
            if message.duration_ns:
                rate = message.card.weight_bytes * SECOND // message.duration_ns
                server.ssd_rate = learned(server.ssd_rate, rate)
        self._know(message.card).servers[message.server] = message.tier
        return self._pump(now)

    def on_ModelGone(self, message: ModelGone, now: int) -> list[To]:
        self.state.servers[message.server].loading.pop(message.model, None)
        self._forget(message.model, message.server)
        return self._give_up(message.model, "unknown_model", f"no server holds {message.model} any more")

    def on_ModelAdded(self, message: ModelAdded, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is not None:
            model.removed, model.failures = False, 0
            self.state.removing.pop(message.model, None)
        return [
            To(f"store/{name}", LookForModel(message.model)) for name, server in self.state.servers.items() if server.up
        ]

    def on_ModelRemoved(self, message: ModelRemoved, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None:
            return []
        model.removed = True
        self.state.removing[message.model] = True
        said = self._refuse_waiting(message.model, "unknown_model", f"{message.model} was removed")
        said += [To(f"store/{name}", DropModel(message.model)) for name in model.servers]
        return [*said, *self._pump(now)]

    def on_PlacementConfigured(self, message: PlacementConfigured, now: int) -> list[To]:
        self.state.configuration = message
        return []

    # ---- workers and instances --------------------------------------------------------------------------------

    def on_WorkerReady(self, message: WorkerReady, now: int) -> list[To]:
        self._lose(message.worker)
        worker = Worker(message.server, message.memory_bytes, message.max_slots, instances={})
        self.state.workers[message.worker] = worker
        return self._pump(now)

    def on_WorkerGone(self, message: WorkerGone, now: int) -> list[To]:
        self._lose(message.worker)
        return self._pump(now)

    def on_InstanceReady(self, message: InstanceReady, now: int) -> list[To]:
        instance = self._instance(message.worker, message.model)
        if instance is None:
            return []
        if instance.status == "starting":
            instance.status = "running"
        instance.slots, instance.tier = message.slots, message.tier
        instance.used_at = instance.ready_at = now
        model = self.state.models.get(message.model)
        if model is not None:
            model.failures = 0
            model.attach_ns = learned(model.attach_ns, message.attach_ns)
        return self._pump(now)

    def on_InstanceFailed(self, message: InstanceFailed, now: int) -> list[To]:
        self._remove_instance(message.worker, message.model)
        model = self.state.models.get(message.model)
        if model is None:
            return self._pump(now)
        server = self.state.workers[message.worker].server if message.worker in self.state.workers else ""
        if server:
            self.state.servers[server].loading.pop(message.model, None)
        model.failures += 1
        said: list[To] = []
        if (not message.retry or model.failures >= FAILURES_LIMIT) and not model.instances:
            model.failures = 0
            said = self._refuse_waiting(message.model, "start_failed", f"{message.model}: {message.reason}"[:4000])
        return [*said, *self._pump(now)]

    def on_InstanceStopped(self, message: InstanceStopped, now: int) -> list[To]:
        self._remove_instance(message.worker, message.model)
        return self._pump(now)

    # ---- the pump: whoever can run, runs; whoever cannot, gets a start ------------------------------------------

    def _pump(self, now: int) -> list[To]:
        said: list[To] = []
        for name in sorted(self.state.queues, key=self.state.head):
            said += self._dispatch(name, now)
        for name in sorted(self.state.queues, key=self.state.head):
            said += self._start(name, now)
        for name in [name for name in self.state.room if name not in self.state.queues]:
            self._undrain(name)
        return said + self._stop_removed()

    def _dispatch(self, name: str, now: int) -> list[To]:
        model = self.state.models[name]
        said = []
        queue = self.state.queues[name]
        for request in list(queue):
            worker = self._free_instance(model)
            if worker is None:
                break
            waiting = queue[request]
            self._dequeue(name, request)
            said.append(self._place(name, request, waiting, worker, now))
        return said

    def _free_instance(self, model: KnownModel) -> str | None:
        """The running instance with the most free slots; None where all are full."""
        best, most = None, 0
        for worker in model.instances:
            instance = self.state.workers[worker].instances[model.card.model]
            free = instance.slots - len(instance.active) if instance.status == "running" else 0
            if free > most:
                best, most = worker, free
        return best

    def _place(self, name: str, request: str, waiting: Waiting, worker: str, now: int) -> To:
        instance = self.state.workers[worker].instances[name]
        instance.active[request] = waiting.attempt
        instance.used_at = now
        self.state.placed[request] = Placed(worker, name, waiting.attempt, now)
        tier = instance.tier if waiting.since < instance.ready_at else "running"
        return To("requests", RequestPlaced(request, waiting.attempt, worker, tier, now - waiting.since))

    def _start(self, name: str, now: int) -> list[To]:
        model = self.state.models[name]
        said: list[To] = []
        while True:
            starting, running = 0, False
            for worker in model.instances:
                instance = self.state.workers[worker].instances[name]
                starting += instance.slots if instance.status == "starting" else 0
                running = running or instance.status in ("starting", "running")
            unmet = len(self.state.queues[name]) - starting
            if unmet <= 0:
                return said
            options = best_options(self.state, model, unmet=unmet, running=running)
            if not options:
                return said if running else [*said, *self._drain(name, model)]
            said += self._begin(name, model, options, now)

    def _begin(self, name: str, model: KnownModel, options: list[Option], now: int) -> list[To]:
        chosen = options[0]
        candidate = chosen.candidate
        worker = self.state.workers[candidate.worker]
        for victim in candidate.evict:
            worker.instances[victim].status = "stopping"
            self.state.models[victim].instances.pop(candidate.worker, None)
        worker.instances[name] = RunningInstance(
            chosen.slots, model.card.weight_bytes + chosen.kv_bytes, active={}, used_at=now
        )
        model.instances[candidate.worker] = True
        if candidate.tier == "ssd":
            self.state.servers[worker.server].loading[name] = model.card.weight_bytes
        self._undrain(name)
        queue = self.state.queues[name]
        decided = PlacementDecided(
            model=name,
            worker=candidate.worker,
            request=next(iter(queue)),
            waiting=len(queue),
            candidates=tuple(option.candidate for option in options[:CANDIDATES_SHOWN]),
            weighed=len(options),
        )
        start = StartInstance(name, chosen.slots, chosen.kv_bytes, model.card.context, candidate.evict)
        return [To(candidate.worker, start), To("record", decided)]

    def _drain(self, name: str, model: KnownModel) -> list[To]:
        if name in self.state.room:
            return []
        chosen = choose_drain(self.state, model)
        if chosen is None:
            return []
        worker, victims = chosen
        self.state.room[name] = worker
        said = []
        for victim in victims:
            self.state.workers[worker].instances[victim].status = "draining"
            said.append(To("record", InstanceDraining(worker, victim, name)))
        return said

    def _undrain(self, name: str) -> None:
        worker = self.state.workers.get(self.state.room.pop(name, ""))
        for instance in worker.instances.values() if worker is not None else ():
            if instance.status == "draining":
                instance.status = "running"

    def _stop_removed(self) -> list[To]:
        said = []
        for name in self.state.removing:
            model = self.state.models.get(name)
            for worker in list(model.instances) if model is not None else ():
                instance = self.state.workers[worker].instances[name]
                if instance.status in ("running", "draining") and not instance.active:
                    instance.status = "stopping"
                    del self.state.models[name].instances[worker]
                    said.append(To(worker, StopInstance(name)))
        return said

    # ---- what they have in common -----------------------------------------------------------------------------

    def _know(self, card: ModelCard) -> KnownModel:
        model = self.state.models.get(card.model)
        if model is None:
            model = self.state.models[card.model] = KnownModel(card, servers={}, instances={})
        model.card = card
        return model

    def _forget(self, name: str, server: str) -> None:
        model = self.state.models.get(name)
        if model is not None:
            model.servers.pop(server, None)
            if not model.servers and not model.instances and name not in self.state.queues:
                del self.state.models[name]
                self.state.removing.pop(name, None)

    def _give_up(self, name: str, code: str, reason: str) -> list[To]:
        model = self.state.models.get(name)
        if model is None or model.servers or model.instances:
            return []
        said = self._refuse_waiting(name, code, reason)
        del self.state.models[name]
        return said

    def _instance(self, worker: str, model: str) -> RunningInstance | None:
        known = self.state.workers.get(worker)
        return known.instances.get(model) if known is not None else None

    def _remove_instance(self, worker: str, name: str) -> None:
        known = self.state.workers.get(worker)
        if known is not None:
            known.instances.pop(name, None)
        model = self.state.models.get(name)
        if model is not None and model.instances.pop(worker, None) is not None and not model.servers:
            self._forget(name, "")

    def _lose(self, name: str) -> None:
        """A worker is gone with all that ran on it; its requests come back after its tokens are sealed."""
        worker = self.state.workers.pop(name, None)
        if worker is None:
            return
        for model_name, instance in worker.instances.items():
            for request in instance.active:
                self.state.placed.pop(request, None)
            model = self.state.models.get(model_name)
            if model is not None:
                model.instances.pop(name, None)
            server = self.state.servers.get(worker.server)
            if server is not None and instance.status == "starting":
                server.loading.pop(model_name, None)
        for model_name in [m for m, w in self.state.room.items() if w == name]:
            del self.state.room[model_name]

    def _enqueue(self, message: PlaceRequest, now: int) -> None:
        queue = self.state.queues.setdefault(message.model, {})
        queue[message.request] = Waiting(message.attempt, message.accepted, now)
        self.state.waiting += 1
        if len(queue) > 1 and message.attempt > 1:
            ordered = sorted(queue.items(), key=lambda item: item[1].accepted)
            queue.clear()
            queue.update(ordered)

    def _dequeue(self, model: str, request: str) -> None:
        queue = self.state.queues[model]
        del queue[request]
        self.state.waiting -= 1
        if not queue:
            del self.state.queues[model]

    def _refuse(self, message: PlaceRequest, code: str, reason: str, retry_ms: int = 0) -> To:
        refused = PlacementRefused(message.request, message.attempt, code, reason, retry_ms)  # type: ignore[arg-type]
        return To("requests", refused)

    def _refuse_waiting(self, model: str, code: str, reason: str) -> list[To]:
        said = []
        for request, waiting in list(self.state.queues.get(model, {}).items()):
            self._dequeue(model, request)
            refused = PlacementRefused(request, waiting.attempt, code, reason)  # type: ignore[arg-type]
            said.append(To("requests", refused))
        return said

    def _too_large(self, model: KnownModel) -> str:
        """One sentence where no worker and no server that is up could ever hold it; empty where one could."""
        card = model.card
        workers = self.state.workers.values()
        if workers and all(kv_plan(card, worker.memory_bytes, worker.max_slots)[0] == 0 for worker in workers):
            need = card.weight_bytes + card.context * card.kv_bytes_per_token
            largest = max(worker.memory_bytes for worker in workers)
            return (
                f"{card.model} needs {need} bytes of device memory for its weights and one full context; "
                f"the largest worker has {largest}"
            )
        budgets = [s.dram_bytes for name, s in self.state.servers.items() if s.up and name in model.servers]
        if budgets and card.weight_bytes > max(budgets):
            return f"{card.model} needs {card.weight_bytes} bytes of DRAM; the largest budget is {max(budgets)}"
        return ""
