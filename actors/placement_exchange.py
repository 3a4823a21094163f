"""Weighing an exchange: what runs on a device goes on elsewhere, so that a model that lies near it starts there.

For each worker on which the model would start soonest, in nanoseconds (PAPER, contribution 3):
    start  queue + load + attach there, as for any start
    move   of the instances that go, the longest: its start at the destination (0 where it runs there), then
           a·(t_in + t_out) + b, with the tokens of all its sequences, since their prefill shares that device
Which instances go is a dynamic program over the instances of the device: of the choices that free the same memory only
those are kept that are not worse in time, in disturbance (the sum of what moves) and in DRAM. The least sum of start
and move wins; equal ones are decided by the order in which workers came.

An instance may go when nothing older waits for its model, and every sequence on it runs, moves nowhere yet, and was
not moved by placement lately (`HOLD_NS`) nor too often (`MOVES_LIMIT`).
"""

from __future__ import annotations

from typing import NamedTuple

from actors.learning import SECOND
from actors.placement_sources import peers_of
from actors.placement_start import (
    DETACH_NS,
    Option,
    best_options,
    choose_drain,
    dram_freed,
    dram_short,
    least_used,
    loading_times,
    nearest_tier,
)
from actors.placement_state import KnownModel, PlacementState, RunningInstance, Worker, kv_plan
from actors.resume_times import ResumeTimes

HOLD_NS = 10 * SECOND
"""A sequence that placement has moved, or tried to, stays where it is for so long."""
MOVES_LIMIT = 2
"""How often placement moves one sequence."""
SEQUENCES_LIMIT = 64
"""Sequences that one exchange moves."""
PLACES_LIMIT = 8
"""Workers that are weighed, the soonest first; and destinations of one instance."""
CHOICES_LIMIT = 64
"""Choices of instances that the dynamic program keeps."""
TOKEN_NS = 20_000_000
"""Mean time per token of a model of which nothing has ended yet."""
MARGIN_NS = 50_000_000
"""What an exchange must be sooner by, beside a quarter of the other way and the error of the estimate."""


class Relocation(NamedTuple):
    """The sequences of one instance, and where they go on; `option`: how its model starts there, None where it runs."""

    model: str
    to: str
    option: Option | None
    tokens: dict[str, int]
    resume_ns: int
    error_ns: int


class Exchange(NamedTuple):
    """`stops`: idle instances that go, too. `weighed`: workers on which there was such a choice."""

    worker: str
    relocations: tuple[Relocation, ...]
    stops: tuple[str, ...]
    start_ns: int
    move_ns: int
    error_ns: int
    weighed: int

    @property
    def total_ns(self) -> int:
        return self.start_ns + self.move_ns


class _Choice(NamedTuple):
    """Some instances of a device that go: what that frees, how long it takes, what it disturbs, where they go."""

    memory: int = 0
    dram: int = 0
    longest_ns: int = 0
    sum_ns: int = 0
    relocations: tuple[Relocation, ...] = ()
    stops: tuple[str, ...] = ()

    def is_worse(self, other: _Choice) -> bool:
        return (
            other.memory >= self.memory
            and other.dram >= self.dram
            and other.longest_ns <= self.longest_ns
            and other.sum_ns <= self.sum_ns
        )


