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
        self._end_at_start = end_at_start
        self._published: dict[tuple[int, int], bool] = {}
        self._outgoing: list[tuple[int, Said]] = []
        self._patient_since = 0.0
        self._in_flight: dict[tuple[int, int], float] = {}
        self._look: tuple[int, list[bytes]] | None = None

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
        """Raises `actors.readback.Difference` and `actors.rules.UnknownRules`: then this replica must stop."""
        steps, confirmed = self.readback.take(record, at)
        if confirmed is not None:
            mine = self._published.pop((confirmed.fact, confirmed.said.place), False)
            if record.publisher != self.me:
                self.strikes = 0
                if mine:
                    self.leading = False
        if self.leading and steps and self.live:
            for step in steps:
                for said in step.said:
                    self._publish(step.sequence, said)
        return steps

    def outgoing(self) -> list[tuple[int, Said]]:
        """(fact, output) to publish now, in order. The caller says `sent` and `answered` of each."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def sent(self, fact: int, place: int, at: float) -> None:
        """This output is on its way to the stream."""
        self._in_flight.pop((fact, place), None)
        self._in_flight[(fact, place)] = at

    def answered(self, fact: int, place: int) -> None:
        """The stream has answered, or nobody will."""
        self._in_flight.pop((fact, place), None)

    def wants_rescue(self, at: float) -> bool:
        """Whether outputs are missing for so long that the end of the stream should be looked at.

        Not while an own publish waits for its answer for as long: then absence proves nothing.
        """
        waiting_since = next(iter(self._in_flight.values()), at)
        if not self.live or at - waiting_since >= MISSING_SECONDS:
            self.disturbed(at)
            return False
        oldest = next(iter(self.readback.expected.values()), None)
        return oldest is not None and at - max(oldest.since, self._patient_since) >= MISSING_SECONDS

    def rescue(self, at: float, last_sequence: int) -> None:
        """Publish what is missing, given the stream's last sequence as read just now.

        What was missing then and still is once everything up to there is read, does not stand in the stream. On a busy
        stream that takes two calls: its end moves on, and a replica is never there.
        """
        if not self.wants_rescue(at):
            return
        if self._look is None:
            expected = self.readback.expected
            self._look = last_sequence, [p for p, one in expected.items() if at - one.since >= MISSING_SECONDS]
        end, late = self._look
        if self.position < end:
            return
        self._look = None
        missing = [one for payload in late if (one := self.readback.expected.get(payload)) is not None]
        lost = [one for one in missing if (one.fact, one.said.place) not in self._in_flight]
        for one in lost:
            self._publish(one.fact, one.said)
        if lost:
            self.strikes += 1
            self.leading = self.leading or self.strikes >= STRIKES
            self._patient_since = at

    def disturbed(self, at: float) -> None:
        """The connection was lost or the process stalled: start counting anew."""
        self._patient_since = at
        self._look = None

    def _publish(self, fact: int, said: Said) -> None:
        self._published[(fact, said.place)] = True
        self._outgoing.append((fact, said))


def is_urgent(said: Said) -> bool:
    """Whether somebody outside waits for it. These go first: each message may cost an fsync."""
    return said.receiver.startswith(DRIVER) or said.receiver == "reader"
