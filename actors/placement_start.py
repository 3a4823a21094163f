"""Weighing where a model could start: candidates, their estimates, and whom to drain when there is no room.

Estimates are integers in nanoseconds; equal estimates are decided by `order`, and in the end by the order in which
workers came, so that every replica chooses the same.

Room is needed twice: on the device, and in the server's DRAM, where every instance keeps its model leased.
"""

from __future__ import annotations

from typing import NamedTuple

from actors.learning import LARGEST, SECOND
from actors.placement_sources import peers_of, sources_for
from actors.placement_state import KnownModel, PlacementState, RunningInstance, Server, Worker, kv_plan
from bus.messages import Candidate, ModelCard, Tier

DETACH_NS = 20_000_000
"""To detach one idle instance: freeing memory, no copy."""


class Option(NamedTuple):
    """A candidate with what its start would reserve. `neighbours`: instances that stay on the device beside it."""

    candidate: Candidate
    slots: int
    kv_bytes: int
    idle_since: int
    neighbours: int

    @property
    def total_ns(self) -> int:
        c = self.candidate
        return c.queue_ns + c.load_ns + c.free_ns + c.attach_ns


def order_1(model: KnownModel, option: Option) -> tuple[int, ...]:
    """Rule version 1. Workers on which the last starts of the model failed come after those on which they did not;
    then the soonest, the fewest evictions, the longest idle victim."""
    candidate = option.candidate
    failed = model.failed_on.get(candidate.worker, 0)
    return failed, option.total_ns, len(candidate.evict), option.idle_since


def order_2(model: KnownModel, option: Option) -> tuple[int, ...]:
    """Rule version 2. As 1, but of places that are equally soon and evict equally many the device with the least to do,
    then with the fewest instances. Under 1 every model starts on the first worker as long as its memory lasts, and
    they share one device while others idle."""
    candidate = option.candidate
    failed = model.failed_on.get(candidate.worker, 0)
    return failed, option.total_ns, len(candidate.evict), candidate.busy, option.neighbours, option.idle_since


ORDERS = {1: order_1, 2: order_2, 3: order_2, 4: order_2, 5: order_2}
"""By rule version. When one may go stands at the head of `actors.rules`."""


def best_options(
    state: PlacementState, model: KnownModel, *, unmet: int, running: bool, rules: int
) -> tuple[list[Option], int]:
    """All workers where the model could start now, the soonest first; and, where there is none, how many waiting
    requests are too few to look again before anything else changes.

    `running`: it runs or starts somewhere already; then only free memory counts, unless the `unmet` requests would
    fill a whole further instance.
    """
    enough = LARGEST
    if model.removed:
        return [], enough
    options = []
    reserved, peers = _reserved(state, model), peers_of(state, model)
    for name, worker in state.workers.items():
        if name in reserved:
            continue
        option = _weigh(state, model, name, worker, reserved, peers, rules)
        if option is None:
            continue
        if running and option.candidate.evict and unmet < option.slots:
            enough = min(enough, option.slots - 1)
            continue
        options.append(option)
    order = ORDERS[rules]
    options.sort(key=lambda option: order(model, option))
    return options, enough


def _reserved(state: PlacementState, model: KnownModel) -> dict[str, ModelCard]:
    """Workers that are drained for a model with an older request, and that model."""
    if not state.room:
        return {}
    # Without a queue it is a move that wants the model: everybody who waits comes before.
    head = state.head(model.card.model) if model.card.model in state.queues else LARGEST
    return {
        room.worker: state.models[other].card
        for other, room in state.room.items()
        if other != model.card.model and other in state.queues and state.head(other) < head
    }


def _weigh(
    state: PlacementState,
    model: KnownModel,
    name: str,
    worker: Worker,
    reserved: dict[str, ModelCard],
    peers: list[tuple[str, str]],
    rules: int,
) -> Option | None:
    card = model.card
    server = state.servers.get(worker.server)
    tier = nearest_tier(state, model, worker.server, peers, rules=rules)
    if server is None or tier is None or card.model in worker.instances:
        return None
    slots, kv_bytes = kv_plan(card, worker.memory_bytes, worker.max_slots)
    if not slots:
        return None
    victims = _victims(worker, card.weight_bytes + kv_bytes, {}, idle_only=True)
    if victims is None:
        return None
    promised = [other for place, other in reserved.items() if state.workers[place].server == worker.server]
    if not _find_room(server, card, worker, victims, promised, rules, far=tier == "remote"):
        return None
    queue_ns, load_ns = loading_times(server, card, tier)
    busy = _busy(state, worker) if rules >= 2 else 0
    free_ns = len(victims) * DETACH_NS
    error_ns = server.error_ns(tier) if rules >= 3 else 0
    candidate = Candidate(name, tier, queue_ns, load_ns, free_ns, model.attach_ns, tuple(victims), busy, error_ns)
    idle_since = min((worker.instances[victim].used_at for victim in victims), default=0)
    return Option(candidate, slots, kv_bytes, idle_since, len(worker.instances) - len(victims))


