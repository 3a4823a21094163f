"""The cell: all actors, stepped by facts. One fact is one step.

    fact > order (bus.ordering) > its actor > what that says > their actors > ... until nothing is left

Messages go first in, first out. What is said to somebody outside the cell (a driver, the timer, a reader, the record)
leaves it; everything that is said, inside or outside, is a numbered output of the step. The state at sequence s
follows from the facts up to s, on every replica, in a simulation and in replay alike.

An exception in a step undoes the step: actors, effect numbers and timers go back to what they were, `now` and the
order of facts go on, and the only output is `step.skipped` (with the end of a request, or the closing of a driver's
epoch). Going back means: the last checkpoint, and the facts since then once more. A request that ended so stays ended:
its repeats are told, and no actor sees them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any, NamedTuple

import msgspec

from actors.actor import Actor
from actors.gpu import Gpu
from actors.migration import Migration
from actors.placement import Placement
from actors.requests import Requests
from actors.rules import FIRST_RULES, KNOWN_RULES, UnknownRules
from actors.store import Store
from bus.contract import Record
from bus.messages import (
    ANSWERS,
    OUTPUT_LIMIT_BYTES,
    STARTED,
    Choice,
    ChoicesEnded,
    DifferenceAccepted,
    DriverLost,
    EpochClosed,
    Message,
    ModelWanted,
    ProgressReported,
    RequestAccepted,
    RequestEnded,
    RoundFinished,
    RulesActivated,
    SaidEnvelope,
    SequencesSealed,
    SetTimer,
    StepSkipped,
    TimerFired,
    To,
    choice_id,
    encode,
    extend_chain,
    kind_of,
)
from bus.ordering import FactOrder, OrderState, TakenFact
from bus.subjects import FactSubject, Subjects, valid_name

STEP_LIMIT = 100_000
"""Messages in one step: far above any real step, so that a loop between actors ends as a skipped step."""

CHECKPOINT_FACTS = 1000
"""Facts between two checkpoints, at the least; more as the state grows, so that the cost per fact stays the same."""

CHECKPOINT_BYTES = 64 * 1024 * 1024
"""Payload of the facts between two checkpoints, at the most: prompts may be large."""

TIMER_BYTES = 64

_LENGTH_BYTES = 8

SKIPPED_REMEMBERED = 10_000
"""Requests known to have ended by a skipped step; the oldest is forgotten first."""

DRIVER = "driver/"
"""Receivers with this prefix are drivers: `driver/gpu/s1/0`."""


class Said(NamedTuple):
    """One derived message, as it is to stand in the ledger: `place` is its index in the step."""

    place: int
    subject: str
    payload: bytes
    receiver: str


class Step(NamedTuple):
    """What one fact led to."""

    sequence: int
    said: list[Said]


class DriverLink(msgspec.Struct):
    """Effects of one open epoch: how many were said, their rolling hash, and which are not yet answered.

    `closed`: the cell has closed the epoch, and the driver's deciding half does not know it yet. What is said to the
    driver until it does belongs to no epoch, and nobody obeys it.
    """

    epoch: int
    boot: str
    number: int = 0
    chain: str = ""
    unanswered: dict[int, str] = {}
    closed: bool = False


class OpenTimer(msgspec.Struct):
    actor: str
    due: int
    about: str


class Memory(msgspec.Struct):
    """What goes back when a step is skipped."""

    actors: dict[str, msgspec.Raw]
    links: dict[str, DriverLink]
    timers: dict[str, OpenTimer]
    skipped_requests: dict[str, str]
    rules: int


class Snapshot(msgspec.Struct):
    """The whole cell at a ledger position. `actors`: the bytes of each one's state, which follow in this order."""

    position: int
    now: int
    facts: int
    order: OrderState
    links: dict[str, DriverLink]
    timers: dict[str, OpenTimer]
    skipped_requests: dict[str, str]
    rules: int
    actors: dict[str, int]


