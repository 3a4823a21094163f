"""Weighing a spread: sequences that share a device with another model's, while another device idles (rule version 3).

Engines of one device take turns, so each of two models has half of it. What may go is one instance with its sequences,
the smallest first: each of them has run for SPREAD_AFTER_NS and was never moved by placement. It goes where nothing
runs and nothing has to be evicted, if it goes on there within SPREAD_LIMIT_NS (the estimate of an exchange).
"""

from __future__ import annotations

from typing import NamedTuple

from actors.learning import SECOND
from actors.placement_exchange import PLACES_LIMIT, SEQUENCES_LIMIT, destinations_of, may_move, tokens_of
from actors.placement_start import Option
from actors.placement_state import PlacementState, RunningInstance, Worker
from actors.resume_times import ResumeTimes

SPREAD_AFTER_NS = 2 * SECOND
SPREAD_LIMIT_NS = SECOND


class Spread(NamedTuple):
    """`option`: how the model starts at `to`, None where it runs there, idle; `shared`: models that stay."""

    worker: str
    model: str
    to: str
    option: Option | None
    requests: tuple[str, ...]
    shared: tuple[str, ...]
    resume_ns: int


def choose_spread(state: PlacementState, now: int, rules: int) -> Spread | None:
    """What should leave the busiest shared device for an idle one; None where nothing should."""
    crowded = [
        (name, worker)
        for name, worker in state.workers.items()
        if len(_busy(worker)) > 1 and worker.server not in state.draining
    ]
    crowded.sort(key=lambda one: -sum(len(instance.active) for instance in _busy(one[1]).values()))
    for place, worker in crowded[:PLACES_LIMIT]:
        busy = _busy(worker)
        for victim in sorted(busy, key=lambda one: len(busy[one].active)):
            found = _weigh(state, place, victim, busy, now, rules)
            if found is not None:
                return found
    return None


def _weigh(
    state: PlacementState, place: str, victim: str, busy: dict[str, RunningInstance], now: int, rules: int
) -> Spread | None:
    instance = busy[victim]
    if instance.status != "running" or len(instance.active) > SEQUENCES_LIMIT or state.models[victim].removed:
        return None
    for request in instance.active:
        if not may_move(state, request, place, now) or state.exchange.sequences[request].moves:
            return None
        if now - state.placed[request].since < SPREAD_AFTER_NS:
            return None
    tokens = sum(tokens_of(state, request, now) for request in instance.active)
    times = state.exchange.resume.get(victim, ResumeTimes())
    for start_ns, to, option in destinations_of(state, state.models[victim], len(instance.active), rules):
        resume_ns = start_ns + times.estimate(tokens, len(instance.active))
        if to == place or not _idles(state.workers[to]) or resume_ns > SPREAD_LIMIT_NS:
            continue
        if option is not None and (option.candidate.evict or option.slots < len(instance.active)):
            continue
        shared = tuple(model for model in busy if model != victim)
        return Spread(place, victim, to, option, tuple(instance.active), shared, resume_ns)
    return None


def _busy(worker: Worker) -> dict[str, RunningInstance]:
    return {name: instance for name, instance in worker.instances.items() if instance.active}


def _idles(worker: Worker) -> bool:
    return all(one.status == "running" and not one.active for one in worker.instances.values())
