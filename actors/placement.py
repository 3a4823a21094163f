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

from actors.actor import Actor
from actors.placement_start import Option, best_options, choose_drain
from actors.placement_state import (
    SECOND,
    KnownModel,
    Lease,
    Placed,
    PlacementState,
    Room,
    RunningInstance,
    Server,
    Waiting,
    Worker,
    WorkerSize,
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
                return [self._place(model, message.request, waiting, worker, now)]
        limit = self.state.configuration.queue_limit
        if message.attempt == 1 and self.state.waiting >= limit:
            retry_ms = self.state.retry_ms(model)
            reason = f"{self.state.waiting} requests wait already (the limit is {limit}); try again in {retry_ms} ms"
            return [self._refuse(message, "queue_full", reason, retry_ms)]
        self._enqueue(message, now)
        waiting_here = len(self.state.queues[message.model])
        return self._start(message.model, now) if waiting_here == 1 or waiting_here > model.enough else []

    def on_SlotReleased(self, message: SlotReleased, now: int) -> list[To]:
        placed = self.state.placed.get(message.request)
        if placed is not None and placed.attempt == message.attempt:
            del self.state.placed[message.request]
            model = self.state.models.get(placed.model)
            if model is not None:
                model.service_ns = learned(model.service_ns, now - placed.since)
            instance = self._instance(placed.worker, placed.model)
            if model is None or instance is None:
                return []
            instance.active.pop(message.request, None)
            instance.used_at = now
            self._index(placed.worker, model, instance)
            return self._use_slot(model, instance, now)
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
        said: list[To] = []
        for name, model in list(self.state.models.items()):
            if name not in found and model.servers.pop(message.server, None) is not None:
                said += self._settle(name, f"server {message.server} came back without {name}, and no other holds it")
        for held in message.models:
            self._know(held.card).servers[message.server] = held.tier
        return [*said, *self._refuse_too_large(), *self._pump(now)]

    def on_ServerGone(self, message: ServerGone, now: int) -> list[To]:
        server = self.state.servers[message.server]
        server.up, server.loading = False, {}
        return []

    def on_ModelHeld(self, message: ModelHeld, now: int) -> list[To]:
        server = self.state.servers[message.server]
        server.loading.pop(message.card.model, None)
        if message.duration_ns:
            rate = message.card.weight_bytes * SECOND // message.duration_ns
            server.ssd_rate = learned(server.ssd_rate, rate)
        model = self._know(message.card)
        model.servers[message.server] = message.tier
        self._note_loading(message.server, server, model)
        return [*self._refuse_too_large(), *self._pump(now)]

    def on_ModelGone(self, message: ModelGone, now: int) -> list[To]:
        self.state.servers[message.server].loading.pop(message.model, None)
        model = self.state.models.get(message.model)
        if model is not None:
            model.servers.pop(message.server, None)
        return [*self._settle(message.model, f"no server holds {message.model} any more"), *self._pump(now)]

    def on_ModelAdded(self, message: ModelAdded, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is not None:
            model.removed, model.failures, model.failed_on = False, 0, {}
            self.state.removing.pop(message.model, None)
        # Servers that are away are asked, too: they must not delete it when they are back.
        return [To(f"store/{name}", LookForModel(message.model)) for name in self.state.servers]

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
        said = self._lose(message.worker, now)
        worker = Worker(message.server, message.memory_bytes, message.max_slots, instances={})
        self.state.workers[message.worker] = worker
        self.state.sizes[message.worker] = WorkerSize(message.server, message.memory_bytes, message.max_slots)
        for model in self.state.models.values():
            model.failures = 0
            model.failed_on.pop(message.worker, None)
        return [*said, *self._refuse_too_large(), *self._pump(now)]

    def on_WorkerGone(self, message: WorkerGone, now: int) -> list[To]:
        return [*self._lose(message.worker, now), *self._pump(now)]

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

    # ---- the pump: whoever can run, runs; whoever cannot, gets a start ------------------------------------------

    def _use_slot(self, model: KnownModel, instance: RunningInstance, now: int) -> list[To]:
        """A slot of this instance came free: for its own queue first, and for others where it is idle by that."""
        state, name = self.state, model.card.model
        said = self._dispatch(name, now) if name in state.queues else []
        if not instance.active:
            return [*said, *self._pump(now)] if state.queues or state.removing else said
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

    def _pump(self, now: int) -> list[To]:
        said: list[To] = []
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

    def _index(self, worker: str, model: KnownModel, instance: RunningInstance) -> None:
        """Keep `model.open` true after the status or the slots in use of one of its instances changed."""
        free = instance.slots - len(instance.active) if instance.status == "running" else 0
        if free == instance.free:
            return
        if instance.free:
            others = model.open[instance.free]
            del others[worker]
            if not others:
                del model.open[instance.free]
        if free:
            model.open.setdefault(free, {})[worker] = True
        instance.free = free

    def _place(self, model: KnownModel, request: str, waiting: Waiting, worker: str, now: int) -> To:
        name = model.card.model
        instance = self.state.workers[worker].instances[name]
        instance.active[request] = waiting.attempt
        instance.used_at = now
        self._index(worker, model, instance)
        self.state.placed[request] = Placed(worker, name, waiting.attempt, now)
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
                instance = self.state.workers[worker].instances[name]
                starting += instance.slots if instance.status == "starting" else 0
                running = running or instance.status in ("starting", "running")
            unmet = len(self.state.queues[name]) - starting
            if unmet <= 0:
                model.enough = starting
                return said
            if running and model.failures >= FAILURES_LIMIT:
                return said
            options, enough = best_options(self.state, model, unmet=unmet, running=running)
            if not options:
                model.enough = starting + enough
                return said if running else [*said, *self._make_room(name, model)]
            said += self._begin(name, model, options, now)

    def _begin(self, name: str, model: KnownModel, options: list[Option], now: int) -> list[To]:
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
        lease = server.leased.setdefault(name, Lease(0, model.card.weight_bytes))
        lease.workers += 1
        self._note_loading(worker.server, server, model)
        undrained = self._undrain(name, now)
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
        return [To(candidate.worker, start), To("record", decided), *undrained]

    def _make_room(self, name: str, model: KnownModel) -> list[To]:
        """Drain for this model, unless that is under way; what is drained and idle stops."""
        said: list[To] = []
        room = self.state.room.get(name)
        if room is None or not room.victims:
            self.state.room.pop(name, None)
            chosen = choose_drain(self.state, model)
            if chosen is None:
                return []
            room = self.state.room[name] = Room(*chosen)
            for worker, victim in room.victims:
                instance = self.state.workers[worker].instances[victim]
                instance.status = "draining"
                self._index(worker, self.state.models[victim], instance)
                said.append(To("record", InstanceDraining(worker, victim, name)))
        for worker, victim in list(room.victims):
            if not self.state.workers[worker].instances[victim].active:
                room.victims.remove((worker, victim))
                said.append(self._stop(worker, victim))
        return said

    def _undrain(self, name: str, now: int) -> list[To]:
        """Room for this model is no longer wanted: what is still drained for it takes sequences again."""
        room = self.state.room.pop(name, None)
        said: list[To] = []
        for worker, victim in room.victims if room is not None else ():
            instance = self.state.workers[worker].instances[victim]
            if instance.status == "draining":
                instance.status = "running"
                self._index(worker, self.state.models[victim], instance)
                said += self._dispatch(victim, now) if victim in self.state.queues else []
        return said

    def _stop_removed(self) -> list[To]:
        said = []
        for name in self.state.removing:
            model = self.state.models.get(name)
            for worker in list(model.instances) if model is not None else ():
                instance = self.state.workers[worker].instances[name]
                if instance.status in ("running", "draining") and not instance.active:
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

    # ---- what they have in common -----------------------------------------------------------------------------

    def _know(self, card: ModelCard) -> KnownModel:
        model = self.state.models.get(card.model)
        if model is None:
            model = self.state.models[card.model] = KnownModel(card, servers={}, instances={})
        model.card = card
        return model

    def _settle(self, name: str, reason: str = "") -> list[To]:
        """A model that no server holds and no worker runs is forgotten; who still waits for it is told."""
        model = self.state.models.get(name)
        if model is None or model.servers or model.instances:
            return []
        said = self._refuse_waiting(name, "unknown_model", reason or f"no server holds {name} any more")
        del self.state.models[name]
        self.state.removing.pop(name, None)
        return said

    def _note_loading(self, server_name: str, server: Server, model: KnownModel) -> None:
        """The model is on its way to DRAM where an instance starts from SSD."""
        name = model.card.model
        if model.servers.get(server_name) != "ssd" or not server.up:
            return
        for worker_name in model.instances:
            worker = self.state.workers[worker_name]
            if worker.server == server_name and worker.instances[name].status == "starting":
                server.loading.setdefault(name, model.card.weight_bytes)
                return

    def _note_loaded(self, server: str, model: str) -> None:
        if server in self.state.servers:
            self.state.servers[server].loading.pop(model, None)

    def _instance(self, worker: str, model: str) -> RunningInstance | None:
        known = self.state.workers.get(worker)
        return known.instances.get(model) if known is not None else None

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

    def _leave_room(self, worker: str, name: str) -> None:
        """Whoever had this instance drained need not wait for it any longer."""
        for room in self.state.room.values():
            if (worker, name) in room.victims:
                room.victims.remove((worker, name))

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
                self.state.placed.pop(request, None)
            self._remove_instance(name, worker, model_name)
            said += self._settle(model_name)
        del self.state.workers[name]
        for model_name in [model for model, room in self.state.room.items() if room.worker == name]:
            said += self._undrain(model_name, now)
        return said

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

    def _refuse_too_large(self) -> list[To]:
        """Those who waited for the first worker or server, and it turns out that their model does not fit."""
        said = []
        for name in list(self.state.queues):
            model = self.state.models[name]
            if not model.instances and (too_large := self._too_large(model)):
                said += self._refuse_waiting(name, "too_large", too_large)
        return said

    def _too_large(self, model: KnownModel) -> str:
        """One sentence where no worker that was ever up could hold it beside its server; empty where one could."""
        card = model.card
        servers = {name: self.state.servers[name].dram_bytes for name in model.servers}
        if servers and card.weight_bytes > max(servers.values()):
            largest = max(servers.values())
            return f"{card.model} needs {card.weight_bytes} bytes of DRAM; the largest budget is {largest}"
        sizes = [size for size in self.state.sizes.values() if size.server in servers]
        fitting = [size for size in sizes if kv_plan(card, size.memory_bytes, size.max_slots)[0]]
        if not sizes or any(card.weight_bytes <= servers[size.server] for size in fitting):
            return ""
        need = card.weight_bytes + card.context * card.kv_bytes_per_token
        largest = max(size.memory_bytes for size in sizes)
        return (
            f"{card.model} needs {need} bytes of device memory for its weights and one full context; "
            f"the largest worker has {largest}"
        )
