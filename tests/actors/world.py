"""A whole cell in miniature, in one thread: a list as the ledger, drivers that lie in wait, and a tape that decides.

Every choice is a byte of the tape (hypothesis shrinks it): who acts next, how an effect ends, which fact comes late,
twice or not at all, who dies. When the tape is out, faults end: everything is delivered, everybody answers, and then
every request must have ended. `check_invariants` looks at the whole cell after every fact.
"""

from __future__ import annotations

from typing import cast

import msgspec
from cell_bench import MS, Bench, accepted, card
from world_drivers import Driver, Durable, StoreDriver, WorkerDriver
from world_invariants import check_invariants

from actors.cell import Step
from actors.request_state import RequestsState
from actors.rules import KNOWN_RULES
from actors.store_state import StoreState
from bus.contract import Record
from bus.messages import (
    CancelRequested,
    ChoicesEnded,
    DriverLost,
    EpochClosed,
    FactEnvelope,
    Generation,
    Message,
    ModelAdded,
    ModelAttached,
    ModelLoaded,
    ModelRemoved,
    ModelWanted,
    PlacementConfigured,
    ReaderAttached,
    ReplyTo,
    RequestAccepted,
    RequestEnded,
    RequestsConfigured,
    RulesActivated,
    SaidEnvelope,
    SealedSequence,
    SealTokens,
    SequenceFailed,
    SequenceFinished,
    SequenceRefused,
    SequencesSealed,
    SetTimer,
    StartSequence,
    StepSkipped,
    TimerFired,
    choice_id,
    decode_said,
    decode_said_body,
    encode,
    kind_of,
)


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
