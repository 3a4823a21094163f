"""Where every move of a world stands: what deaths are drawn by, and what `longshore chaos soak` counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from bus.contract import Record
from bus.messages import decode_fact, decode_said
from bus.subjects import FactSubject, Subjects

PHASES: Final = ("placing", "following", "in rounds", "caught up", "handing over", "released", "going on")
_BEGINS: Final = {
    "move.described": "placing",
    "heir.introduced": "following",
    "round.finished": "in rounds",
    "sequence.caught-up": "caught up",
    "sequence.hand-over": "handing over",
    "sequence.released": "released",
    "sequence.resume": "going on",
}
_ENDS: Final = ("move.ended", "request.ended")


@dataclass(slots=True)
class Moving:
    """One sequence on its way. `heir` is empty until a slot is kept; `attempt` is the heir's, 0 until it goes on.

    `described`: how often the cell has described it: a second description of a move is denied, and ends nothing.
    """

    source: str
    phase: str = "placing"
    heir: str = ""
    attempt: int = 0
    described: int = 1


class Phases:
    """Told of every record of the ledger. `moving`: the moves under way, by request; `moves`: how many began in all."""

    def __init__(self, subjects: Subjects) -> None:
        self.moving: dict[str, Moving] = {}
        self.moves = 0
        self._subjects = subjects

    def stored(self, record: Record) -> str:
        """The next record of the ledger. Returns its kind."""
        kind = ".".join(record.subject.rsplit(".", 2)[1:])
        if kind in _BEGINS or kind in _ENDS:
            subject = self._subjects.parse(record.subject)
            decode = decode_fact if isinstance(subject, FactSubject) else decode_said
            self._take(kind, msgspec.json.decode(decode(record.payload).body))
        return kind

    def _take(self, kind: str, fields: dict[str, object]) -> None:
        request = str(fields.get("request", ""))
        known = self.moving.get(request)
        if kind == "move.described":  # also of one that has just moved, and has still to go on: that is another move
            if known is not None and known.described:
                known.described += 1
            else:
                self.moving[request] = Moving(str(fields["worker"]))
                self.moves += 1
        elif known is None:
            return
        elif kind == "request.ended":
            del self.moving[request]
        elif kind == "move.ended":
            known.described -= 1
            if not known.described and not fields.get("moved"):  # one that has moved has still to go on
                del self.moving[request]
        else:
            known.phase = _BEGINS[kind]
            if kind == "heir.introduced":
                known.heir = str(fields["heir"])
            elif kind == "sequence.resume":
                known.attempt = int(str(fields["attempt"]))

    def page(self, attempt_of: Callable[[str], int]) -> None:
        """A page is durable: a move is over when one of its heir is. `attempt_of` tells the latest of a request."""
        for request, move in list(self.moving.items()):
            if move.phase == "going on" and attempt_of(request) >= move.attempt:
                del self.moving[request]

    def standing(self) -> dict[str, int]:
        """How many moves are in each phase now."""
        counts = dict.fromkeys(PHASES, 0)
        for move in self.moving.values():
            counts[move.phase] += 1
        return counts
