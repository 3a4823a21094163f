"""Where moves stood when somebody died: what `longshore chaos soak` counts."""

from __future__ import annotations

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
_END: Final = "move.ended"


class Phases:
    """`kills`: how many moves were in each phase at a kill, over all kills. The last phase ends with the next page."""

    def __init__(self, subjects: Subjects) -> None:
        self.kills = dict.fromkeys(PHASES, 0)
        self.moves = 0
        self._subjects = subjects
        self._moving: dict[str, str] = {}

    def stored(self, record: Record) -> bool:
        """Every record of the ledger, once, in order. True for one with which a phase begins."""
        kind = ".".join(record.subject.rsplit(".", 2)[1:])
        if kind not in _BEGINS and kind != _END:
            return False
        subject = self._subjects.parse(record.subject)
        decode = decode_fact if isinstance(subject, FactSubject) else decode_said
        body = decode(record.payload).body
        fields = msgspec.json.decode(body)
        request = str(fields.get("request", ""))
        if kind == "move.described":
            self._moving.setdefault(request, "placing")
            self.moves += 1
        elif kind in _BEGINS and request in self._moving:
            self._moving[request] = _BEGINS[kind]
        elif kind == _END and not fields.get("moved"):  # one that has moved has still to go on
            self._moving.pop(request, None)
        return kind in _BEGINS and kind != "move.described" and request in self._moving

    def page(self) -> None:
        """A record of the token log: who has gone on is there."""
        for request in [one for one, phase in self._moving.items() if phase == "going on"]:
            del self._moving[request]

    def killed(self) -> None:
        for phase in self._moving.values():
            self.kills[phase] += 1
