"""What the ledger says, held against what the cell computes: the core that replicas and replay share.

Every record is taken in stream order. A fact moves the cell, and its outputs are expected from then on; a derived
message must be one of those expected, byte by byte. A missing one is for the caller to judge (it may still come);
a different or an extra one is a `Difference`, which names the message and the field.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from actors.cell import Cell, Said, Step
from bus.contract import Record
from bus.messages import DifferenceAccepted, decode_fact, decode_fact_body, decode_said
from bus.subjects import FactSubject, SaidSubject

REMEMBERED_STEPS = 20_000
"""Steps whose outputs are remembered after they were read back, to compare repeats."""


class Difference(Exception):
    """Recorded and computed messages differ. `sequence` is where the record stands, `field` what differs."""

    def __init__(self, sequence: int, fact: int, place: int, message: str, field: str, recorded: Any, computed: Any):
        self.sequence, self.fact, self.place = sequence, fact, place
        self.message, self.field, self.recorded, self.computed = message, field, recorded, computed
        super().__init__(
            f"ledger sequence {sequence}, {message} (fact {fact}, index {place}), field {field}: "
            f"recorded {_short(recorded)}, computed {_short(computed)}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "fact": self.fact,
            "index": self.place,
            "message": self.message,
            "field": self.field,
            "recorded": self.recorded,
            "computed": self.computed,
        }


class Expected(msgspec.Struct):
    """An output that was computed and not read back yet. `since`: the caller's clock when it was computed."""

    said: Said
    since: float


class Readback:
    """Takes records in order; knows what is expected, and finds differences."""

    def __init__(self, cell: Cell, accepted: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.cell = cell
        self.expected: dict[tuple[int, int], Expected] = {}
        self.verified = 0
        self.position = cell.position
        self._accepted = accepted
        self._remembered: dict[int, dict[int, tuple[str, bytes]]] = {}
        self._order: deque[int] = deque()

    def take(self, record: Record, at: float) -> tuple[list[Step], tuple[int, int] | None]:
        """The steps that this record led to, and which expected output it was, if any.

        Raises `Difference`, and `actors.cell.UnknownRules`.
        """
        self.position = record.sequence
        subject = self.cell.subjects.parse(record.subject)
        if isinstance(subject, FactSubject):
            steps = self.cell.take(record)
            for step in steps:
                for said in step.said:
                    self.expected[(step.sequence, said.place)] = Expected(said, at)
            return steps, None
        if isinstance(subject, SaidSubject):
            return [], self._said(record)
        return [], None

    def _said(self, record: Record) -> tuple[int, int]:
        try:
            envelope = decode_said(record.payload)
        except (msgspec.DecodeError, ValueError) as error:
            raise Difference(
                record.sequence, 0, 0, record.subject, "envelope", str(error), "a derived message"
            ) from None
        key = (envelope.fact, envelope.index)
        expected = self.expected.get(key)
        if expected is not None:
            if (expected.said.payload != record.payload or expected.said.subject != record.subject) and (
                key not in self._accepted
            ):
                raise difference(record, expected.said)
            del self.expected[key]
            self._remember(envelope.fact, envelope.index, record)
            self.verified += 1
            return key
        known = self._remembered.get(envelope.fact)
        if known is None:
            if envelope.fact > self._oldest() and key not in self._accepted:
                raise Difference(record.sequence, *key, record.subject, "index", "an extra message", "none")
            return key
        first = known.get(envelope.index)
        if key in self._accepted or first == (record.subject, record.payload):
            return key
        if first is None:
            raise Difference(record.sequence, *key, record.subject, "index", "an extra message", "none")
        raise difference(record, Said(envelope.index, first[0], first[1], ""))

    def _remember(self, fact: int, place: int, record: Record) -> None:
        known = self._remembered.get(fact)
        if known is None:
            known = self._remembered[fact] = {}
            self._order.append(fact)
            if len(self._order) > REMEMBERED_STEPS:
                del self._remembered[self._order.popleft()]
        known[place] = (record.subject, record.payload)

    def _oldest(self) -> int:
        """Facts up to here may have been forgotten: a repeat of theirs cannot be told from an extra message."""
        return self._order[0] if len(self._order) >= REMEMBERED_STEPS else 0


def difference(record: Record, computed: Said) -> Difference:
    """Name the first field in which a recorded message differs from the computed one."""
    envelope = decode_said(record.payload)
    key = (record.sequence, envelope.fact, envelope.index)
    kind = record.subject.split(".", 5)[-1]
    if record.subject != computed.subject:
        return Difference(*key, kind, "subject", record.subject, computed.subject)
    path, recorded, expected = _first_difference(
        msgspec.json.decode(record.payload), msgspec.json.decode(computed.payload)
    )
    return Difference(*key, kind, path or "bytes", recorded, expected)


def _first_difference(recorded: Any, computed: Any, path: str = "") -> tuple[str, Any, Any]:
    if isinstance(recorded, dict) and isinstance(computed, dict):
        keys = dict.fromkeys([*recorded, *computed])
        ordered = [key for key in keys if key == "body"] + [key for key in keys if key != "body"]
        for key in ordered:
            if recorded.get(key) != computed.get(key):
                return _first_difference(recorded.get(key), computed.get(key), f"{path}.{key}" if path else key)
    if isinstance(recorded, list) and isinstance(computed, list):
        for index in range(max(len(recorded), len(computed))):
            left = recorded[index] if index < len(recorded) else None
            right = computed[index] if index < len(computed) else None
            if left != right:
                return _first_difference(left, right, f"{path}[{index}]")
    return path, recorded, computed


def accepted_differences(record: Record) -> tuple[int, int] | None:
    """The (fact, index) that an operator's `difference.accepted` fact lets stand; None for any other record."""
    if not record.subject.endswith(".difference.accepted"):
        return None
    try:
        message = decode_fact_body(decode_fact(record.payload).body)
    except (msgspec.DecodeError, ValueError):
        return None
    return (message.fact, message.index) if isinstance(message, DifferenceAccepted) else None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else text[:200] + "..."
