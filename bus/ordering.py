"""The order in which facts are taken: stream order, after holding back. One function for the cell, watch and replay.

Rules
* A `started` opens an epoch for its driver unless its boot id was seen before; it closes the epoch before it.
* Within an open epoch facts count from 1 without holes. A repeat is dropped. A fact behind a hole is held until the
  hole is filled; a hole that stays is turned into `driver.lost` by watch.
* A fact of an epoch that is not open is recorded, and not taken.
* `driver.lost` closes the epoch it names; for any other epoch it is a repeat.
* A fact whose rolling hash does not continue its epoch's marks the epoch broken: nothing more of it is taken.
  So does the cell where it closes an epoch. What is broken counts as lost once watch has said so.
* All other facts stand alone, are never held, and are taken at once.

What cannot be read at all is taken with `error` set, so that the cell can say so in its place.
"""

from __future__ import annotations

import msgspec

from bus.contract import Record
from bus.messages import (
    STARTED,
    DriverLost,
    FactEnvelope,
    Message,
    decode_fact,
    decode_fact_body,
    extend_chain,
    kind_of,
)
from bus.subjects import FactSubject

BOOTS_REMEMBERED = 256
"""Boot ids known per driver: a `started` is repeated at most within a publisher's retries, far fewer restarts ago."""

HELD_LIMIT = 4096
"""Facts held per epoch. A driver that is further ahead than this has lost the thread: its epoch is broken."""

CLOSED = "the cell closed the epoch"
"""Why an epoch is broken that `close` has ended."""

_STARTED_KINDS = frozenset(kind_of(kind) for kind in STARTED)


class TakenFact(msgspec.Struct, frozen=True):
    """One fact, in the order in which every replica takes it.

    `epoch` is the driver's epoch (0: stands alone); for a `started` it is the fact's own sequence. `message` is None
    where the fact could not be read, and `error` says why.
    """

    sequence: int
    timestamp: int
    actor: str
    sender: str
    message: Message | None
    epoch: int = 0
    boot: str = ""
    answers: int = 0
    error: str = ""


class HeldFact(msgspec.Struct):
    sequence: int
    timestamp: int
    actor: str
    kind: str
    payload: bytes


class OpenEpoch(msgspec.Struct):
    """An epoch that is open: which fact comes next, the rolling hash so far, what is held behind a hole."""

    epoch: int
    boot: str
    next: int = 1
    chain: str = ""
    held: dict[int, HeldFact] = {}
    broken: str = ""


class OrderState(msgspec.Struct):
    drivers: dict[str, OpenEpoch] = {}
    boots: dict[str, dict[str, int]] = {}


class Trouble(msgspec.Struct, frozen=True):
    """An epoch that cannot go on: `hole` is the missing count (0: none), `reason` one sentence."""

    driver: str
    epoch: int
    hole: int
    reason: str


