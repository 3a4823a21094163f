"""A whole cell in miniature, in one thread: a list as the ledger, drivers that lie in wait, and a tape that decides.

Every choice is a byte of the tape (hypothesis shrinks it): who acts next, how an effect ends, which fact comes late,
twice or not at all, who dies. When the tape is out, faults end: everything is delivered, everybody answers, and then
every request must have ended. `check_invariants` looks at the whole cell after every fact.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, cast

import msgspec

from actors.cell import Cell, Step
from actors.gpu_state import GpuState
from actors.placement_state import PlacementState
from actors.request_state import RequestsState
from actors.rules import KNOWN_RULES
from actors.store_state import StoreState
from bus.contract import Record
from bus.messages import (
    AddReader,
    AttachFailed,
    AttachModel,
    CancelLoad,
    CancelRequested,
    CancelSequence,
    CancelTaken,
    ChoicesEnded,
    DeleteModel,
    DetachModel,
    DriverLost,
    DropSequence,
    EpochClosed,
    EvictModel,
    FactEnvelope,
    FindModel,
    FollowSequence,
    Generation,
    HeldModel,
    LoadCancelTaken,
    LoadFailed,
    LoadModel,
    Message,
    ModelAdded,
    ModelAttached,
    ModelCard,
    ModelDeleted,
    ModelDetached,
    ModelEvicted,
    ModelFound,
    ModelLoaded,
    ModelMissing,
    ModelRemoved,
    ModelWanted,
    PlacementConfigured,
    ProgressReported,
    ReaderAdded,
    ReaderAttached,
    ReplyTo,
    RequestAccepted,
    RequestEnded,
    RequestsConfigured,
    RulesActivated,
    SaidEnvelope,
    SealedSequence,
    SealTokens,
    SequenceDropped,
    SequenceFailed,
    SequenceFinished,
    SequenceProgress,
    SequenceRefused,
    SequencesSealed,
    SetTimer,
    StartSequence,
    StepSkipped,
    StoreStarted,
    TimerFired,
    WorkerStarted,
    choice_id,
    decode_said,
    decode_said_body,
    encode,
    extend_chain,
    kind_of,
    request_id,
)
from bus.subjects import Subjects

CELL = "w"
MS = 1_000_000
SECOND = 1_000_000_000
BIRTH = 1_700_000_000 * SECOND


def card(model: str, *, weight: int = 40, context: int = 10, kv: int = 1, digest: str = "") -> ModelCard:
    return ModelCard(model, digest or f"d-{model}", weight, context, kv, 100)


class Chained:
    """States the facts of one epoch as a driver does: counted, chained, under its epoch and boot."""

    def __init__(self, name: str, boot: str) -> None:
        self.name, self.boot, self.epoch, self.count, self.chain = name, boot, 0, 0, boot

    def started(self, body: Message) -> tuple[str, bytes]:
        return kind_of(body), encode(FactEnvelope(self.name, msgspec.Raw(encode(body)), boot=self.boot))

    def fact(self, body: Message, answers: int = 0) -> tuple[str, bytes]:
        raw = encode(body)
        self.count += 1
        self.chain = extend_chain(self.chain, raw)
        envelope = FactEnvelope(self.name, msgspec.Raw(raw), self.epoch, self.boot, self.count, answers, self.chain)
        return kind_of(body), encode(envelope)


class Bench:
    """A cell and its ledger, for tests that state one fact after another."""

    def __init__(self, cell: Cell | None = None) -> None:
        self.cell = cell if cell is not None else Cell(CELL)
        self.subjects = Subjects(CELL)
        self.ledger: list[Record] = []
        self.now = BIRTH
        self.boots = 0

    def put(self, actor: str, kind: str, payload: bytes) -> list[Step]:
        record = Record(len(self.ledger) + 1, self.now, self.subjects.fact(actor, kind), payload)
        self.ledger.append(record)
        return self.cell.take(record)

    def alone(self, actor: str, body: Message, sender: str = "test") -> list[Step]:
        return self.put(actor, kind_of(body), encode(FactEnvelope(sender, msgspec.Raw(encode(body)))))

    def start(self, name: str, body: Message) -> Chained:
        self.boots += 1
        driver = Chained(name, f"boot{self.boots}")
        self.put(name, *driver.started(body))
        driver.epoch = len(self.ledger)
        return driver

    def state(self, driver: Chained, body: Message, answers: int = 0) -> list[Step]:
        return self.put(driver.name, *driver.fact(body, answers))


def said(steps: list[Step]) -> list[Message]:
    """What was said, as messages."""
    return [decode_said_body(decode_said(one.payload).body) for step in steps for one in step.said]


def envelopes(steps: list[Step]) -> list[SaidEnvelope]:
    return [decode_said(one.payload) for step in steps for one in step.said]


def accepted(key: str, model: str = "m0", **changes: Any) -> RequestAccepted:
    generation = Generation(changes.pop("max_tokens", 8), prompt=changes.pop("prompt", "hello"))
    return RequestAccepted(request_id("c", key), "c", key, model, generation, **changes)


def store_started(server: str, *models: HeldModel, dram: int = 100) -> StoreStarted:
    return StoreStarted(server, dram, models)


def worker_started(server: str = "s0", index: int = 0, memory: int = 100, slots: int = 2) -> WorkerStarted:
    return WorkerStarted(server, index, memory, slots)


# ---- the world ------------------------------------------------------------------------------------------------


class Tape:
    """Choices. When it is out, every choice is 0: the harmless one."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def pick(self, n: int) -> int:
        if self.out:
            return 0
        self.at += 1
        return self.data[self.at - 1] % n

    def one_in(self, n: int) -> bool:
        return self.pick(n) == n - 1 and not self.out

    @property
    def out(self) -> bool:
        return self.at >= len(self.data)


