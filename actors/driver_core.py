"""The life of one epoch of a driver, without any I/O: what it states, what it takes, when it is over.

    started ──own started read back──▶ open ──own closing read──▶ over

Rules
* The epoch is the ledger sequence of the own `started`, learnt by reading it back; the first one of a boot id counts.
* Effects of the epoch are taken once each and in order; one that comes early is held. Their rolling hash starts with
  the boot id. What belongs to another epoch is dropped without a word.
* Facts count from 1 without holes and continue a rolling hash of their own, which starts with the boot id too.
* Every effect is answered by exactly one fact, of a kind that may answer it.
* A `driver.lost` or an `epoch.closed` that names the epoch, or a `started` of this name with another boot id that was
  not read before, ends the epoch.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, NoReturn

import msgspec

from bus.contract import Record
from bus.messages import (
    ANSWERS,
    STARTED,
    DriverLost,
    EpochClosed,
    FactEnvelope,
    Message,
    SaidEnvelope,
    decode_fact,
    decode_fact_body,
    decode_said,
    decode_said_body,
    encode,
    extend_chain,
    kind_of,
)
from bus.subjects import FactSubject, SaidSubject, Subjects

HELD_LIMIT = 4096
"""Effects held behind a missing one; with more than that the thread is lost."""

_STARTED_KINDS = tuple(kind_of(kind) for kind in STARTED)
_LOST = kind_of(DriverLost)
_CLOSED = kind_of(EpochClosed)
_ALL_ANSWERS = tuple(answer for answers in ANSWERS.values() for answer in answers)


class EpochOver(Exception):
    """The epoch has ended; the message is one sentence that says why."""


class Replaced(EpochOver):
    """Another process started under this driver's name: a successor, or a second one that should have another name."""


class Effect(NamedTuple):
    """What the cell wants done; `number` is what the answer names."""

    number: int
    message: Message


class OutgoingFact(NamedTuple):
    """A fact as it is to be appended to the ledger."""

    subject: str
    payload: bytes
    message_id: str


