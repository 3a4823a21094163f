"""What goes wrong on one simulated connection: seeded fates for the hooks of `bus.memory_faults`.

Every seed switches some kinds of fault off and draws the rest's odds anew (swarm testing): a world in which everything
fails at once hides what only shows when one thing does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields, replace
from random import Random

from bus.contract import Record
from bus.memory_faults import AppendFate


@dataclass(frozen=True, slots=True)
class Odds:
    """How often (0 to 1) each kind of fault strikes; 0 is off."""

    append_late: float = 0.0
    """An append takes up to half a second to arrive; what the connection sends behind it waits."""
    append_lost: float = 0.0
    """An append vanishes on the way, unanswered."""
    answer_lost: float = 0.0
    """An append is stored, and nobody answers."""
    answer_late: float = 0.0
    stored_twice: float = 0.0
    delivery_late: float = 0.0
    """A reader sees a record up to a second after it was stored."""
    core_lost: float = 0.0
    core_late: float = 0.0

    def on(self) -> list[str]:
        """The kinds that are switched on."""
        return [field.name for field in fields(self) if getattr(self, field.name) > 0]


LARGEST = Odds(
    append_late=0.03,
    append_lost=0.03,
    answer_lost=0.04,
    answer_late=0.05,
    stored_twice=0.03,
    delivery_late=0.02,
    core_lost=0.03,
    core_late=0.03,
)


def draw_odds(random: Random) -> Odds:
    """Each kind is off in about half of the worlds, else between a tenth and all of its largest odds."""
    drawn = {}
    for field in fields(LARGEST):
        on = random.random() < 0.5
        share = 0.1 + 0.9 * random.random()
        drawn[field.name] = round(getattr(LARGEST, field.name) * share, 4) if on else 0.0
    return replace(LARGEST, **drawn)


class SeededFaults:
    """The fates of one connection. `active` false: only the latency of a calm network is left, `slow` times that of
    one machine.

    `stall` is a frozen process: what it appends and reads arrives only when that is over. (Its core messages are held
    back by whoever publishes them: late ones would hold up those of others on the way to the same subscriber.)
    """

    def __init__(self, random: Random, odds: Odds, slow: int = 1) -> None:
        self.active = True
        self._slow = slow
        self._random = random
        self._odds = odds
        self._stalled_until = 0.0

    def stall(self, seconds: float) -> None:
        self._stalled_until = asyncio.get_running_loop().time() + seconds

    def end(self) -> None:
        """From here on nothing goes wrong; what is late already arrives when it does."""
        self.active = False
        self._stalled_until = 0.0

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        random, odds = self._random, self._odds
        delay = self.stalled() or self._latency()
        answer = self._latency()
        if not self.active:
            return AppendFate(delay=delay, acknowledgement_delay=answer)
        if random.random() < odds.append_late:
            delay += 0.5 * random.random()
        if random.random() < odds.answer_late:
            answer += 0.5 * random.random()
        chance = random.random()
        stored = chance >= odds.append_lost
        acknowledged = chance >= odds.append_lost + odds.answer_lost
        repeated = random.random() < odds.stored_twice
        return AppendFate(delay, stored, acknowledged, answer, repeated)

    def deliver(self, log: str, record: Record) -> float:
        random = self._random
        delay = self.stalled() or self._latency()
        if self.active and random.random() < self._odds.delivery_late:
            delay += random.random()
        return delay

    def core(self, subject: str) -> float | None:
        random = self._random
        delay = self._latency()
        if self.active and random.random() < self._odds.core_lost:
            return None
        if self.active and random.random() < self._odds.core_late:
            delay += 0.3 * random.random()
        return delay

    def _latency(self) -> float:
        return self._slow * (0.0001 + 0.0004 * self._random.random())

    def stalled(self) -> float:
        """Seconds for which it stays frozen; 0 where it is not."""
        if not self._stalled_until:
            return 0.0
        return max(0.0, self._stalled_until - asyncio.get_running_loop().time())