def choose_exchange(state: PlacementState, model: KnownModel, now: int, rules: int) -> Exchange | None:
    """The exchange by which the model, which runs nowhere, would run soonest; None where there is none."""
    name = model.card.model
    head = state.head(name)
    older = {other: True for other in state.queues if state.head(other) < head}
    taken = {room.worker: True for other, room in state.room.items() if other != name}
    taken |= {wish.to: True for wish in state.wishes.values()}
    own = state.room.get(name)
    peers = peers_of(state, model)
    places: list[tuple[int, str]] = []
    for place, worker in state.workers.items():
        if place in taken or (own is not None and own.worker != place) or name in worker.instances:
            continue
        if any(instance.status in ("starting", "stopping") for instance in worker.instances.values()):
            continue
        start_ns = start_time(state, model, worker, peers)
        if start_ns is not None and not model.failed_on.get(place) and any(i.active for i in worker.instances.values()):
            places.append((start_ns, place))
    places.sort(key=lambda place: place[0])
    destinations: dict[str, list[tuple[int, str, Option | None]]] = {}
    best: Exchange | None = None
    weighed = 0
    for start_ns, place in places[:PLACES_LIMIT]:
        choice = _weigh_place(state, model, place, older, destinations, now, rules)
        if choice is None:
            continue
        weighed += 1
        errors = max(relocation.error_ns for relocation in choice.relocations)
        found = Exchange(place, choice.relocations, choice.stops, start_ns, choice.longest_ns, errors, weighed)
        if best is None or found.total_ns < best.total_ns:
            best = found
    return best._replace(weighed=weighed) if best is not None else None


def start_time(state: PlacementState, model: KnownModel, worker: Worker, peers: list[tuple[str, str]]) -> int | None:
    """Nanoseconds from a free device there until the model runs; None where it cannot start there."""
    tier = nearest_tier(state, model, worker.server, peers)
    if tier is None or not kv_plan(model.card, worker.memory_bytes, worker.max_slots)[0]:
        return None
    return sum(loading_times(state.servers[worker.server], model.card, tier)) + model.attach_ns