class DriverCore:
    """One epoch of the driver `name` (such as `gpu/s1/0`) under the boot id `boot`.

    `boots` holds the boot ids of this name that were read before, over all epochs of this process; it is added to.
    """

    def __init__(self, subjects: Subjects, name: str, boot: str, boots: dict[str, int] | None = None) -> None:
        self.name = name
        self.boot = boot
        self.epoch = 0
        self.effects: deque[Effect] = deque()
        self.over = ""
        self._subjects = subjects
        self._boots = boots if boots is not None else {}
        self._next = 1
        self._effect_chain = boot
        self._held: dict[int, SaidEnvelope] = {}
        self._open: dict[int, type[Message]] = {}
        self._count = 0
        self._fact_chain = boot

    @property
    def filters(self) -> list[str]:
        """Which ledger subjects `read` wants to see."""
        ending = ("driver.lost", "store.started", "worker.started")
        closings = [self._subjects.fact(self.name, kind) for kind in ending]
        return [*closings, self._subjects.said_to(f"driver/{self.name}")]

    # ---- what is stated ---------------------------------------------------------------------------------------

    def started(self, body: Message) -> OutgoingFact:
        """The fact that opens the epoch once it is read back."""
        assert isinstance(body, STARTED), f"{kind_of(body)} starts no driver"
        envelope = FactEnvelope(self.name, msgspec.Raw(encode(body)), boot=self.boot)
        return self._fact(body, envelope)

    def state(self, message: Message, answers: int = 0) -> OutgoingFact:
        """The next fact of the epoch. `answers` is the number of the effect that it answers, 0 for none."""
        assert self.epoch and not self.over, f"{kind_of(message)} outside of an open epoch"
        if answers:
            effect = self._open.pop(answers, None)
            assert effect is not None, f"{kind_of(message)} answers effect {answers}, which waits for no answer"
            assert isinstance(message, ANSWERS[effect]), f"{kind_of(message)} does not answer {kind_of(effect)}"
        else:
            assert not isinstance(message, _ALL_ANSWERS), f"{kind_of(message)} answers no effect"
        body = encode(message)
        self._count += 1
        self._fact_chain = extend_chain(self._fact_chain, body)
        envelope = FactEnvelope(
            self.name, msgspec.Raw(body), self.epoch, self.boot, self._count, answers, self._fact_chain
        )
        return self._fact(message, envelope)

    def _fact(self, message: Message, envelope: FactEnvelope) -> OutgoingFact:
        subject = self._subjects.fact(self.name, kind_of(message))
        return OutgoingFact(subject, encode(envelope), f"fact.{self.name}.{self.boot}.{envelope.count}")

    @property
    def unanswered(self) -> int:
        """Effects that were taken and are not answered yet."""
        return len(self._open)

    # ---- what is read -----------------------------------------------------------------------------------------

    def read(self, record: Record) -> None:
        """Take one ledger record; what is to be done by it stands in `effects` then. Raises `EpochOver`."""
        assert not self.over, "the epoch is over"
        subject = self._subjects.parse(record.subject)
        try:
            if isinstance(subject, FactSubject) and subject.actor == self.name:
                self._read_fact(record, subject)
            elif isinstance(subject, SaidSubject) and subject.receiver == f"driver/{self.name}":
                self._read_said(record, subject)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return  # not ours: nobody but the cell and its drivers writes what counts here

    def _read_fact(self, record: Record, subject: FactSubject) -> None:
        if subject.kind == _LOST:
            lost = decode_fact_body(decode_fact(record.payload).body)
            if self.epoch and isinstance(lost, DriverLost) and lost.epoch == self.epoch:
                self._end(f"epoch {self.epoch} was declared lost: {lost.reason}")
        elif subject.kind in _STARTED_KINDS:
            envelope = decode_fact(record.payload)
            if envelope.epoch or not envelope.boot or envelope.sender != self.name or envelope.boot in self._boots:
                return
            self._boots[envelope.boot] = record.sequence
            if envelope.boot == self.boot:
                self.epoch = record.sequence
            elif self.epoch:
                reason = f"another process started as {self.name} at ledger sequence {record.sequence}"
                self._end(reason, Replaced)

    def _read_said(self, record: Record, subject: SaidSubject) -> None:
        envelope = decode_said(record.payload)
        if subject.kind == _CLOSED:
            closed = decode_said_body(envelope.body)
            if self.epoch and isinstance(closed, EpochClosed) and closed.epoch == self.epoch:
                self._end(f"the cell closed epoch {self.epoch}: {closed.reason}")
            return
        ours = self.epoch and envelope.epoch == self.epoch and envelope.boot == self.boot
        if not ours or envelope.number < self._next:
            return
        self._held.setdefault(envelope.number, envelope)
        while (following := self._held.pop(self._next, None)) is not None:
            self._take(following)
        if len(self._held) > HELD_LIMIT:
            self._end(f"effect {self._next} is missing while {len(self._held)} later ones are there")

    def _take(self, envelope: SaidEnvelope) -> None:
        chain = extend_chain(self._effect_chain, bytes(envelope.body))
        if chain != envelope.chain:
            self._end(f"the rolling hash breaks at effect {envelope.number} of epoch {self.epoch}")
        try:
            message = decode_said_body(envelope.body)
        except msgspec.DecodeError as error:
            self._end(f"effect {envelope.number} of epoch {self.epoch} cannot be read: {error}")
        if type(message) not in ANSWERS:
            self._end(f"effect {envelope.number} of epoch {self.epoch} is a {kind_of(message)}, which no driver knows")
        self._effect_chain = chain
        self._next += 1
        self._open[envelope.number] = type(message)
        self.effects.append(Effect(envelope.number, message))

    def _end(self, reason: str, kind: type[EpochOver] = EpochOver) -> NoReturn:
        self.over = reason
        self.effects.clear()
        self._held.clear()
        raise kind(reason)
