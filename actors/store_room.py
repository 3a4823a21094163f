"""Which models leave a tier to make room: those whose loss costs least (from rule version 3 on).

    loss of a model = time to bring it back / time until it is wanted        both in nanoseconds
    time to bring it back = what every load costs + bytes / bandwidth of the tier below, as learned from finished loads
    time until it is wanted = the mean time between its leases, or the time since its last one if that is longer;
        next to nothing where requests wait for it now

A loss is in nanoseconds of loading per second. Of all that may go, the one model that makes enough room at the least
loss is weighed against several of the least loss per byte. Under older rules the least recently used go first.
"""

from __future__ import annotations

import msgspec

from actors.learning import SECOND
from actors.store_state import StoreState

LOAD_NS = SECOND // 20
"""What a load costs however small it is."""

UNKNOWN_INTERVAL_NS = 600 * SECOND
"""Of a model that was wanted once so far."""


class Evictable(msgspec.Struct, frozen=True):
    """A model that may leave a tier, with what that would cost; times in nanoseconds."""

    name: str
    size: int
    bring_back_ns: int
    wait_ns: int
    wanted_now: bool = False

    @property
    def loss(self) -> int:
        return self.bring_back_ns * SECOND // self.wait_ns

    @property
    def words(self) -> str:
        if self.wanted_now:
            return f"{_time(self.bring_back_ns)} to bring back, requests wait for it"
        return f"{_time(self.bring_back_ns)} to bring back, wanted about every {_time(self.wait_ns)}"


def evictable(
    name: str, size: int, rate: int, interval_ns: int, idle_ns: int, *, wanted_now: bool = False
) -> Evictable:
    """`rate`: bytes per second of the tier below; `interval_ns`: mean time between leases, 0 if unknown."""
    wait = 1 if wanted_now else max(interval_ns or UNKNOWN_INTERVAL_NS, idle_ns, 1)
    return Evictable(name, size, LOAD_NS + size * SECOND // max(1, rate), wait, wanted_now)


def choose(candidates: list[Evictable], short: int) -> list[Evictable] | None:
    """Those that make `short` bytes free at the least loss; None where all together do not. Ties go to the first."""
    if sum(one.size for one in candidates) < short:
        return None
    alone = [one for one in candidates if one.size >= short]
    best = [min(alone, key=lambda one: one.loss)] if alone else None
    several: list[Evictable] = []
    for one in sorted(candidates, key=lambda one: one.loss * SECOND // max(1, one.size)):
        if sum(taken.size for taken in several) >= short:
            break
        several.append(one)
    for one in sorted(several, key=lambda one: -one.loss):
        if sum(taken.size for taken in several) - one.size >= short:
            several.remove(one)
    if best is not None and best[0].loss <= sum(one.loss for one in several):
        return best
    return several


def explain(victim: Evictable, wanted: str, candidates: list[Evictable], chosen: list[Evictable]) -> str:
    """Why this one, and what stays instead."""
    text = f"makes room for {wanted}: {victim.words}"
    kept = [one for one in candidates if one not in chosen]
    if kept:
        next_best = min(kept, key=lambda one: one.loss)
        text += f"; kept {next_best.name}: {next_best.words}"
    return text


def least_recent(state: StoreState) -> str | None:
    """Who goes from DRAM under rules before version 3."""
    best: str | None = None
    for name, model in state.models.items():
        may = model.tier == "dram" and not model.leases
        if may and (best is None or model.used_at < state.models[best].used_at):
            best = name
    return best


def _time(nanoseconds: int) -> str:
    if nanoseconds >= SECOND:
        return f"{nanoseconds // SECOND}.{nanoseconds % SECOND // 100_000_000} s"
    return f"{nanoseconds // 1_000_000} ms"
