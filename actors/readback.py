"""What the ledger says, held against what the cell computes: the core that replicas and replay share.

Every record is taken in stream order. A fact moves the cell, and its outputs are expected from then on; a derived
message must be one of those expected, byte by byte. A missing one is for the caller to judge (it may still come);
a different or an extra one is a `Difference`, which names the message and the field.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from actors.cell import Cell, Said, Step
from bus.contract import Record
from bus.messages import DifferenceAccepted, decode_fact, decode_fact_body, decode_said

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


class Expected(NamedTuple):
    """An output that was computed and not read back yet. `since`: the caller's clock when it was computed."""

    fact: int
    said: Said
    since: float


class Readback:
    """Takes records in order; knows what is expected, and finds differences.

    `expected` is keyed by payload, which holds fact and index: what is as it should be costs one look-up. `accepted`
    has the (fact, index) of differences that an operator lets stand.
    """

    def __init__(self, cell: Cell, accepted: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.cell = cell
        self.expected: dict[bytes, Expected] = {}
        self.verified = 0
        self.position = cell.position
        self.accepted = dict.fromkeys(sorted(accepted))
        self._steps: dict[int, list[Said]] = {}
        # What a cell from a snapshot said before its position was read back by whoever stored that snapshot.
        self._forgotten = cell.position
        self._said_prefix = cell.subjects.said_prefix

    def take(self, record: Record, at: float) -> tuple[list[Step], Expected | None]:
        """The steps that this record led to, and the expected output that it was, if it was one.

        Raises `Difference`, and `actors.rules.UnknownRules`.
        """
        self.position = record.sequence
        expected = self.expected.get(record.payload)
        if expected is not None and expected.said.subject == record.subject:
            del self.expected[record.payload]
            self.verified += 1
            return [], expected
        if record.subject.startswith(self._said_prefix):
            return [], self._unusual(record)
        steps = self.cell.take(record)
        if (key := accepted_differences(record)) is not None:
            self.accepted[key] = None
        for step in steps:
            self._steps[step.sequence] = step.said
            for said in step.said:
                self.expected[said.payload] = Expected(step.sequence, said, at)
        if len(self._steps) > REMEMBERED_STEPS:
            self._forget()
        return steps, None

    def _unusual(self, record: Record) -> Expected | None:
        """A repeat, a difference that was accepted, or a difference."""
        try:
            envelope = decode_said(record.payload)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            # It has no id of its own. Its place in the ledger stands for one, so that an operator can accept it.
            if (record.sequence, 0) in self.accepted:
                return None
            raise Difference(
                record.sequence, record.sequence, 0, record.subject, "envelope", str(error), "a derived message"
            ) from None
        key = (envelope.fact, envelope.index)
        step = self._steps.get(envelope.fact)
        if step is None:
            if envelope.fact > self._forgotten and key not in self.accepted:
                raise Difference(record.sequence, *key, kind_in(record.subject), "index", "an extra message", "none")
            return None
        computed = step[envelope.index] if envelope.index < len(step) else None
        if computed is not None and (computed.subject, computed.payload) == (record.subject, record.payload):
            return None
        if key not in self.accepted:
            if computed is None:
                raise Difference(record.sequence, *key, kind_in(record.subject), "index", "an extra message", "none")
            raise difference(record, computed)
        return self.expected.pop(computed.payload, None) if computed is not None else None

    def _forget(self) -> None:
        """Drop the oldest half of the steps; a repeat of theirs can then not be told from an extra message."""
        for fact in list(self._steps)[: REMEMBERED_STEPS // 2]:
            del self._steps[fact]
            self._forgotten = max(self._forgotten, fact)


def difference(record: Record, computed: Said) -> Difference:
    """Name the first field in which a recorded message differs from the computed one."""
    envelope = decode_said(record.payload)
    key = (record.sequence, envelope.fact, envelope.index)
    kind = kind_in(record.subject)
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


def kind_in(subject: str) -> str:
    """The kind at the end of a derived message's subject."""
    return subject.split(".", 5)[-1]


def accepted_differences(record: Record) -> tuple[int, int] | None:
    """The (fact, index) that an operator's `difference.accepted` fact lets stand; None for any other record."""
    if not record.subject.endswith(".difference.accepted"):
        return None
    try:
        message = decode_fact_body(decode_fact(record.payload).body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return (message.fact, message.index) if isinstance(message, DifferenceAccepted) else None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else text[:200] + "..."
