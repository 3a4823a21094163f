"""What placement keeps in order: which models, servers, workers and instances there are, who waits, what can never fit.

The lower half of `actors.placement`: nothing here decides where something starts.
"""

from __future__ import annotations

from actors.actor import Actor
from actors.learning import LARGEST
from actors.placement_sources import peers_of
from actors.placement_state import KnownModel, PlacementState, RunningInstance, Server, Waiting, kv_plan
from bus.messages import (
    ModelCard,
    PlacementRefused,
    PlaceRequest,
    To,
)


class PlacementBooks(Actor):
    """State and bookkeeping of placement."""

    State = PlacementState
    state: PlacementState

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
        self.state.exchange.resume.pop(name, None)
        self.state.exchange.token_ns.pop(name, None)
        return said

    def _adopt_source(self, model: KnownModel, source: str) -> None:
        """Where it can be fetched: as an operator said, or as a store found; but a copy of another server is no
        source, that server may let it go."""
        name = model.card.model
        copied = any(one.address and source.startswith(f"{one.address}/") for one in self.state.servers.values())
        model.source = self.state.sources.get(name) or model.source or ("" if copied else source)

    def _note_loading(self, server_name: str, server: Server, model: KnownModel) -> None:
        """The model is on its way to DRAM where an instance starts from SSD or from remote."""
        name = model.card.model
        tier = model.servers.get(server_name, "remote")
        if tier == "dram" or not server.up:
            return
        if self.rules >= 3 and server.streams(model.card) and (self.rules < 5 or tier != "remote"):
            return
        for worker_name in model.instances:
            worker = self.state.workers[worker_name]
            if worker.server == server_name and worker.instances[name].status == "starting":
                server.loading.setdefault(name, model.card.weight_bytes)
                if tier == "remote":
                    asked = [peer for peer, _ in peers_of(self.state, model) if peer != server_name]
                    server.fetching[name] = asked[0] if asked else ""
                return

    def _note_loaded(self, server: str, model: str) -> None:
        if server in self.state.servers:
            self.state.servers[server].loading.pop(model, None)
            self.state.servers[server].fetching.pop(model, None)

    def _instance(self, worker: str, model: str) -> RunningInstance | None:
        known = self.state.workers.get(worker)
        return known.instances.get(model) if known is not None else None

    def _enqueue(self, message: PlaceRequest, now: int) -> None:
        queue = self.state.queues.setdefault(message.model, {})
        queue[message.request] = Waiting(
            message.attempt, message.accepted, now, message.priority, message.deadline, message.tokens
        )
        self.state.waiting += 1
        if len(queue) > 1 and message.attempt > 1:
            ordered = sorted(queue.items(), key=lambda item: item[1].accepted)
            queue.clear()
            queue.update(ordered)

    def _dequeue(self, model: str, request: str) -> None:
        queue = self.state.queues[model]
        del queue[request]
        self.state.exchange.tried.pop(request, None)
        self.state.waiting -= 1
        if not queue:
            del self.state.queues[model]

    def _refuse(self, message: PlaceRequest, code: str, reason: str, retry_ms: int = 0) -> To:
        refused = PlacementRefused(message.request, message.attempt, code, reason, retry_ms)  # type: ignore[arg-type]
        return To("requests", refused)

    def _queue_full(self, message: PlaceRequest, model: KnownModel) -> To:
        limit, retry_ms = self.state.configuration.queue_limit, self.state.retry_ms(model)
        waiting = f"{self.state.waiting} requests wait already (the limit is {limit})"
        many = f", {message.choice.of} more do not fit" if message.choice is not None else ""
        return self._refuse(message, "queue_full", f"{waiting}{many}; try again in {retry_ms} ms", retry_ms)

    def _too_many(self, message: PlaceRequest) -> bool:
        """Whether the answers of one request do not get into the queue together: all are refused, or none."""
        choice = message.choice
        if choice is None or message.attempt > 1:
            return False
        if choice.index == 0:
            full = self.state.waiting + choice.of > self.state.configuration.queue_limit
            self.state.refused = choice.family if full else ""
        return self.state.refused == choice.family

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
        fetched = bool(model.source or any(self.state.servers[name].address for name in model.servers))
        holders = list(self.state.servers if fetched else model.servers)
        if self.rules >= 4:
            fitting_disks = [name for name in holders if self._disk_takes(name, model)]
            if holders and not fitting_disks:
                return (
                    f"{card.model} lies on no server, and on no SSD is room for its {card.weight_bytes} bytes: what "
                    "lies there and nowhere else may not go; remove a model, or enlarge --ssd"
                )
            holders = fitting_disks
        servers = {name: self._takes(name, model) for name in holders}
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

    def _disk_takes(self, server: str, model: KnownModel) -> bool:
        """Whether it lies on this SSD, or the budget has room for it beside what may not go from there."""
        found = self.state.servers[server]
        on_ssd = model.servers.get(server, "remote") != "remote"
        return on_ssd or not found.ssd_bytes or found.own_bytes + model.card.weight_bytes <= found.ssd_bytes

    def _takes(self, server: str, model: KnownModel) -> int:
        """How large this model may be there: what lies on the SSD may be streamed from it, from rule version 3 on, and
        what comes to it first, from 5 on."""
        on_ssd = model.servers.get(server, "remote") != "remote"
        streamed = self.rules >= (3 if on_ssd else 5)
        return LARGEST if streamed else self.state.servers[server].dram_bytes

    def _index(self, worker: str, model: KnownModel, instance: RunningInstance) -> None:
        """Keep `model.open` true after the status or the slots in use of one of its instances changed."""
        takes = instance.status == "running" and not instance.outdated
        takes = takes and self.state.workers[worker].server not in self.state.draining
        free = instance.slots - len(instance.active) if takes else 0
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
