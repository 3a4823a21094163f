"""What a cell promises, by name: a verdict says which of these was broken, where and how."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Promise(Enum):
    """The value is the sentence that a verdict shows."""

    ENDED_ONCE = "an accepted request ends exactly once"
    ACCEPTED_IS_STORED = "what a client was told to be accepted stands in the ledger"
    IN_ORDER = "a reader sees every position once and in order"
    DURABLE_FIRST = "nothing is shown before it is durable"
    NEVER_CHANGES = "a durable position never changes, and no other attempt decodes it again"
    SEALED = "nothing is stored or shown behind a seal"
    UNDISTURBED = "an answer is the one that an undisturbed cell gives"
    NO_HOLES = "the facts and effects of an epoch are taken in order and without holes"
    ANSWERED_ONCE = "an effect is answered at most once"
    REPLICAS_AGREE = "replicas have the same state at the same position"
    REPLAY_AGREES = "replay computes what the ledger holds, and nothing else"
    SNAPSHOTS_AGREE = "a snapshot and the tail give the same state as the whole"
    CAN_START = "where the ledger's beginning is gone, a whole snapshot leads up to what is left"
    NO_SKIPPED_STEP = "no step fails"
    NO_FAILURE = "no process ends with an error that nobody foresaw"
    BUDGETS = "memory, DRAM and slots are within their budgets"
    NOTHING_LEFT = "when all is quiet nothing is left behind"
    QUIET = "once the faults are over everything comes to its end"
    DRAINED = "a drained server holds nothing or says how much, and takes nothing new"
    MOVES_END = "a move that began ends, and says how"
    NO_NEEDLESS_FAILURE = "a request fails only where something failed under it"


class Violation(NamedTuple):
    """A broken promise. `at`: virtual seconds."""

    promise: Promise
    at: float
    text: str

    def __str__(self) -> str:
        return f"{self.promise.name}: {self.promise.value}; at {self.at:.3f} s: {self.text}"


class Violations:
    """Gathers violations; of each promise the first few."""

    KEPT = 5

    def __init__(self) -> None:
        self.found: list[Violation] = []
        self._counts: dict[Promise, int] = {}

    def add(self, promise: Promise, at: float, text: str) -> None:
        count = self._counts.get(promise, 0)
        self._counts[promise] = count + 1
        if count < self.KEPT:
            self.found.append(Violation(promise, at, text))