_ANSWER_KINDS = {kind_of(effect): tuple(kind_of(a) for a in answers) for effect, answers in ANSWERS.items()}
_ALL_ANSWERS = frozenset(kind for kinds in _ANSWER_KINDS.values() for kind in kinds)
IN_EPOCH: tuple[type[Message], ...] = (
    *(answer for answers in ANSWERS.values() for answer in answers),
    ProgressReported,
    RoundFinished,
)
"""Facts that only a driver may state, inside its epoch."""

_CITED: tuple[type[Message], ...] = (RequestAccepted, SequencesSealed, ModelWanted, *STARTED)
"""Facts that others cite by their place in the ledger: they carry it."""

_OWN = (DifferenceAccepted, RulesActivated)
_pack = msgspec.msgpack.Encoder()


class Cell:
    """All actors of one cell, and the one step that moves them. `known_rules`: the versions that it may follow."""

    def __init__(self, name: str, known_rules: tuple[int, ...] = KNOWN_RULES) -> None:
        self.subjects = Subjects(name)
        self.order = FactOrder()
        self.now = 0
        self.position = 0
        self.facts = 0
        self.known_rules = known_rules
        self.rules = FIRST_RULES
        self.actors: dict[str, Actor] = {}
        self.links: dict[str, DriverLink] = {}
        self.timers: dict[str, OpenTimer] = {}
        self._skipped_requests: dict[str, str] = {}
        self._checkpoint = self._remember()
        self._checkpoint_limit = CHECKPOINT_FACTS
        self._since_bytes = 0
        self._since: list[tuple[TakenFact, int]] = []
        self._skipped: dict[int, str] = {}
        self._subject_cache: dict[tuple[str, str, type[Message]], str] = {}

    # ---- facts in, steps out --------------------------------------------------------------------------------

    def take(self, record: Record) -> list[Step]:
        """Take one ledger record; facts lead to steps, everything else to nothing.

        Raises `actors.rules.UnknownRules`; nothing else, whatever the record holds.
        """
        self.position = max(self.position, record.sequence)
        subject = self.subjects.parse(record.subject)
        if not isinstance(subject, FactSubject):
            return []
        steps = []
        self._since_bytes += len(record.payload)
        for fact in self.order.admit(record, subject):
            step = None if self.order.closed(fact) else self._take(fact)
            if step is not None:
                steps.append(step)
        return steps

    def _take(self, fact: TakenFact) -> Step | None:
        self.facts += 1
        now = max(self.now, fact.timestamp)
        message = fact.message
        if isinstance(message, TimerFired):
            timer = self.timers.get(f"{message.fact}.{message.index}")
            if timer is None:
                return None
            now = max(now, timer.due)
        if isinstance(message, RulesActivated) and fact.actor == "cell" and message.version not in self.known_rules:
            raise UnknownRules(message.version, fact.sequence, self.known_rules)
        self.now = now
        try:
            said = self._run(fact, now)
            step = Step(fact.sequence, self._seal(fact.sequence, said))
        except Exception as error:
            if not isinstance(error, NotTaken):
                self._go_back()
            self._skipped[fact.sequence] = _reason(error)
            said = self._run_skipped(fact)
            step = Step(fact.sequence, self._seal(fact.sequence, said))
        self._since.append((fact, now))
        if len(self._since) >= self._checkpoint_limit or self._since_bytes >= CHECKPOINT_BYTES:
            self._keep()
        return step

    def _keep(self) -> None:
        """A checkpoint: this is what goes back from here on."""
        self._checkpoint = self._remember()
        size = sum(len(bytes(raw)) for raw in self._checkpoint.actors.values())
        size += TIMER_BYTES * len(self.timers)
        self._checkpoint_limit = max(CHECKPOINT_FACTS, size // 500)
        self._since.clear()
        self._since_bytes = 0
        self._skipped.clear()

    def _run(self, fact: TakenFact, now: int) -> list[tuple[str, To, int]]:
        if fact.message is None:
            raise NotTaken(fact.error)
        actor, message = fact.actor, fact.message
        if isinstance(message, _CITED):
            message = msgspec.structs.replace(message, sequence=fact.sequence)
        if isinstance(message, STARTED):
            self.links[fact.sender] = DriverLink(fact.sequence, fact.boot, chain=fact.boot, unanswered={})
        elif isinstance(message, DriverLost):
            self.links.pop(actor, None)
        elif fact.epoch:
            self._answer(fact, kind_of(message))
        elif fact.answers or isinstance(message, IN_EPOCH):
            raise NotTaken(f"{kind_of(message)} belongs inside a driver's epoch")
        elif isinstance(message, TimerFired):
            actor = self.timers.pop(f"{message.fact}.{message.index}").actor
        elif isinstance(message, _OWN):
            return self._own(message, actor)
        elif isinstance(message, RequestAccepted) and message.request in self._skipped_requests:
            return self._ended_by_skip(message, again=True) if message.reply else []
        said: list[tuple[str, To, int]] = []
        waiting = deque([(actor, message, -1)])
        while waiting:
            name, incoming, cause = waiting.popleft()
            for to in self._actor(name).handle(incoming, now):
                index, receiver = len(said), to.receiver
                if index >= STEP_LIMIT:
                    raise StepError(f"more than {STEP_LIMIT} messages in one step")
                said.append((name, to, cause))
                if is_actor(receiver):
                    waiting.append((receiver, to.message, index))
                elif receiver == "timer" and isinstance(to.message, SetTimer):
                    timer = OpenTimer(name, to.message.due, to.message.about)
                    self.timers[f"{fact.sequence}.{index}"] = timer
        return said

    def _answer(self, fact: TakenFact, kind: str) -> None:
        """Exactly one answer per effect, of a kind that this effect may have."""
        link = self.links[fact.actor]
        if fact.answers:
            effect = link.unanswered.get(fact.answers)
            if effect is None:
                raise NotTaken(f"{kind} answers effect {fact.answers}, which is not waiting for an answer")
            if kind not in _ANSWER_KINDS[effect]:
                raise NotTaken(f"{kind} does not answer {effect} (effect {fact.answers})")
            del link.unanswered[fact.answers]
        elif kind in _ALL_ANSWERS:
            raise NotTaken(f"{kind} answers no effect")

    def _own(self, message: DifferenceAccepted | RulesActivated, actor: str) -> list[tuple[str, To, int]]:
        if actor != "cell":
            raise NotTaken(f"{kind_of(message)} is for the cell, not for {actor}")
        if isinstance(message, RulesActivated):
            self.rules = message.version
            for known in self.actors.values():
                known.rules = message.version
            return []
        current = self.links.get(message.driver)
        if current is None or current.epoch != message.epoch or current.closed:
            return []
        return self._close(message.driver, message.epoch, "an operator accepted a difference that this epoch obeyed")

    def _close(self, driver: str, epoch: int, reason: str) -> list[tuple[str, To, int]]:
        self.order.close(driver, epoch)
        if driver in self.links:
            self.links[driver].closed = True
        return [("cell", To(DRIVER + driver, EpochClosed(driver, epoch, reason)), -1)]

    def _actor(self, name: str) -> Actor:
        actor = self.actors.get(name)
        if actor is None:
            actor = make_actor(name)
            actor.rules = self.rules
            self.actors[name] = actor
        return actor

    # ---- a step that failed -----------------------------------------------------------------------------------

    def _run_skipped(self, fact: TakenFact) -> list[tuple[str, To, int]]:
        """What is said instead of a step that failed. No actor is called."""
        reason = self._skipped[fact.sequence]
        said = [("cell", To("record", StepSkipped(fact.sequence, fact.actor[:200] or "?", reason)), -1)]
        if isinstance(fact.message, TimerFired):
            self.timers.pop(f"{fact.message.fact}.{fact.message.index}", None)
        if isinstance(fact.message, RequestAccepted) and not self._is_known(fact.message.request):
            self._skipped_requests[fact.message.request] = reason
            if len(self._skipped_requests) > SKIPPED_REMEMBERED:
                del self._skipped_requests[next(iter(self._skipped_requests))]
            said += self._ended_by_skip(fact.message)
        if fact.epoch and not isinstance(fact.message, DriverLost):
            said += self._close(fact.actor, fact.epoch, f"its fact {fact.sequence} was skipped: {reason}"[:4000])
        return said

    def _is_known(self, request: str) -> bool:
        """Whether a request was taken before: then what was skipped is a repeat, and the request goes on."""
        actor = self.actors.get("requests")
        return isinstance(actor, Requests) and request in actor.state.requests

    def _ended_by_skip(self, message: RequestAccepted, *, again: bool = False) -> list[tuple[str, To, int]]:
        """Its end, or of all its answers; `again` for a reader that comes later."""
        of = message.generation.n
        choices = [Choice(message.request, index, of) for index in range(of)] if of > 1 else [None]
        replies = (message.reply,) if message.reply else ()
        ends = [
            RequestEnded(
                request=choice_id(message.request, message.client, message.key, choice.index if choice else 0),
                model=message.model,
                outcome="failed",
                positions=0,
                code="internal",
                reason=f"the cell could not take this request: {self._skipped_requests[message.request]}",
                replies=replies if of == 1 else tuple(reply for reply in replies if not reply.single),
                choice=choice,
            )
            for choice in choices
        ]
        said = [("cell", To("reader", end), -1) for end in ends if end.replies or not again]
        if of == 1 or not replies:
            return said
        cited = tuple(msgspec.structs.replace(end, replies=()) for end in ends) if replies[0].single else ()
        return [*said, ("cell", To("reader", ChoicesEnded(message.request, message.model, replies, cited)), -1)]

    def _go_back(self) -> None:
        """Actors, links and timers as they were before the fact that failed: the checkpoint, and the facts since."""
        self._recall(self._checkpoint)
        for fact, now in self._since:
            if fact.sequence in self._skipped:
                self._run_skipped(fact)
            else:
                for _, to, _ in self._run(fact, now):
                    if to.receiver.startswith(DRIVER):
                        self._number(to, encode(to.message))
        self._keep()

    def _number(self, to: To, body: bytes) -> DriverLink | None:
        """Give an effect its number and its place in the rolling hash; None for what belongs to no epoch."""
        if isinstance(to.message, EpochClosed):
            return None
        link = self.links.get(to.receiver[len(DRIVER) :])
        if link is None:
            raise StepError(f"{kind_of(to.message)} for {to.receiver}, which has no open epoch")
        if link.closed:
            return None
        link.number += 1
        link.chain = extend_chain(link.chain, body)
        link.unanswered[link.number] = kind_of(to.message)
        return link

    def _seal(self, sequence: int, said: list[tuple[str, To, int]]) -> list[Said]:
        """What stands in the ledger: numbered within the step, and effects within their epoch."""
        of = len(said)
        sealed = []
        for index, (sender, to, cause) in enumerate(said):
            body = encode(to.message)
            link = self._number(to, body) if to.receiver.startswith(DRIVER) else None
            if link is None:
                envelope = SaidEnvelope(sequence, index, of, msgspec.Raw(body), cause)
            else:
                envelope = SaidEnvelope(
                    sequence, index, of, msgspec.Raw(body), cause, link.epoch, link.boot, link.number, link.chain
                )
            payload = encode(envelope)
            if len(payload) > OUTPUT_LIMIT_BYTES:
                raise StepError(
                    f"{kind_of(to.message)} has {len(payload)} bytes; at most {OUTPUT_LIMIT_BYTES} may be said"
                )
            sealed.append(Said(index, self._subject(sender, to), payload, to.receiver))
        return sealed

    def _subject(self, sender: str, to: To) -> str:
        key = (sender, to.receiver, type(to.message))
        subject = self._subject_cache.get(key)
        if subject is None:
            subject = self.subjects.said(sender, to.receiver, kind_of(to.message))
            self._subject_cache[key] = subject
        return subject

    # ---- memory -----------------------------------------------------------------------------------------------

    def _remember(self) -> Memory:
        actors = {name: msgspec.Raw(_pack.encode(actor.state)) for name, actor in self.actors.items()}
        copied = msgspec.msgpack.decode(_pack.encode((self.links, self.timers)), type=_LINKS_AND_TIMERS)
        return Memory(actors, copied[0], copied[1], dict(self._skipped_requests), self.rules)

    def _recall(self, memory: Memory) -> None:
        self.links, self.timers = msgspec.msgpack.decode(
            _pack.encode((memory.links, memory.timers)), type=_LINKS_AND_TIMERS
        )
        self._skipped_requests = dict(memory.skipped_requests)
        self.rules = memory.rules
        self.actors = {}
        for name, raw in memory.actors.items():
            actor = self._actor(name)
            actor.state = msgspec.msgpack.decode(raw, type=actor.State)

    def snapshot(self) -> bytes:
        """The whole cell as bytes; the caller knows that every output up to `position` was read back."""
        return b"".join(self._parts(self._remember()))

    def capture(self) -> list[bytes]:
        """The parts of a snapshot, uncopied. It is a checkpoint as well, so that it costs what one costs anyway."""
        self._keep()
        return self._parts(self._checkpoint)

    def _parts(self, memory: Memory) -> list[bytes]:
        actors = {name: bytes(raw) for name, raw in memory.actors.items()}
        head = _pack.encode(
            Snapshot(
                position=self.position,
                now=self.now,
                facts=self.facts,
                order=self.order.state,
                links=memory.links,
                timers=memory.timers,
                skipped_requests=memory.skipped_requests,
                rules=memory.rules,
                actors={name: len(raw) for name, raw in actors.items()},
            )
        )
        return [len(head).to_bytes(_LENGTH_BYTES, "little"), head, *actors.values()]

    @classmethod
    def restored(cls, name: str, data: bytes, known_rules: tuple[int, ...] = KNOWN_RULES) -> Cell:
        """A cell that goes on from a snapshot. Raises ValueError where the bytes are not one that this code can read.

        That they are those that were written is for the caller to know. Raises `UnknownRules` for a rule version that
        is not known.
        """
        cell = cls(name, known_rules)
        at = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        try:
            snapshot = msgspec.msgpack.decode(data[_LENGTH_BYTES:at], type=Snapshot)
            if snapshot.rules not in known_rules:
                raise UnknownRules(snapshot.rules, snapshot.position, known_rules)
            actors = {}
            for actor, length in snapshot.actors.items():
                actors[actor] = msgspec.Raw(data[at : at + length])
                at += length
            if at != len(data):
                raise ValueError(f"it has {len(data)} bytes instead of {at}")
            memory = Memory(actors, snapshot.links, snapshot.timers, snapshot.skipped_requests, snapshot.rules)
            cell.position, cell.now, cell.facts = snapshot.position, snapshot.now, snapshot.facts
            cell.order = FactOrder(snapshot.order)
            cell._recall(memory)
        except (msgspec.DecodeError, ValueError, StepError) as error:
            raise ValueError(f"not a snapshot of a cell: {error}") from None
        cell._checkpoint = memory
        return cell

    def digest(self) -> str:
        """The hash of the whole state: equal on every replica at the same position."""
        return hashlib.sha256(self.snapshot()).hexdigest()


_LINKS_AND_TIMERS = tuple[dict[str, DriverLink], dict[str, OpenTimer]]


class StepError(Exception):
    """A fact that cannot be taken; the message is the reason that every replica records."""


class NotTaken(StepError):
    """A fact that was refused before anything changed: there is nothing to go back from."""


def _reason(error: Exception) -> str:
    """Text that is equal on every replica: no addresses, no paths, bounded."""
    text = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 1000 and " at 0x" not in text else type(error).__name__


def is_actor(name: str) -> bool:
    """Whether a receiver lives in the cell (anything else is outside: drivers, timer, reader, sealer, record)."""
    return name in _SINGLE or name.startswith(("store/", "gpu/"))


_SINGLE: dict[str, type[Any]] = {"requests": Requests, "placement": Placement, "migration": Migration}


def make_actor(name: str) -> Actor:
    """The actor of this name. Raises StepError where no actor can have it."""
    single = _SINGLE.get(name)
    if single is not None:
        actor: Actor = single(name)
        return actor
    parts = name.split("/")
    if parts[0] == "store" and len(parts) == 2 and valid_name(parts[1]):
        return Store(name)
    if parts[0] == "gpu" and len(parts) == 3 and valid_name(parts[1]) and parts[2].isdigit() and len(parts[2]) < 5:
        return Gpu(name)
    raise StepError(f"there is no actor {name[:100]!r}")