def nearest_tier(
    state: PlacementState, model: KnownModel, server_name: str, peers: list[tuple[str, str]], *, rules: int = 0
) -> Tier | None:
    """From where this server would bring the model to DRAM; None where it cannot, or takes nothing new.

    What is larger than the budget of DRAM comes to the SSD only, from rule version 5 on.
    """
    server = state.servers.get(server_name)
    tier = model.servers.get(server_name, "remote")
    if server is None or not server.up or server_name in model.replaced or server_name in state.draining:
        return None
    if tier == "remote" and server.streams(model.card) and rules < 5:
        return None  # it is streamed from the SSD only
    if tier == "remote" and not model.source and all(name == server_name for name, _ in peers):
        return None
    return tier


def loading_times(server: Server, card: ModelCard, tier: Tier) -> tuple[int, int]:
    """(q, n/b) in nanoseconds: what is queued on the server's loading path, and the model's own bytes."""
    if tier == "dram":
        return 0, 0
    ahead = dict.fromkeys((server.ssd_rate, server.remote_rate), 0)
    for other, size in server.loading.items():
        if other != card.model:
            ahead[server.rate(other)] += size
    rate = server.ssd_rate if tier == "ssd" else server.remote_rate
    queue_ns = sum(size * SECOND // rate for rate, size in ahead.items())
    load_ns = server.loading.get(card.model, card.weight_bytes) * SECOND // rate
    if tier == "remote" and server.streams(card):  # and then its worker reads it from the SSD
        load_ns += card.weight_bytes * SECOND // server.ssd_rate
    return min(LARGEST, queue_ns), min(LARGEST, load_ns)


def _busy(state: PlacementState, worker: Worker) -> int:
    """Sequences that a device computes, or will as soon as what starts there runs."""
    busy = 0
    for name, instance in worker.instances.items():
        if instance.status == "starting":
            busy += min(instance.slots, len(state.queues.get(name, {})))
        else:
            busy += len(instance.active)
    return busy


def _victims(worker: Worker, need: int, kept: dict[str, bool], *, idle_only: bool) -> list[str] | None:
    """Least recently used instances whose memory makes `need` bytes free, none of `kept`; None where that is not
    enough."""
    free = worker.free()
    victims: list[str] = []
    if free >= need:
        return victims
    for name, instance in least_used(worker):
        if free >= need:
            break
        if name not in kept and _can_go(instance, idle_only=idle_only):
            victims.append(name)
            free += instance.memory
    return victims if free >= need else None


def least_used(worker: Worker) -> list[tuple[str, RunningInstance]]:
    return sorted(worker.instances.items(), key=lambda item: (len(item[1].active), item[1].used_at))


def _can_go(instance: RunningInstance, *, idle_only: bool) -> bool:
    if idle_only:
        return instance.status in ("running", "draining") and not instance.active
    return instance.status == "running"


def _find_room(
    server: Server,
    card: ModelCard,
    worker: Worker,
    victims: list[str],
    promised: list[ModelCard],
    rules: int,
    *,
    far: bool,
) -> bool:
    """Whether the server's DRAM, and its SSD for what comes from `far`, can take the model beside what is leased,
    loading or promised to older requests.

    Adds further idle instances of this worker to `victims` where that is what it takes.
    """
    short = dram_short(server, card, promised, rules)
    disk = ssd_short(server, card) if far else 0
    if short <= 0 and disk <= 0:
        return True
    for victim in victims:
        short -= dram_freed(server, victim)
        disk -= ssd_freed(server, victim)
    for name, instance in least_used(worker):
        if short <= 0 and disk <= 0:
            break
        if name in victims or not _can_go(instance, idle_only=True):
            continue
        memory, files = dram_freed(server, name), ssd_freed(server, name)
        if (short > 0 and memory) or (disk > 0 and files):
            victims.append(name)
            short -= memory
            disk -= files
    return short <= 0 and disk <= 0


def ssd_short(server: Server, card: ModelCard) -> int:
    """Bytes by which the SSD budget is exceeded if the model comes to what cannot go from there: what lies nowhere
    else, what is in use, and what is on its way; 0 or less for none."""
    if not server.ssd_bytes:
        return 0
    sizes = {name: lease.weight_bytes for name, lease in server.leased.items()}
    sizes.update(server.loading)
    sizes[card.model] = card.weight_bytes
    used = sum(size for name, size in sizes.items() if name not in server.own)
    return server.own_bytes + used - server.ssd_bytes


def ssd_freed(server: Server, name: str) -> int:
    """Bytes of the SSD that may go when one worker lets the model go: none where it lies nowhere else."""
    return dram_freed(server, name) if name not in server.own else 0


def dram_short(server: Server, card: ModelCard, promised: list[ModelCard], rules: int) -> int:
    """Bytes by which the DRAM budget is exceeded if the model comes to what stays there; 0 or less for none.

    From rule version 3 on, what is larger than the whole budget is streamed and takes none of it.
    """
    if rules >= 3 and server.streams(card):
        return 0
    sizes = {name: lease.weight_bytes for name, lease in server.leased.items()}
    sizes.update((name, size) for name, size in server.loading.items() if rules < 5 or size <= server.dram_bytes)
    for other in promised:
        if rules < 3 or not server.streams(other):
            sizes[other.model] = other.weight_bytes
    sizes[card.model] = card.weight_bytes
    return sum(sizes.values()) - server.dram_bytes


def dram_freed(server: Server, name: str) -> int:
    """Bytes of DRAM that come free when one worker lets the model go: none while another one holds it."""
    lease = server.leased.get(name)
    return lease.weight_bytes if lease is not None and lease.workers == 1 and name not in server.loading else 0


def choose_drain(state: PlacementState, model: KnownModel, *, rules: int) -> tuple[str, list[tuple[str, str]]] | None:
    """The worker that loses least by making room for the model, and which instances go, as (worker, model), on this
    worker for the device and on any worker of its server for DRAM; None where nothing should be drained.

    An instance for which an older request waits is left alone, and so is a worker that is being drained already.
    """
    card = model.card
    head = state.head(card.model)
    kept = {other: True for other in state.queues if state.head(other) < head}
    drained = [room.worker for room in state.room.values()]
    best: tuple[int, str, list[tuple[str, str]]] | None = None
    for name, worker in state.workers.items():
        server = state.servers.get(worker.server)
        if server is None or not server.up or name in drained:
            continue
        far = model.servers.get(worker.server, "remote") == "remote"
        if far and ((server.streams(card) and rules < 5) or not sources_for(state, model, worker.server)):
            continue
        if worker.server in state.draining:
            continue
        slots, kv_bytes = kv_plan(card, worker.memory_bytes, worker.max_slots)
        if not slots or any(i.status in ("starting", "stopping") for i in worker.instances.values()):
            continue
        on_device = _victims(worker, card.weight_bytes + kv_bytes, kept, idle_only=False)
        if on_device is None:
            continue
        victims = [(name, victim) for victim in on_device]
        short = dram_short(server, card, [], rules) - sum(dram_freed(server, victim) for victim in on_device)
        if far:
            files = ssd_short(server, card) - sum(ssd_freed(server, victim) for victim in on_device)
            short = max(short, files)
        if short > 0 and not _drain_dram(state, worker.server, short, kept, victims):
            continue
        if not victims:
            continue
        work = sum(len(state.workers[place].instances[victim].active) for place, victim in victims)
        if best is None or work < best[0]:
            best = (work, name, victims)
    return (best[1], best[2]) if best is not None else None


def _drain_dram(
    state: PlacementState, server_name: str, short: int, kept: dict[str, bool], victims: list[tuple[str, str]]
) -> bool:
    """Adds the least used models of a server to `victims`, on all workers that hold them, until DRAM is not short."""
    server = state.servers[server_name]
    chosen = {victim: True for _, victim in victims}
    holders: dict[str, list[str]] = {}
    for name, worker in state.workers.items():
        for model in worker.instances if worker.server == server_name else ():
            if model not in chosen or server.leased[model].workers > 1:
                holders.setdefault(model, []).append(name)

    def use(model: str) -> tuple[int, int]:
        instances = [state.workers[name].instances[model] for name in holders[model]]
        return sum(len(one.active) for one in instances), max(one.used_at for one in instances)

    for model in sorted(holders, key=use):
        if short <= 0:
            break
        places = holders[model]
        if model in kept or model in server.loading:
            continue
        if any(state.workers[w].instances[model].status != "running" for w in places):
            continue
        victims += [(name, model) for name in places if (name, model) not in victims]
        short -= server.leased[model].weight_bytes
    return short <= 0