class FactOrder:
    """Holds facts back and hands them out in the order that every replica takes."""

    def __init__(self, state: OrderState | None = None) -> None:
        self.state = state if state is not None else OrderState()

    def admit(self, record: Record, subject: FactSubject) -> list[TakenFact]:
        """What may be taken now that this fact stands in the ledger: nothing, one fact, or several."""
        try:
            envelope = decode_fact(record.payload)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            return [_unreadable(record, subject.actor, "", f"not a fact envelope: {error}")]
        if envelope.boot == "" and envelope.epoch == 0:
            return self._alone(record, subject, envelope)
        if envelope.sender != subject.actor:
            return [
                _unreadable(record, subject.actor, envelope.sender, "a driver states facts under its own name only")
            ]
        if envelope.epoch == 0:
            return self._started(record, subject, envelope)
        return self._within(record, subject, envelope)

    def close(self, driver: str, epoch: int) -> None:
        """The cell closes an epoch: later facts under it are not taken.

        It stands as broken until a `started` or `driver.lost` says to everybody that it is over.
        """
        current = self.state.drivers.get(driver)
        if current is not None and current.epoch == epoch:
            current.broken = CLOSED
            current.held.clear()

    def closed(self, fact: TakenFact) -> bool:
        """Whether the epoch of a fact that was handed out has been closed by the cell since then."""
        current = self.state.drivers.get(fact.actor)
        return (
            not isinstance(fact.message, DriverLost)
            and current is not None
            and current.epoch == fact.epoch
            and current.broken == CLOSED
        )

    def epoch_of(self, driver: str) -> OpenEpoch | None:
        return self.state.drivers.get(driver)

    def troubles(self) -> list[Trouble]:
        """Epochs with a hole or a broken hash. A young hole is ordinary; watch decides how long is too long."""
        found = []
        for driver, epoch in self.state.drivers.items():
            if epoch.broken:
                found.append(Trouble(driver, epoch.epoch, 0, epoch.broken))
            elif epoch.held:
                reason = f"fact {epoch.next} of the epoch is missing while {len(epoch.held)} later ones are there"
                found.append(Trouble(driver, epoch.epoch, epoch.next, reason))
        return found

    def _alone(self, record: Record, subject: FactSubject, envelope: FactEnvelope) -> list[TakenFact]:
        message, error = _read_body(envelope, subject.kind)
        if message is not None and isinstance(message, STARTED):
            message, error = None, "a started fact needs a boot id"
        if isinstance(message, DriverLost):
            current = self.state.drivers.get(message.driver)
            if message.driver != subject.actor or current is None or current.epoch != message.epoch:
                return []
            del self.state.drivers[message.driver]
            return [_taken(record, subject.actor, envelope, message, error, message.epoch)]
        return [_taken(record, subject.actor, envelope, message, error, 0)]

    def _started(self, record: Record, subject: FactSubject, envelope: FactEnvelope) -> list[TakenFact]:
        driver = subject.actor
        boots = self.state.boots.setdefault(driver, {})
        if envelope.boot in boots:
            return []
        message, error = _read_body(envelope, subject.kind)
        if subject.kind not in _STARTED_KINDS:
            return [_unreadable(record, driver, envelope.sender, "a fact with a boot id names its epoch")]
        boots[envelope.boot] = record.sequence
        if len(boots) > BOOTS_REMEMBERED:
            del boots[next(iter(boots))]
        self.state.drivers[driver] = OpenEpoch(record.sequence, envelope.boot, chain=envelope.boot, held={})
        return [_taken(record, driver, envelope, message, error, record.sequence)]

    def _within(self, record: Record, subject: FactSubject, envelope: FactEnvelope) -> list[TakenFact]:
        current = self.state.drivers.get(subject.actor)
        if (
            current is None
            or current.epoch != envelope.epoch
            or current.boot != envelope.boot
            or current.broken
            or envelope.count < current.next
        ):
            return []
        if envelope.count > current.next:
            if len(current.held) >= HELD_LIMIT:
                current.broken = f"more than {HELD_LIMIT} facts are held behind missing fact {current.next}"
                current.held.clear()
            else:
                current.held.setdefault(
                    envelope.count,
                    HeldFact(record.sequence, record.timestamp, subject.actor, subject.kind, record.payload),
                )
            return []
        taken = [fact] if (fact := self._next(current, record, subject, envelope)) else []
        while not current.broken and (held := current.held.pop(current.next, None)) is not None:
            late = Record(held.sequence, held.timestamp, "", held.payload)
            fact = self._next(current, late, FactSubject(held.actor, held.kind), decode_fact(held.payload))
            if fact:
                taken.append(fact)
        return taken

    def _next(
        self, current: OpenEpoch, record: Record, subject: FactSubject, envelope: FactEnvelope
    ) -> TakenFact | None:
        chain = extend_chain(current.chain, bytes(envelope.body))
        if chain != envelope.chain:
            current.broken = f"the rolling hash breaks at fact {envelope.count} of the epoch"
            current.held.clear()
            return None
        current.chain = chain
        current.next += 1
        message, error = _read_body(envelope, subject.kind)
        if message is not None and isinstance(message, (*STARTED, DriverLost)):
            message, error = None, f"{subject.kind} does not belong inside an epoch"
        return _taken(record, subject.actor, envelope, message, error, current.epoch)


def _read_body(envelope: FactEnvelope, kind: str) -> tuple[Message | None, str]:
    try:
        message = decode_fact_body(envelope.body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        return None, f"not a valid {kind}: {error}"
    if kind_of(message) != kind:
        return None, f"the subject says {kind}, the body {kind_of(message)}"
    return message, ""


def _taken(
    record: Record, actor: str, envelope: FactEnvelope, message: Message | None, error: str, epoch: int
) -> TakenFact:
    return TakenFact(
        sequence=record.sequence,
        timestamp=record.timestamp,
        actor=actor,
        sender=envelope.sender,
        message=message,
        epoch=epoch,
        boot=envelope.boot,
        answers=envelope.answers,
        error=error,
    )


def _unreadable(record: Record, actor: str, sender: str, error: str) -> TakenFact:
    return TakenFact(record.sequence, record.timestamp, actor, sender, None, error=error)
