"""One replica of the cell: what it publishes, and when. No I/O: records and times go in, publishes come out.

Rules (DESIGN 2)
* Every replica computes every step. The leading one publishes its outputs at once; the others hold theirs until they
  read them back, and publish what stays missing for 200 ms at the head of the stream.
* Who had to do so twice in a row leads, until an own publish comes back as somebody else's.
* A process starts silent, up to the stream's end as it was at its start.
* While own publishes go unanswered, absence proves nothing: nothing is published again until they are.

Nothing here needs agreement: two leaders publish the same bytes under the same ids, and readers drop repeats.
"""

from __future__ import annotations

from actors.cell import DRIVER, Cell, Said, Step
from actors.readback import Readback
from bus.contract import Record

MISSING_SECONDS = 0.2
"""How long an output may be missing at the head of the stream before somebody else publishes it."""

STRIKES = 2
"""Rescues in a row that make a replica lead."""


class Replica:
    """`take` every record; `outgoing` what to publish now; `rescue` what stays missing."""

    def __init__(
        self, cell: Cell, me: str, *, end_at_start: int, accepted: frozenset[tuple[int, int]] = frozenset()
    ) -> None:
        self.readback = Readback(cell, accepted)
        self.me = me
        self.leading = False
        self.strikes = 0
        self.unanswered = 0
        self._end_at_start = end_at_start
        self._published: dict[tuple[int, int], bool] = {}
        self._outgoing: list[tuple[int, Said]] = []
        self._patient_since = 0.0

    @property
    def cell(self) -> Cell:
        return self.readback.cell

    @property
    def position(self) -> int:
        return self.readback.position

    @property
    def live(self) -> bool:
        """Whether the past is behind: what is said from here on is for now."""
        return self.readback.position >= self._end_at_start

    def take(self, record: Record, at: float) -> list[Step]:
        """Raises `actors.readback.Difference` and `actors.cell.UnknownRules`: then this replica must stop."""
        steps, confirmed = self.readback.take(record, at)
        if confirmed is not None:
            mine = self._published.pop((confirmed.fact, confirmed.said.place), False)
            if record.publisher != self.me:
                self.strikes = 0
                if mine:
                    self.leading = False
        if self.leading and steps and self.live:
            for step in steps:
                for said in effects_first(step.said):
                    self._publish(step.sequence, said)
        return steps

    def outgoing(self) -> list[tuple[int, Said]]:
        """(fact, output) to publish now, in order. The caller counts them in `unanswered` until they are answered."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def wants_rescue(self, at: float) -> bool:
        """Whether outputs are missing for so long that the head of the stream should be looked at."""
        if self.unanswered or not self.live:
            self._patient_since = at
            return False
        if not self.readback.expected:
            return False
        oldest = next(iter(self.readback.expected.values())).since
        return at - max(oldest, self._patient_since) >= MISSING_SECONDS

    def rescue(self, at: float, last_sequence: int) -> None:
        """Publish what is missing, given the stream's last sequence as read just now.

        Nothing happens unless this replica has read everything there is.
        """
        if last_sequence > self.position or not self.wants_rescue(at):
            return
        for expected in self.readback.expected.values():
            if at - expected.since >= MISSING_SECONDS:
                self._publish(expected.fact, expected.said)
        self.strikes += 1
        if self.strikes >= STRIKES:
            self.leading = True
        self._patient_since = at

    def disturbed(self, at: float) -> None:
        """The connection was lost or the process stalled: start counting anew."""
        self._patient_since = at

    def _publish(self, fact: int, said: Said) -> None:
        self._published[(fact, said.place)] = True
        self._outgoing.append((fact, said))


def effects_first(said: list[Said]) -> list[Said]:
    """Effects and answers before records and what actors tell each other: each message may cost an fsync."""
    urgent = [one for one in said if is_urgent(one)]
    return urgent + [one for one in said if not is_urgent(one)] if urgent else said


def is_urgent(said: Said) -> bool:
    """Whether somebody outside waits for it: a driver, or a reader."""
    return said.receiver.startswith(DRIVER) or said.receiver == "reader"
