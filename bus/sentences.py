"""The ledger as people want to read it: one record, one sentence.

Nothing here fails: a record that this program does not understand is shown as what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from bus.contract import Record
from bus.messages import (
    FactEnvelope,
    Message,
    SaidEnvelope,
    decode_fact,
    decode_fact_body,
    decode_said,
    decode_said_body,
)
from bus.subjects import FactSubject, Subjects
from bus.wording import WORDS

EXCERPT_CHARACTERS = 120

STYLES = (
    ("request", "cyan"),
    ("cancel", "cyan"),
    ("reader", "cyan"),
    ("choices", "cyan"),
    ("positions", "cyan"),
    ("requests", "cyan"),
    ("sequence", "green"),
    ("sequences", "green"),
    ("progress", "green"),
    ("tokens", "green"),
    ("placement", "magenta"),
    ("slot", "magenta"),
    ("instance", "magenta"),
    ("migrate", "cyan"),
    ("drain", "blue"),
    ("contexts", "blue"),
    ("move", "cyan"),
    ("heir", "cyan"),
    ("handover", "cyan"),
    ("hand-over", "cyan"),
    ("round", "green"),
    ("model", "yellow"),
    ("load", "yellow"),
    ("attach", "yellow"),
    ("lease", "yellow"),
    ("server", "blue"),
    ("worker", "blue"),
    ("store", "blue"),
    ("timer", "dim"),
    ("rules", "bold"),
    ("difference", "bold"),
)
_TROUBLE = ("failed", "refused", "rejected", "lost", "gone", "skipped", "missing", "closed")


@dataclass(frozen=True, slots=True)
class Event:
    """One record of the ledger, understood as far as possible.

    `sender` said it to `receiver`; of a fact the receiver is the actor that takes it. `message` is None where the
    body was not understood. `cause` is the sequence of the fact behind a derived message, 0 for a fact.
    """

    sequence: int
    timestamp: int
    kind: str
    sender: str
    receiver: str
    text: str
    message: Message | None
    payload: bytes
    fact: bool
    cause: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`: everything, and the envelope as it stands in the ledger."""
        try:
            envelope = msgspec.json.decode(self.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            envelope = None
        return {
            "sequence": self.sequence,
            "time_ns": self.timestamp,
            "kind": self.kind,
            "fact": self.fact,
            "sender": self.sender,
            "receiver": self.receiver,
            "text": self.text,
            "envelope": envelope,
        }


def style_of(kind: str) -> str:
    """The rich style of a kind: trouble is red, the rest is coloured by what it is about."""
    first, _, rest = kind.partition(".")
    if rest.rpartition(".")[2] in _TROUBLE or first in ("driver", "epoch", "step"):
        return "bold red"
    return dict(STYLES).get(first, "")


def sentence(message: Message, sender: str = "", receiver: str = "") -> str:
    """What the message says, in one line. Of a fact, `receiver` is the actor it is for."""
    words = WORDS.get(type(message))
    text = words(message, sender, receiver) if words is not None else _excerpt(msgspec.json.encode(message))
    return " ".join(text.split())


def read_event(subjects: Subjects, record: Record) -> Event:
    """The event that a record of the ledger is."""
    place = subjects.parse(record.subject)
    if place is None:
        return _strange(record, "", "", record.subject, fact=False)
    is_fact = isinstance(place, FactSubject)
    sender = "" if isinstance(place, FactSubject) else place.sender
    receiver = place.actor if isinstance(place, FactSubject) else place.receiver
    cause = 0
    try:
        if is_fact:
            fact: FactEnvelope = decode_fact(record.payload)
            sender = fact.sender
            message = decode_fact_body(fact.body)
        else:
            said: SaidEnvelope = decode_said(record.payload)
            cause = said.fact
            message = decode_said_body(said.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _strange(record, sender, receiver, place.kind, fact=is_fact)
    text = sentence(message, sender, receiver)
    return Event(
        record.sequence, record.timestamp, place.kind, sender, receiver, text, message, record.payload, is_fact, cause
    )


def _strange(record: Record, sender: str, receiver: str, kind: str, *, fact: bool) -> Event:
    text = f"not understood here: {_excerpt(record.payload)}"
    return Event(record.sequence, record.timestamp, kind, sender, receiver, text, None, record.payload, fact)


def _excerpt(payload: bytes) -> str:
    text = payload[: EXCERPT_CHARACTERS * 4].decode("utf-8", "replace")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= EXCERPT_CHARACTERS else line[:EXCERPT_CHARACTERS] + "…"