class Pending(NamedTuple):
    number: int
    message: Message


class Running(msgspec.Struct):
    """A sequence in a worker; `number` is the effect that started it."""

    start: StartSequence
    number: int
    stop: str = ""


class Durable(msgspec.Struct):
    """What one attempt has on the token subject of an epoch."""

    first: int
    tokens: list[int]
    first_page: int = 0
    last_page: int = 0
    end: str = ""


class Driver:
    """A driver process: reads effects of its epoch in order, does them when the tape says so, states facts."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.boot()

    def boot(self) -> None:
        """A new process: knows nothing, states `started`. What its predecessor had sent may still arrive."""
        self.world.boots += 1
        self.chained = Chained(self.name, f"b{self.world.boots}")
        self.alive, self.over = True, False
        self.numbers, self.effect_chain = 0, self.chained.boot
        self.inbox: deque[Pending] = deque()
        self.pending: list[Pending] = []
        self.running: dict[str, Running] = {}
        self.world.outbox.append((self, self.name, *self.chained.started(self.found())))

    def found(self) -> Message:
        raise NotImplementedError

    def fact(self, body: Message, answers: int = 0) -> None:
        self.world.outbox.append((self, self.name, *self.chained.fact(body, answers)))

    def effect(self, envelope: SaidEnvelope, message: Message) -> None:
        if envelope.epoch == 0 or envelope.epoch != self.chained.epoch or envelope.boot != self.chained.boot:
            return
        self.numbers += 1
        assert envelope.number == self.numbers, "effects count without holes"
        self.effect_chain = extend_chain(self.effect_chain, bytes(envelope.body))
        assert envelope.chain == self.effect_chain, "effects continue their rolling hash"
        self.inbox.append(Pending(envelope.number, message))

    def act(self) -> bool:
        """Take an effect, or finish what was taken. False where there was nothing to do."""
        if not self.alive or self.over or not self.chained.epoch:
            return False
        choices = (["take"] if self.inbox else []) + (["finish"] if self.pending else [])
        choices += ["decode"] if self.running else []
        if not choices:
            return False
        match choices[self.world.tape.pick(len(choices))]:
            case "take":
                self.take(self.inbox.popleft())
            case "finish":
                self.finish(self.pending.pop(self.world.tape.pick(len(self.pending))))
            case _:
                self.decode()
        return True

    def take(self, effect: Pending) -> None:
        self.pending.append(effect)

    def finish(self, effect: Pending) -> None:
        raise NotImplementedError

    def decode(self) -> None:
        raise NotImplementedError


class StoreDriver(Driver):
    def __init__(self, world: World, server: str, dram: int, models: list[str]) -> None:
        self.server, self.dram = server, dram
        self.ssd = {model: card(model, weight=world.weights[model]) for model in models}
        self.in_dram: dict[str, bool] = {}
        self.sources: dict[str, str] = {}
        self.broken_off: dict[int, bool] = {}
        # A disk that holds what it has at first, and little more; peers are told of some.
        whole = sum(one.weight_bytes for one in self.ssd.values())
        self.ssd_bytes = whole + 1 + world.tape.pick(200) if world.tape.one_in(2) else 0
        self.address = f"http://{server}" if world.tape.one_in(2) else ""
        super().__init__(world, f"store/{server}")

    def found(self) -> Message:
        kept = {model: True for model in self.in_dram if model in self.ssd and not self.world.tape.one_in(3)}
        self.in_dram = kept
        held = [
            HeldModel(card, "dram" if model in kept else "ssd", self.sources.get(model, ""))
            for model, card in self.ssd.items()
        ]
        return StoreStarted(self.server, self.dram, tuple(held), ssd_bytes=self.ssd_bytes, address=self.address)

    def take(self, effect: Pending) -> None:
        match effect.message:
            case EvictModel(tier="remote"):
                pass
            case EvictModel(model=model, tier=tier):
                self.in_dram.pop(model, None)
                if tier == "ssd":
                    assert self.sources.get(model), "what cannot be fetched again stays"
                    self.ssd.pop(model, None)
            case DeleteModel(model=model):
                assert model not in self.in_dram or not self.world.leased(self.name, model)
        super().take(effect)

    def finish(self, effect: Pending) -> None:
        tape = self.world.tape
        match effect.message:
            case CancelLoad(model=model):
                loads = [one for one in (*self.pending, *self.inbox) if isinstance(one.message, LoadModel)]
                found = [one.number for one in loads if one.message.model == model and one.number < effect.number]
                self.broken_off |= dict.fromkeys(found, True)
                self.fact(LoadCancelTaken(model, bool(found)), effect.number)
            case LoadModel(model=model) if effect.number in self.broken_off:
                self.fact(LoadFailed(model, "it was broken off", cancelled=True), effect.number)
            case LoadModel(model=model, digest=digest, sources=[source, *_]):
                if tape.one_in(4):
                    self.fact(LoadFailed(model, "nobody answered"), effect.number)
                else:
                    self.ssd[model] = card(model, weight=self.world.weights[model], digest=digest)
                    self.in_dram[model], self.sources[model] = True, source
                    loaded = ModelLoaded(model, self.world.weights[model], 1 + tape.pick(900), "remote", source)
                    self.fact(loaded, effect.number)
            case LoadModel(model=model):
                if model not in self.ssd or tape.one_in(6):
                    gone = model not in self.ssd or tape.one_in(8)
                    if gone:
                        self.ssd.pop(model, None)
                    self.fact(LoadFailed(model, "it did not load", gone), effect.number)
                else:
                    self.in_dram[model] = True
                    self.fact(ModelLoaded(model, self.ssd[model].weight_bytes, 1 + tape.pick(200)), effect.number)
            case EvictModel(model=model):
                self.fact(ModelEvicted(model), effect.number)
            case FindModel(model=model, source=source):
                if model not in self.ssd and source and tape.pick(3):
                    far = card(model, weight=self.world.weights[model], digest=f"far{tape.pick(2)}")
                    self.fact(ModelFound(far, "remote", source), effect.number)
                elif model in self.ssd:
                    if tape.one_in(3):
                        self.world.boots += 1
                        digest = f"d{self.world.boots}"
                        self.ssd[model] = card(model, weight=self.world.weights[model], digest=digest)
                    self.fact(ModelFound(self.ssd[model]), effect.number)
                else:
                    self.fact(ModelMissing(model, "not here"), effect.number)
            case DeleteModel(model=model):
                if self.ssd.pop(model, None) is None:
                    self.fact(ModelMissing(model, "not here"), effect.number)
                else:
                    self.in_dram.pop(model, None)
                    self.fact(ModelDeleted(model), effect.number)
            case other:
                raise AssertionError(f"a store does not know {other}")


class WorkerDriver(Driver):
    def __init__(self, world: World, server: str, index: int, memory: int, slots: int) -> None:
        self.server, self.index, self.memory, self.slots = server, index, memory, slots
        super().__init__(world, f"gpu/{server}/{index}")

    def boot(self) -> None:
        self.attached: dict[str, int] = {}
        super().boot()

    def found(self) -> Message:
        return WorkerStarted(self.server, self.index, self.memory, self.slots)

    @property
    def subject(self) -> tuple[str, int]:
        return self.name, self.chained.epoch

    def take(self, effect: Pending) -> None:
        match effect.message:
            case StartSequence(request=request, attempt=attempt) as start:
                assert start.model in self.attached, "a sequence starts on what is attached"
                self.running[f"{request}/{attempt}"] = Running(start, effect.number)
                assert len([r for r in self.running.values() if r.start.model == start.model]) <= self.slots
            case CancelSequence(request=request, attempt=attempt, reason=reason):
                running = self.running.get(f"{request}/{attempt}")
                if running is not None:
                    running.stop = reason
                self.fact(CancelTaken(request, attempt, running is not None), effect.number)
            case AddReader(request=request, attempt=attempt, reply=reply):
                found = f"{request}/{attempt}" in self.running
                self.fact(ReaderAdded(request, attempt, found, reply), effect.number)
            case AttachModel(model=model, kv_bytes=kv_bytes):
                self.attached[model] = self.world.weights[model] + kv_bytes
                assert sum(self.attached.values()) <= self.memory, "the device holds what is attached"
                super().take(effect)
            case _:
                super().take(effect)

    def finish(self, effect: Pending) -> None:
        tape = self.world.tape
        match effect.message:
            case AttachModel(model=model, slots=slots):
                if tape.one_in(6):
                    del self.attached[model]
                    self.fact(AttachFailed(model, "no memory", retry=not tape.one_in(4)), effect.number)
                else:
                    self.fact(ModelAttached(model, max(1, slots - tape.pick(2)), 5), effect.number)
            case DetachModel(model=model):
                assert not any(r.start.model == model for r in self.running.values())
                del self.attached[model]
                self.fact(ModelDetached(model), effect.number)
            case FollowSequence(request=request, attempt=attempt):
                self.fact(SequenceRefused(request, attempt, "nobody is followed here", retry=True), effect.number)
            case DropSequence(request=request, attempt=attempt):
                self.fact(SequenceDropped(request, attempt), effect.number)
            case other:
                raise AssertionError(f"a worker does not know {other}")

    def decode(self) -> None:
        """One sequence goes on by a page, ends, fails or is refused."""
        tape = self.world.tape
        key = list(self.running)[tape.pick(len(self.running))]
        one = self.running[key]
        if self.subject in self.world.sealed:
            self.over = True  # its page is refused: it stops for good
            return
        pages = self.world.pages.setdefault(self.subject, {})
        request, attempt, first = one.start.request, one.start.attempt, one.start.position
        if key not in pages and tape.one_in(6):
            del self.running[key]
            self.fact(SequenceRefused(request, attempt, "no room", retry=not tape.one_in(3)), one.number)
            return
        durable = pages.setdefault(key, Durable(first, []))
        self.world.page += 1
        durable.first_page = durable.first_page or self.world.page
        durable.last_page = self.world.page
        durable.tokens += [7] * tape.pick(3)
        following = first + len(durable.tokens)
        if tape.one_in(3):
            self.fact(ProgressReported((SequenceProgress(request, attempt, following, "x"),)))
        elif tape.out or one.stop or tape.one_in(3):
            del self.running[key]
            if tape.one_in(5):
                failed = SequenceFailed(
                    request, attempt, "it broke", first, following, durable.first_page, durable.last_page
                )
                self.fact(failed, one.number)
            else:
                durable.end = one.stop or ("stop" if tape.pick(2) else "length")
                finished = SequenceFinished(
                    request, attempt, durable.end, first, following, durable.first_page, durable.last_page
                )
                self.fact(finished, one.number)


class World(Bench):
    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tape = Tape(data)
        self.outbox: list[tuple[Driver | None, str, str, bytes]] = []
        self.sent: list[tuple[str, str, bytes]] = []
        self.timers: list[TimerFired] = []
        self.fired: list[TimerFired] = []
        self.timer_actor: dict[tuple[int, int], str] = {}
        self.seals: list[SealTokens] = []
        self.sealed: dict[tuple[str, int], bool] = {}
        self.pages: dict[tuple[str, int], dict[str, Durable]] = {}
        self.page = 0
        self.ended: dict[str, RequestEnded] = {}
        self.live: dict[str, tuple[str, int]] = {}
        self.durable: dict[str, int] = {}
        self.requests: list[RequestAccepted] = []
        self.skipped: list[StepSkipped] = []
        self.never_taken: dict[str, bool] = {}
        self.lost_stated: dict[tuple[str, int], bool] = {}
        self.models = [f"m{i}" for i in range(4)]
        self.weights = {model: 20 + 20 * self.tape.pick(3) for model in self.models}
        servers = 1 + self.tape.pick(2)
        self.drivers: list[Driver] = []
        for s in range(servers):
            dram = [60, 100, 200][self.tape.pick(3)]
            held = [model for model in self.models if not self.tape.one_in(4)]
            self.drivers.append(StoreDriver(self, f"s{s}", dram, held))
            for index in range(1 + self.tape.pick(2)):
                memory = [80, 100, 160][self.tape.pick(3)]
                self.drivers.append(WorkerDriver(self, f"s{s}", index, memory, 1 + self.tape.pick(3)))

    # ---- the ledger -------------------------------------------------------------------------------------------

    def put(self, actor: str, kind: str, payload: bytes) -> list[Step]:
        steps = super().put(actor, kind, payload)
        for step in steps:
            for place, one in enumerate(step.said):
                envelope = decode_said(one.payload)
                assert (envelope.fact, envelope.index, envelope.of) == (step.sequence, place, len(step.said))
                self.hear(one.receiver, envelope, decode_said_body(envelope.body))
        check_invariants(self.cell)
        known = self.requests_state.requests
        for request in [name for name in self.ended if name not in known and name not in self.never_taken]:
            del self.ended[request]  # forgotten: its key may live once more
            self.durable.pop(request, None)
        return steps

    def hear(self, receiver: str, envelope: SaidEnvelope, message: Message) -> None:
        match message:
            case EpochClosed(driver=name, epoch=epoch):
                for driver in self.drivers:
                    if driver.name == name and driver.chained.epoch == epoch:
                        driver.over = True
            case SetTimer(due=due, about=about):
                self.timers.append(TimerFired(envelope.fact, envelope.index, due, about))
            case SealTokens():
                self.seals.append(message)
            case RequestEnded():
                self.hear_end(message)
            case ChoicesEnded(request=request, choices=choices):
                (asked,) = [one for one in self.requests if one.request == request][:1]
                members = [choice_id(request, asked.client, asked.key, i) for i in range(asked.generation.n)]
                assert all(member in self.ended for member in members), "the last word comes last"
                assert [one.request for one in choices] == (members if choices else [])
                for one in choices:
                    self.hear_end(msgspec.structs.replace(one, replies=message.replies[:1]))
            case StepSkipped():
                self.skipped.append(message)
            case _ if receiver.startswith("driver/"):
                if isinstance(message, StartSequence):
                    assert message.request not in self.live, "nobody decodes it twice"
                    assert message.position == self.durable.get(message.request, 0), "it goes on where it stopped"
                    self.live[message.request] = (receiver, message.attempt)
                for driver in self.drivers:
                    if receiver == f"driver/{driver.name}":
                        driver.effect(envelope, message)

    def hear_end(self, message: RequestEnded) -> None:
        before = self.ended.setdefault(message.request, message)
        if message.code == "internal":
            self.never_taken[message.request] = True
        same = ("outcome", "positions", "end", "code", "model")
        assert all(getattr(before, f) == getattr(message, f) for f in same), "it ends once"
        assert before is message or message.replies, "again only as the answer to readers"
        assert message.positions == self.durable.get(message.request, 0)

    def note(self, body: Message) -> None:
        """What the world knows to be true once this fact is taken."""
        match body:
            case SequenceFinished() | SequenceFailed():
                self.live.pop(body.request, None)
                self.durable[body.request] = max(self.durable.get(body.request, 0), body.next)
            case SequenceRefused():
                if self.live.get(body.request, ("", 0))[1] == body.attempt:  # else who was to follow it
                    self.live.pop(body.request, None)

    def send(self, actor: str, kind: str, payload: bytes) -> None:
        self.sent.append((actor, kind, payload))
        self.put(actor, kind, payload)

    def deliver(self, at: int) -> None:
        driver, actor, kind, payload = self.outbox.pop(at)
        envelope = msgspec.json.decode(payload, type=FactEnvelope)
        if envelope.epoch == 0 and driver is not None:
            opens = driver.chained.boot == envelope.boot
            if opens:
                driver.chained.epoch = len(self.ledger) + 1
            self.send(actor, kind, payload)
            return
        self.note_taken(actor, payload)
        self.send(actor, kind, payload)

    def note_taken(self, actor: str, payload: bytes) -> None:
        """Which facts does this one make the cell take? The order alone knows: ask a copy of it."""
        order = msgspec.msgpack.decode(msgspec.msgpack.encode(self.cell.order.state), type=type(self.cell.order.state))
        from bus.ordering import FactOrder
        from bus.subjects import FactSubject

        body = msgspec.json.decode(payload, type=FactEnvelope).body
        kind = msgspec.json.decode(body)["kind"]
        record = Record(len(self.ledger) + 1, self.now, "", payload)
        for fact in FactOrder(order).admit(record, FactSubject(actor, kind)):
            if fact.message is not None:
                self.note(fact.message)

    def leased(self, store: str, model: str) -> bool:
        known = cast(StoreState, self.cell.actors[store].state).models.get(model)
        return known is not None and bool(known.leases)

    # ---- what may happen ---------------------------------------------------------------------------------------

    def step(self) -> None:
        tape = self.tape
        self.now += tape.pick(50) * MS
        match tape.pick(16):
            case 0 | 1 | 2 | 3 | 4 | 10:
                busy = [driver for driver in self.drivers if driver.alive and not driver.over]
                if busy:
                    busy[tape.pick(len(busy))].act()
            case 5 | 6 | 7 | 8:
                if self.outbox:
                    self.deliver(tape.pick(len(self.outbox)) if tape.one_in(3) else 0)
            case 9:
                self.ask()
            case 11:
                self.fire()
            case 12:
                self.recover()
            case 13:
                if tape.one_in(4):
                    self.meddle(self.drivers[tape.pick(len(self.drivers))])
            case 14:
                if self.sent:
                    self.put(*self.sent[-1 - tape.pick(min(len(self.sent), 20))])
            case _:
                if tape.one_in(3):
                    self.operate()

    def ask(self) -> None:
        tape = self.tape
        known = self.requests
        if known and tape.one_in(2):
            old = known[tape.pick(len(known))]
            reply = ReplyTo(f"r{tape.pick(3)}", single=tape.one_in(4))
            match tape.pick(4):
                case 0:
                    self.alone("requests", CancelRequested(old.request))
                case 1:
                    self.alone("requests", ReaderAttached(old.request, reply))
                case 2:
                    self.alone("requests", msgspec.structs.replace(old, reply=reply))
                case _:
                    other = msgspec.structs.replace(old, generation=Generation(3, prompt="other"), reply=reply)
                    self.alone("requests", other)
            return
        model = "nobody" if tape.one_in(30) else self.models[tape.pick(len(self.models))]
        deadline = tape.pick(250) * 20 + 1 if tape.one_in(6) else 0
        reply = ReplyTo(f"r{tape.pick(3)}") if tape.pick(2) else None
        request = accepted(f"k{len(known)}", model, reply=reply, deadline_ms=deadline)
        if tape.one_in(4):
            several = msgspec.structs.replace(request.generation, n=2 + tape.pick(2))
            request = msgspec.structs.replace(request, generation=several)
        self.requests.append(request)
        self.alone("requests", request, "intake")

    def fire(self, *, everything: bool = False) -> bool:
        due = [timer for timer in self.timers if timer.due <= self.now + 5 * MS]
        if self.fired and self.tape.one_in(3):
            self.alone("timer", self.fired[self.tape.pick(len(self.fired))], "timer")
        if not due:
            return False
        timer = due[self.tape.pick(len(due))]
        self.timers.remove(timer)
        self.fired.append(timer)
        self.alone("requests", timer, "timer")
        return True

    def recover(self) -> bool:
        """The sealer: what is durable when the seal stands is what was durable."""
        if not self.seals:
            return False
        order = self.seals.pop(self.tape.pick(len(self.seals)))
        subject = (order.worker, order.epoch)
        self.sealed[subject] = True
        wanted = dict.fromkeys(order.sequences)
        found = {key: one for key, one in self.pages.get(subject, {}).items() if key in wanted}
        for key in wanted:
            self.live.pop(key.rpartition("/")[0], None)
        sequences = []
        for key, one in found.items():
            request, _, attempt = key.rpartition("/")
            self.durable[request] = one.first + len(one.tokens)
            sequences.append(
                SealedSequence(
                    request, int(attempt), one.first, tuple(one.tokens), one.first_page, one.last_page, one.end
                )
            )
        half = len(sequences) // 2 if self.tape.one_in(2) else len(sequences)
        parts = [sequences] if half == len(sequences) else [sequences[:half], sequences[half:]]
        for number, part in enumerate(parts):
            self.sealing_part(order, SequencesSealed(order.worker, order.epoch, tuple(part), number, len(parts)))
        return True

    def sealing_part(self, order: SealTokens, sealed: SequencesSealed) -> None:
        payload = encode(FactEnvelope("sealer", msgspec.Raw(encode(sealed))))
        self.send(order.worker, kind_of(sealed), payload)
        if self.tape.one_in(4):
            self.send(order.worker, kind_of(sealed), payload)

    def meddle(self, driver: Driver) -> None:
        match self.tape.pick(4):
            case 0:
                driver.boot()
            case 1:
                driver.alive = False
            case 2:
                self.lose(driver.name)
            case _:
                if driver.alive and driver.chained.epoch and not driver.over:
                    lie = ModelAttached("m0", 1, 1) if "gpu" in driver.name else ModelLoaded("m0", 1, 1)
                    driver.fact(lie, 0 if self.tape.pick(2) else 99)

    def lose(self, name: str, epoch: int = 0) -> None:
        current = self.cell.order.epoch_of(name)
        if current is None or (epoch and current.epoch != epoch):
            return
        lost = DriverLost(name, current.epoch, "silence")
        self.send(name, kind_of(lost), encode(FactEnvelope("watch", msgspec.Raw(encode(lost)))))
        for driver in self.drivers:
            if driver.name == name and driver.chained.epoch == lost.epoch and self.tape.pick(2) == 0:
                driver.over = True

    def operate(self) -> None:
        tape = self.tape
        model = self.models[tape.pick(len(self.models))]
        match tape.pick(9):
            case 8:
                server = next((one.server for one in self.drivers if isinstance(one, StoreDriver)), "")
                self.alone("placement", ModelWanted(model, server if tape.one_in(2) else ""), "operator")
            case 0 | 1 | 5:
                for driver in self.drivers:
                    if isinstance(driver, StoreDriver) and tape.pick(3):
                        driver.ssd.setdefault(model, card(model, weight=self.weights[model]))
                source = f"http://far/{model}" if tape.one_in(2) else ""
                self.alone("placement", ModelAdded(model, source), "operator")
            case 2:
                self.alone("placement", ModelRemoved(model), "operator")
            case 3:
                self.alone("placement", PlacementConfigured(1 + tape.pick(40)), "operator")
            case 6 | 7:
                self.alone("cell", RulesActivated(KNOWN_RULES[tape.pick(len(KNOWN_RULES))]), "operator")
            case _:
                configured = RequestsConfigured(1 + tape.pick(250) * 20, 1 + tape.pick(4))
                self.alone("requests", configured, "operator")

    # ---- two phases -------------------------------------------------------------------------------------------

    def chaos(self) -> None:
        while not self.tape.out:
            self.step()

    def heal(self) -> None:
        """No more faults: all is delivered, everybody is up, answers, and timers fire."""
        assert self.tape.out
        for _ in range(20_000):
            self.now += 20 * MS
            if self.outbox:
                self.deliver(0)
            elif self.tidy() or any(driver.act() for driver in self.drivers) or self.recover() or self.fire():
                continue
            elif not self.unfinished():
                return
            elif not self.timers:
                break
            else:
                self.now = max(self.now, min(timer.due for timer in self.timers))
        raise AssertionError(f"these never ended: {self.unfinished()}")

    def tidy(self) -> bool:
        """Watch does its work, and who is dead starts again."""
        for trouble in self.cell.order.troubles():
            self.lose(trouble.driver, trouble.epoch)
            return True
        for driver in self.drivers:
            current = self.cell.order.epoch_of(driver.name)
            if not driver.alive or driver.over or current is None or current.epoch != driver.chained.epoch:
                driver.boot()
                return True
        return False

    def unfinished(self) -> list[str]:
        requests = self.requests_state.requests
        return [name for name, request in requests.items() if request.status != "ended"]

    @property
    def requests_state(self) -> RequestsState:
        actor = self.cell.actors.get("requests")
        return cast(RequestsState, actor.state) if actor is not None else RequestsState()


# ---- what must be true after every fact --------------------------------------------------------------------------


def check_invariants(cell: Cell) -> None:
    states = {name: actor.state for name, actor in cell.actors.items()}
    placement = cast(PlacementState, states.get("placement") or PlacementState())
    requests = cast(RequestsState, states.get("requests") or RequestsState())
    gpus = {name: cast(GpuState, state) for name, state in states.items() if name.startswith("gpu/")}
    stores = {name: cast(StoreState, state) for name, state in states.items() if name.startswith("store/")}
    _check_queues(placement, requests)
    _check_placed(placement, requests, gpus)
    _check_indexes(placement)
    _check_devices(placement, gpus)
    _check_dram(stores, gpus)
    assert list(requests.ended) == [n for n in requests.ended if requests.requests[n].status == "ended"]
    over = [n for n, r in requests.requests.items() if requests.over(r.choice.family if r.choice else n)]
    assert sorted(over) == sorted(requests.ended), "kept until all answers of a request have ended"
    for family in requests.families.values():
        known = [requests.requests[member] for member in family.members]
        assert family.running == sum(member.status != "ended" for member in known)
        assert family.running or not family.replies
    for link in cell.links.values():
        assert all(0 < number <= link.number for number in link.unanswered)


def _check_queues(placement: PlacementState, requests: RequestsState) -> None:
    assert placement.waiting == sum(len(queue) for queue in placement.queues.values())
    waiting = {}
    for model, queue in placement.queues.items():
        assert queue, "no empty queue stays"
        order = [one.accepted for one in queue.values()]
        assert order == sorted(order), "in order of acceptance"
        assert model in placement.models and not placement.models[model].removed
        waiting |= {(request, model): one.attempt for request, one in queue.items()}
    queued = {(n, r.model): r.attempt for n, r in requests.requests.items() if r.status == "queued"}
    assert waiting == queued, "who waits, waits there and here"


def _check_placed(placement: PlacementState, requests: RequestsState, gpus: dict[str, GpuState]) -> None:
    active = sorted(
        (request, worker, model, attempt)
        for worker, known in placement.workers.items()
        for model, instance in known.instances.items()
        for request, attempt in instance.active.items()
    )
    placed = {n: (p.worker, p.model, p.attempt) for n, p in placement.placed.items()}
    kept = [(n, p.worker, p.model, p.attempt) for n, p in placement.kept.items()]
    assert active == sorted([*((n, *place) for n, place in placed.items()), *kept])
    held = {
        one.request: (worker, one.model, one.attempt) for worker, gpu in gpus.items() for one in gpu.sequences.values()
    }
    assert held == placed, "what placement counts, runs"
    sealing = {
        one.request: (worker, one.model, one.attempt)
        for worker, gpu in gpus.items()
        for closed in gpu.sealing.values()
        for one in closed.sequences.values()
    }
    assert not held.keys() & sealing.keys(), "nothing runs before it is sealed"
    running = {n: (r.worker, r.model, r.attempt) for n, r in requests.requests.items() if r.status == "running"}
    assert running == held | sealing, "every running request is held by one worker, or about to be sealed"


def _check_indexes(placement: PlacementState) -> None:
    leased: dict[str, dict[str, int]] = {name: {} for name in placement.servers}
    draining = {}
    instances: dict[str, dict[str, bool]] = {name: {} for name in placement.models}
    indexed: dict[str, dict[int, dict[str, bool]]] = {name: {} for name in placement.models}
    for worker, known in placement.workers.items():
        for model, instance in known.instances.items():
            assert len(instance.active) <= instance.slots
            assert not instance.active or instance.status in ("running", "draining")
            leased[known.server][model] = leased[known.server].get(model, 0) + 1
            if instance.status != "stopping":
                instances[model][worker] = True
            free = (
                instance.slots - len(instance.active) if instance.status == "running" and not instance.outdated else 0
            )
            assert free == instance.free
            if free:
                indexed[model].setdefault(free, {})[worker] = True
            if instance.status == "draining":
                draining[(worker, model)] = True
    assert leased == {n: {m: one.workers for m, one in s.leased.items()} for n, s in placement.servers.items()}
    assert {n: m.instances for n, m in placement.models.items()} == instances
    assert {n: m.open for n, m in placement.models.items()} == indexed
    going = {model: True for worker in placement.workers.values() for model in worker.instances}
    for name, model in placement.models.items():
        assert model.servers or model.instances or name in going, "nothing is kept for nothing"
    victims = [victim for room in placement.room.values() for victim in room.victims]
    assert sorted(victims) == sorted(draining), "what drains, drains for one"
    assert all(model in placement.queues for model in placement.room)
    assert all(room.worker in placement.workers for room in placement.room.values())
    assert all(placement.models[model].removed for model in placement.removing)
    for model in placement.queues:
        known_model = placement.models[model]
        assert not known_model.open, "nobody waits beside a free slot"


def _check_devices(placement: PlacementState, gpus: dict[str, GpuState]) -> None:
    """A starting instance waits for those that go; so what counts is what stays, and what is attached now."""
    meaning = {
        "waiting": ("starting",), "attaching": ("starting",), "running": ("running", "draining"),
        "detaching": ("stopping",),
    }  # fmt: skip
    assert placement.workers.keys() == {name for name, gpu in gpus.items() if gpu.epoch}
    for name, worker in placement.workers.items():
        gpu = gpus[name]
        assert gpu.instances.keys() == worker.instances.keys()
        for model, instance in gpu.instances.items():
            assert worker.instances[model].status in meaning[instance.status]
        stays = [one.memory for one in worker.instances.values() if one.status != "stopping"]
        assert sum(stays) <= worker.memory_bytes
        attached = [worker.instances[m].memory for m, one in gpu.instances.items() if one.status != "waiting"]
        assert sum(attached) <= worker.memory_bytes
        assert all(one.leased for one in gpu.instances.values() if one.status != "waiting")


def _check_dram(stores: dict[str, StoreState], gpus: dict[str, GpuState]) -> None:
    for name, store in stores.items():
        used = sum(m.card.weight_bytes for m in store.models.values() if m.tier == "dram" or m.loading)
        assert used <= store.dram_bytes, f"{name} is within its budget"
        for model, stored in store.models.items():
            assert not stored.leases or stored.tier == "dram", "what is leased stays"
            assert not stored.waiting or stored.loading
            for worker in stored.leases:
                assert gpus[worker].instances[model].leased, "a lease is somebody's"
            for worker in stored.waiting:
                if worker.startswith("wish/"):
                    continue  # an operator's
                assert gpus[worker].instances[model].status == "waiting"
