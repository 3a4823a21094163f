"""Weighing where a model could start: candidates, their estimates, and whom to drain when there is no room.

Estimates are integers in nanoseconds; equal estimates are decided by fewer evictions, then by the longest idle victim,
then by the order in which workers came, so that every replica chooses the same.
"""

from __future__ import annotations

from typing import NamedTuple

from actors.placement_state import SECOND, KnownModel, PlacementState, RunningInstance, Worker, kv_plan
from bus.messages import Candidate

DETACH_NS = 20_000_000
"""To detach one idle instance: freeing memory, no copy."""


class Option(NamedTuple):
    """A candidate with what its start would reserve."""

    candidate: Candidate
    slots: int
    kv_bytes: int
    idle_since: int

    @property
    def total_ns(self) -> int:
        c = self.candidate
        return c.queue_ns + c.load_ns + c.free_ns + c.attach_ns


def best_options(state: PlacementState, model: KnownModel, *, unmet: int, running: bool) -> list[Option]:
    """All workers where the model could start now, the soonest first.

    `running`: it runs or starts somewhere already; then only free memory counts, unless the `unmet` requests would
    fill a whole further instance.
    """
    if model.removed:
        return []
    options = []
    for name, worker in state.workers.items():
        option = _weigh(state, model, name, worker)
        if option is None:
            continue
        if running and option.candidate.evict and unmet < option.slots:
            continue
        options.append(option)
    options.sort(key=lambda option: (option.total_ns, len(option.candidate.evict), option.idle_since))
    return options


def _weigh(state: PlacementState, model: KnownModel, name: str, worker: Worker) -> Option | None:
    card = model.card
    server = state.servers.get(worker.server)
    tier = model.servers.get(worker.server)
    if server is None or not server.up or tier is None or card.model in worker.instances:
        return None
    slots, kv_bytes = kv_plan(card, worker.memory_bytes, worker.max_slots)
    if not slots:
        return None
    victims = _victims(worker, card.weight_bytes + kv_bytes, idle_only=True)
    if victims is None:
        return None
    if tier == "ssd" and not _dram_has_room(state, model, worker, victims):
        return None
    queue_ns, load_ns = 0, 0
    if tier == "ssd":
        ahead = sum(size for other, size in server.loading.items() if other != card.model)
        queue_ns = ahead * SECOND // server.ssd_rate
        load_ns = server.loading.get(card.model, card.weight_bytes) * SECOND // server.ssd_rate
    candidate = Candidate(name, tier, queue_ns, load_ns, len(victims) * DETACH_NS, model.attach_ns, tuple(victims))
    idle_since = min((worker.instances[victim].used_at for victim in victims), default=0)
    return Option(candidate, slots, kv_bytes, idle_since)


def _victims(worker: Worker, need: int, *, idle_only: bool) -> list[str] | None:
    """Least recently used instances whose memory makes `need` bytes free; None where that is not enough."""
    free = worker.free()
    victims: list[str] = []
    ranked = sorted(worker.instances.items(), key=lambda item: (len(item[1].active), item[1].used_at))
    for name, instance in ranked:
        if free >= need:
            break
        if _can_go(instance, idle_only=idle_only):
            victims.append(name)
            free += instance.memory
    return victims if free >= need else None


def _can_go(instance: RunningInstance, *, idle_only: bool) -> bool:
    if idle_only:
        return instance.status in ("running", "draining") and not instance.active
    return instance.status == "running"


def _dram_has_room(state: PlacementState, model: KnownModel, worker: Worker, victims: list[str]) -> bool:
    """Whether the server's DRAM budget can take the model beside what its workers hold leased."""
    leased: dict[str, bool] = {}
    for other in state.workers.values():
        if other.server != worker.server:
            continue
        for name in other.instances:
            if other is not worker or name not in victims:
                leased[name] = True
    leased.pop(model.card.model, None)
    used = sum(state.models[name].card.weight_bytes for name in leased if name in state.models)
    return used + model.card.weight_bytes <= state.servers[worker.server].dram_bytes


def choose_drain(state: PlacementState, model: KnownModel) -> tuple[str, list[str]] | None:
    """The worker that loses least by making room for the model, and which of its instances; None where none should.

    An instance for which an older request waits is left alone, and so is a worker that is being drained already.
    """
    card = model.card
    head = state.head(card.model)
    drained = list(state.room.values())
    best: tuple[int, str, list[str]] | None = None
    for name, worker in state.workers.items():
        server = state.servers.get(worker.server)
        if server is None or not server.up or worker.server not in model.servers or name in drained:
            continue
        slots, kv_bytes = kv_plan(card, worker.memory_bytes, worker.max_slots)
        if not slots or any(i.status in ("starting", "stopping") for i in worker.instances.values()):
            continue
        victims = _victims(worker, card.weight_bytes + kv_bytes, idle_only=False)
        if victims is None or any(v in state.queues and state.head(v) < head for v in victims):
            continue
        work = sum(len(worker.instances[victim].active) for victim in victims)
        if best is None or work < best[0]:
            best = (work, name, victims)
    return (best[1], best[2]) if best is not None else None