def drain_time(state: PlacementState, model: KnownModel, now: int, rules: int) -> int:
    """Nanoseconds until the model runs where what loses least is waited for; 0 where that is not known.

    What is left to a sequence: the mean time that those of its model had a slot, less what it has had; one that is
    beyond the mean is expected to stay as long again as it is beyond it, a quarter of the mean at the least.
    """
    room = state.room.get(model.card.model)
    chosen = (room.worker, room.victims) if room is not None else choose_drain(state, model, rules=rules)
    if chosen is None:
        return 0
    longest = 0
    for place, victim in chosen[1]:
        known = state.models[victim]
        for request in state.workers[place].instances[victim].active:
            placed = state.placed.get(request)
            if placed is None or victim not in state.exchange.token_ns:
                return 0
            left = known.service_ns - (now - placed.since)
            longest = max(longest, left, -left, known.service_ns // 4)
    start_ns = start_time(state, model, state.workers[chosen[0]], peers_of(state, model))
    return 0 if start_ns is None else longest + start_ns


def tokens_of(state: PlacementState, request: str, now: int) -> int:
    """Prompt and answer so far of a running sequence: what was known when it got its slot, and the mean since."""
    placed, known = state.placed[request], state.exchange.sequences[request]
    each = state.exchange.token_ns.get(placed.model, TOKEN_NS)
    context = state.models[placed.model].card.context
    return min(context, known.tokens + max(0, now - placed.since) // each)


def may_move(state: PlacementState, request: str, place: str, now: int) -> bool:
    """Whether placement may move this sequence on its own."""
    placed, known = state.placed.get(request), state.exchange.sequences.get(request)
    if placed is None or known is None or placed.worker != place or request in state.wishes or request in state.kept:
        return False
    return known.tokens > 0 and known.moves < MOVES_LIMIT and (not known.moved_at or now - known.moved_at >= HOLD_NS)


def _weigh_place(
    state: PlacementState,
    model: KnownModel,
    place: str,
    older: dict[str, bool],
    destinations: dict[str, list[tuple[int, str, Option | None]]],
    now: int,
    rules: int,
) -> _Choice | None:
    """The choice of instances that frees this device soonest, with at least one that moves."""
    worker = state.workers[place]
    server = state.servers[worker.server]
    _, kv_bytes = kv_plan(model.card, worker.memory_bytes, worker.max_slots)
    short = model.card.weight_bytes + kv_bytes - worker.free()
    dram = dram_short(server, model.card, [], rules)
    choices = [_Choice()]
    for victim, instance in least_used(worker):
        if victim in older or not _may_go(state, model, place, victim, instance, now):
            continue
        longer: list[_Choice] = []
        for choice in choices:
            more = _with(state, choice, place, victim, instance, destinations, now, rules)
            if more is not None:
                longer.append(more)
        choices = _kept(choices + longer)
    enough = [one for one in choices if one.relocations and one.memory >= short and one.dram >= dram]
    return min(enough, key=lambda one: (one.longest_ns, one.sum_ns)) if enough else None


def _may_go(
    state: PlacementState, model: KnownModel, place: str, victim: str, instance: RunningInstance, now: int
) -> bool:
    room = state.room.get(model.card.model)
    ours = room is not None and (place, victim) in room.victims
    if instance.status != "running" and not (ours and instance.status == "draining"):
        return False
    known = state.models[victim]
    if instance.active and (known.removed or known.card.kind != "decoder" or len(instance.active) > SEQUENCES_LIMIT):
        return False
    return all(may_move(state, request, place, now) for request in instance.active)


def _with(
    state: PlacementState,
    choice: _Choice,
    place: str,
    victim: str,
    instance: RunningInstance,
    destinations: dict[str, list[tuple[int, str, Option | None]]],
    now: int,
    rules: int,
) -> _Choice | None:
    """The choice with one more instance; None where its sequences have nowhere to go."""
    memory = choice.memory + instance.memory
    server = state.workers[place].server
    freed = dram_freed(state.servers[server], victim)
    if not instance.active:
        sums = max(choice.longest_ns, DETACH_NS), choice.sum_ns + DETACH_NS
        return choice._replace(
            memory=memory, dram=choice.dram + freed, longest_ns=sums[0], sum_ns=sums[1], stops=(*choice.stops, victim)
        )
    if victim not in destinations:
        destinations[victim] = destinations_of(state, state.models[victim], len(instance.active), rules)
    used = {relocation.to: True for relocation in choice.relocations}
    for start_ns, to, option in destinations[victim]:
        slots = option.slots if option is not None else state.workers[to].instances[victim].free
        if to == place or to in used or slots < len(instance.active):
            continue
        if state.workers[to].server == server:
            freed = 0  # it stays in the DRAM of this server
        times = state.exchange.resume.get(victim, ResumeTimes())
        tokens = {request: tokens_of(state, request, now) for request in instance.active}
        resume_ns = start_ns + times.estimate(sum(tokens.values()), len(tokens))
        relocation = Relocation(victim, to, option, tokens, resume_ns, times.error_ns)
        return _Choice(
            memory,
            choice.dram + freed,
            max(choice.longest_ns, resume_ns + DETACH_NS),
            choice.sum_ns + resume_ns + DETACH_NS,
            (*choice.relocations, relocation),
            choice.stops,
        )
    return None


def destinations_of(
    state: PlacementState, model: KnownModel, sequences: int, rules: int
) -> list[tuple[int, str, Option | None]]:
    """Where sequences of a model can go on, the soonest first: (start, worker, how it starts there)."""
    found: list[tuple[int, str, Option | None]] = []
    for free in sorted(model.open, reverse=True):
        found += [(0, worker, None) for worker in model.open[free]] if free >= sequences else []
    options, _ = best_options(state, model, unmet=sequences, running=False, rules=rules)
    failed = model.failed_on
    found += [(one.total_ns, one.candidate.worker, one) for one in options if not failed.get(one.candidate.worker)]
    # One more than are wanted: one of them may be where they run.
    return found[: PLACES_LIMIT + 1]


def _kept(choices: list[_Choice]) -> list[_Choice]:
    """Without those than which another one is no worse in anything."""
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda one: (one.longest_ns, one.sum_ns, -one.memory, -one.dram)):
        if not any(choice.is_worse(other) for other in kept):
            kept.append(choice)
    return kept[:CHOICES_LIMIT]
