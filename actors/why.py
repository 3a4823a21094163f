"""Why a request was placed, moved or delayed: what the ledger says of it, each decision with what it weighed.

    records ─▶ those about the request, in order ─▶ a decision: what it weighed, and the fact in whose step it fell

A request that runs where its model was started for another one is told that start, too: that is why it runs there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bus.contract import Record
from bus.errors import UserError
from bus.messages import (
    Candidate,
    PlacementDecided,
    PlacementExchanged,
    PlacementSpread,
    RequestAccepted,
    RequestPlaced,
    SlotKept,
)
from bus.phrases import duration, names, plural, short, tier_name
from bus.sentences import Event, read_event
from bus.subjects import Subjects

TOLD_KINDS = frozenset(
    ("request.accepted", "cancel.requested", "placement.refused", "request.placed", "migrate.requested", "move.started",
     "move.ended", "sequence.rejected", "sequence.ended", "request.ended", "request.quarantined")
)  # fmt: skip
Decision = PlacementDecided | PlacementExchanged | PlacementSpread


@dataclass(slots=True)
class Told:
    """One line of the story. `weighed`: what a decision compared; `because`: the fact in whose step it fell."""

    event: Event
    weighed: list[str] = field(default_factory=list)
    because: Event | None = None

    def as_json(self) -> dict[str, Any]:
        because = {"sequence": self.because.sequence, "text": self.because.text} if self.because is not None else None
        return self.event.as_json() | {"weighed": self.weighed, "because": because}


def story(subjects: Subjects, records: Sequence[Record], request: str) -> list[Told]:
    """Everything that decided over this request, in the order of the ledger (`records`, from any sequence on).

    `request` may be its first digits. Raises `UserError` where it is none or several.
    """
    accepted = _accepted(subjects, records, request)
    members = {accepted.request: True}
    chosen: dict[int, Event] = {}
    starts: dict[str, Event] = {}
    said: dict[tuple[int, str], bool] = {}
    for record in records:
        decides = ".said.placement.record." in record.subject
        if not decides and not any(member.encode() in record.payload for member in members):
            continue
        event = read_event(subjects, record)
        message: Any = event.message
        if event.cause and (event.cause, event.text) in said:
            continue  # published twice, as may be
        said[event.cause, event.text] = True
        choice = getattr(message, "choice", None)
        if choice is not None and choice.family == accepted.request:
            members[message.request] = True
        if isinstance(message, PlacementDecided) and message.model == accepted.model:
            starts[message.worker] = event
        if isinstance(message, RequestPlaced | SlotKept) and message.worker in starts:
            chosen[starts[message.worker].sequence] = starts[message.worker]
        told = any(member in _concerned(message) for member in members) if decides else event.kind in TOLD_KINDS
        if told:
            chosen[event.sequence] = event
    return [_told(subjects, records, chosen[sequence]) for sequence in sorted(chosen)]


def _accepted(subjects: Subjects, records: Sequence[Record], request: str) -> RequestAccepted:
    found: dict[str, RequestAccepted] = {}
    for record in records:
        if record.subject.endswith(".fact.requests.request.accepted") and f'"{request}'.encode() in record.payload:
            message = read_event(subjects, record).message
            if isinstance(message, RequestAccepted) and message.request.startswith(request):
                found[message.request] = message
    if not found or not request:
        raise UserError(f"no request {request!r} stands in this ledger: `longshore tail --kind request` shows which do")
    if len(found) > 1:
        raise UserError(
            f"{plural(len(found), 'request')} begin with {request}: {names(list(found), 8)}; say more digits"
        )
    return next(iter(found.values()))


def _concerned(message: Any) -> tuple[str, ...]:
    """The requests that a decision of placement is about."""
    if isinstance(message, PlacementDecided):
        return (message.request,)
    if isinstance(message, PlacementExchanged):
        return (message.request, *(move.request for move in message.moves))
    return message.requests if isinstance(message, PlacementSpread) else ()


def _told(subjects: Subjects, records: Sequence[Record], event: Event) -> Told:
    if not isinstance(event.message, Decision):
        return Told(event)
    place = bisect_left(records, event.cause, key=lambda record: record.sequence)
    because = None
    if place < len(records) and records[place].sequence == event.cause:
        because = read_event(subjects, records[place])
    return Told(event, _weighed(event.message), because)


def _weighed(message: Decision) -> list[str]:
    """The numbers of a decision, one line each."""
    if isinstance(message, PlacementDecided):
        lines = [_candidate(candidate, candidate.worker == message.worker) for candidate in message.candidates]
        more = message.weighed - len(lines)
        return [*lines, f"and {plural(more, 'worker')} more, all of them later"] if more > 0 else lines
    if isinstance(message, PlacementSpread):
        shared = f"{message.worker} is shared with {names(message.shared)}, and {message.to} idles"
        return [shared, f"goes on at {message.to} in about {duration(message.resume_ns)}"]
    other = duration(message.drain_ns) if message.drain_ns else "not known"
    free = duration(message.start_ns) if message.start_ns else "there is none"
    lines = [
        f"moving what runs on {message.worker}: {duration(message.migrate_ns)}, of which {duration(message.move_ns)} "
        f"until the device is free (of {plural(message.weighed, 'worker')} the soonest)",
        f"waiting for what runs there: {other}",
        f"the best free place: {free}",
    ]
    for move in message.moves:
        starts = f", where {move.model} starts for that" if move.starts else ""
        lines.append(
            f"request {short(move.request)} of {move.model}, about {plural(move.tokens, 'token')}: "
            f"goes on at {move.to} in about {duration(move.resume_ns)}{starts}"
        )
    return lines


def _candidate(candidate: Candidate, chosen: bool) -> str:
    one = candidate
    total = duration(one.queue_ns + one.load_ns + one.free_ns + one.attach_ns)
    parts = [(one.queue_ns, "queue"), (one.load_ns, "load"), (one.free_ns, "making room"), (one.attach_ns, "attach")]
    text = (
        f"{one.worker}, from {tier_name(one.tier)}: {total} ("
        + ", ".join(f"{n} {duration(ns)}" for ns, n in parts)
        + ")"
    )
    text += f", loads were off by {duration(one.error_ns)}" if one.error_ns else ""
    text += f", {plural(one.busy, 'sequence')} there" if one.busy else ""
    text += f", evicts {names(one.evict)}" if one.evict else ""
    return text + (" [chosen]" if chosen else "")
