"""The timer: states `timer.fired` when a wake-up that an actor asked for is due.

Which timers are open is the cell's own memory; this only waits. Every replica does, and all state the same fact under
the same id, the leading one first.
"""

from __future__ import annotations

import heapq

import msgspec

from actors.cell import Cell, Step
from bus.messages import FactEnvelope, SetTimer, TimerFired, decode_said, decode_said_body, encode

STANDBY_NS = 500_000_000
"""How much later a replica that does not lead states the fact: by then the leading one has, if it lives."""


class Timers:
    """Knows when the next open timer of a cell is due."""

    def __init__(self) -> None:
        self._due: list[tuple[int, int, int, str, str]] = []

    def start_from(self, cell: Cell) -> None:
        """Take up all timers of a cell whose steps were not seen: it comes from a snapshot."""
        for name, timer in cell.timers.items():
            fact, _, place = name.partition(".")
            heapq.heappush(self._due, (timer.due, int(fact), int(place), timer.actor, timer.about))

    def note(self, step: Step) -> None:
        """Take up the timers that a step asked for."""
        for said in step.said:
            if said.receiver == "timer":
                message = decode_said_body(decode_said(said.payload).body)
                if isinstance(message, SetTimer):
                    sender = said.subject.split(".said.", 1)[1].split(".", 1)[0]
                    heapq.heappush(self._due, (message.due, step.sequence, said.place, sender, message.about))

    @property
    def next_due(self) -> int | None:
        """When to look again, in nanoseconds of the wall clock; a timer that is not open any more counts, too."""
        return self._due[0][0] if self._due else None

    def fired(self, cell: Cell, wall: int, *, leading: bool) -> list[tuple[str, str, bytes]]:
        """(actor, message id, payload) of the facts to state now."""
        facts = []
        limit = wall if leading else wall - STANDBY_NS
        while self._due and self._due[0][0] <= limit:
            due, fact, place, actor, about = heapq.heappop(self._due)
            if f"{fact}.{place}" in cell.timers:
                body = encode(TimerFired(fact, place, due, about))
                payload = encode(FactEnvelope("timer", msgspec.Raw(body)))
                facts.append((actor, f"fact.timer.{fact}.{place}", payload))
        return facts

    def again(self, cell: Cell, fact: int, place: int) -> None:
        """The append of this one went unanswered: it stays due as long as the cell waits for it."""
        timer = cell.timers.get(f"{fact}.{place}")
        if timer is not None:
            heapq.heappush(self._due, (timer.due, fact, place, timer.actor, timer.about))
