"""The drivers of a miniature cell: a store and workers that lie in wait until the tape lets them act."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from cell_bench import Chained, card

from bus.messages import (
    AddReader,
    AttachFailed,
    AttachModel,
    CancelLoad,
    CancelSequence,
    CancelTaken,
    DeleteModel,
    DetachModel,
    DropSequence,
    EvictModel,
    FindModel,
    FollowSequence,
    HeldModel,
    LoadCancelTaken,
    LoadFailed,
    LoadModel,
    Message,
    ModelAttached,
    ModelDeleted,
    ModelDetached,
    ModelEvicted,
    ModelFound,
    ModelLoaded,
    ModelMissing,
    ProgressReported,
    ReaderAdded,
    SaidEnvelope,
    SequenceDropped,
    SequenceFailed,
    SequenceFinished,
    SequenceProgress,
    SequenceRefused,
    StartSequence,
    StoreStarted,
    WorkerStarted,
    extend_chain,
)

if TYPE_CHECKING:
    from world import World


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
