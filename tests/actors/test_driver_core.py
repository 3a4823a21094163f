"""The life of an epoch without I/O: whatever the ledger repeats, reorders or mixes in, effects come once, in order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.cell import Cell
from actors.driver_core import DriverCore, EpochOver
from bus.contract import Record
from bus.messages import (
    DetachModel,
    DriverLost,
    EpochClosed,
    FactEnvelope,
    FindModel,
    Message,
    ModelAdded,
    ModelAttached,
    ModelDetached,
    ProgressReported,
    SaidEnvelope,
    StoreStarted,
    WorkerStarted,
    decode_fact,
    encode,
    extend_chain,
    kind_of,
)
from bus.ordering import FactOrder
from bus.subjects import FactSubject, Subjects

SUBJECTS = Subjects("main")
NAME = "gpu/s1/0"
BODY = WorkerStarted("s1", 0, memory_bytes=1000, max_slots=4)


def fact(sequence: int, body: Message, **fields: object) -> Record:
    envelope = FactEnvelope(str(fields.pop("sender", NAME)), msgspec.Raw(encode(body)), **fields)  # type: ignore[arg-type]
    return Record(sequence, sequence, SUBJECTS.fact(NAME, kind_of(body)), encode(envelope))


def started(sequence: int, boot: str) -> Record:
    return fact(sequence, BODY, boot=boot)


def effects(epoch: int, boot: str, count: int, *, model: str = "m") -> list[Record]:
    """What the cell says to the driver in an epoch, as records with ascending sequences."""
    chain = boot
    records = []
    for number in range(1, count + 1):
        body = encode(DetachModel(f"{model}{number}"))
        chain = extend_chain(chain, body)
        envelope = SaidEnvelope(number, 0, 1, msgspec.Raw(body), -1, epoch, boot, number, chain)
        subject = SUBJECTS.said(NAME, f"driver/{NAME}", "model.detach")
        records.append(Record(1000 + number, 0, subject, encode(envelope)))
    return records


def open_core(boot: str = "boot-a", epoch: int = 10) -> DriverCore:
    core = DriverCore(SUBJECTS, NAME, boot)
    core.read(started(epoch, boot))
    return core


def models(core: DriverCore) -> list[str]:
    return [effect.message.model for effect in core.effects if isinstance(effect.message, DetachModel)]


def test_the_epoch_is_the_sequence_of_the_first_own_started() -> None:
    core = DriverCore(SUBJECTS, NAME, "boot-a")
    core.read(started(7, "somebody-earlier"))
    assert core.epoch == 0
    core.read(started(9, "boot-a"))
    core.read(started(12, "boot-a"))  # repeated by the bus
    core.read(started(13, "somebody-earlier"))
    assert core.epoch == 9


@given(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=30))),
    st.randoms(use_true_random=False),
)
def test_effects_come_once_and_in_order(shape: tuple[int, list[int]], random: object) -> None:
    count, repeats = shape
    own = effects(10, "boot-a", count)
    strange = effects(3, "boot-a", 4, model="old") + effects(10, "boot-b", 4, model="other")
    records = own + [own[i] for i in repeats] + strange
    random.shuffle(records)  # type: ignore[attr-defined]
    core = open_core()
    for record in records:
        core.read(record)
    assert models(core) == [f"m{n}" for n in range(1, count + 1)]
    assert not core._held, "what is taken is not kept"
    assert [effect.number for effect in core.effects] == list(range(1, count + 1))


@given(st.integers(2, 8), st.data())
def test_an_altered_effect_ends_the_epoch(count: int, data: st.DataObject) -> None:
    own = effects(10, "boot-a", count)
    at = data.draw(st.integers(0, count - 1))
    own[at] = own[at]._replace(payload=own[at].payload.replace(b'"m', b'"x'))
    core = open_core()
    with pytest.raises(EpochOver, match=f"rolling hash breaks at effect {at + 1}"):
        for record in data.draw(st.permutations(own)):
            core.read(record)
    assert core.over
    assert not core.effects


def test_a_hole_holds_back_what_lies_behind_it() -> None:
    first, second, third = effects(10, "boot-a", 3)
    core = open_core()
    core.read(third)
    core.read(second)
    assert not core.effects
    core.read(first)
    assert models(core) == ["m1", "m2", "m3"]


@pytest.mark.parametrize(
    "record",
    [
        fact(20, DriverLost(NAME, 10, "silence"), sender="watch"),
        started(20, "boot-b"),
        Record(
            20,
            0,
            SUBJECTS.said("cell", f"driver/{NAME}", "epoch.closed"),
            encode(SaidEnvelope(19, 0, 1, msgspec.Raw(encode(EpochClosed(NAME, 10, "skipped"))))),
        ),
    ],
)
def test_its_own_closing_ends_the_epoch(record: Record) -> None:
    core = open_core()
    with pytest.raises(EpochOver):
        core.read(record)


def test_the_closing_of_another_epoch_ends_nothing() -> None:
    core = DriverCore(SUBJECTS, NAME, "boot-a", {"boot-0": 3})
    core.read(fact(4, DriverLost(NAME, 3, "silence"), sender="watch"))
    core.read(started(10, "boot-a"))
    core.read(fact(11, DriverLost(NAME, 3, "silence"), sender="watch"))
    core.read(started(12, "boot-0"))  # a late repeat of an epoch of the same process
    assert core.epoch == 10
    assert not core.over


def test_garbage_ends_nothing() -> None:
    core = open_core()
    for subject in (SUBJECTS.fact(NAME, "worker.started"), SUBJECTS.said("x", f"driver/{NAME}", "model.attach"), "x"):
        core.read(Record(11, 0, subject, b"{"))
        core.read(Record(12, 0, subject, b"\xff\x00"))
    assert not core.over


def test_every_effect_has_exactly_one_answer_of_a_kind_that_answers_it() -> None:
    core = open_core()
    for record in effects(10, "boot-a", 2):
        core.read(record)
    with pytest.raises(AssertionError, match="does not answer"):
        open_core_with_effect().state(ModelAttached("m1", 1, 0), answers=1)
    core.state(ModelDetached("m1"), answers=1)
    with pytest.raises(AssertionError, match="waits for no answer"):
        core.state(ModelDetached("m1"), answers=1)
    with pytest.raises(AssertionError, match="answers no effect"):
        core.state(ModelDetached("m2"))
    assert core.unanswered == 1


def open_core_with_effect() -> DriverCore:
    core = open_core()
    core.read(effects(10, "boot-a", 1)[0])
    return core


def test_facts_are_what_the_order_of_facts_takes() -> None:
    """The same function that the cell uses takes them all, in order, with an unbroken hash."""
    order = FactOrder()
    core = DriverCore(SUBJECTS, NAME, "boot-a")
    opening = core.started(BODY)
    assert opening.message_id == f"fact.{NAME}.boot-a.0"
    record = Record(10, 0, opening.subject, opening.payload)
    assert [taken.message for taken in order.admit(record, FactSubject(NAME, "worker.started"))] == [BODY]
    core.read(record)
    facts = [core.state(ProgressReported(())) for _ in range(3)]
    assert [f.message_id for f in facts] == [f"fact.{NAME}.boot-a.{n}" for n in (1, 2, 3)]
    assert [decode_fact(f.payload).count for f in facts] == [1, 2, 3]
    taken = []
    for at in (2, 0, 1, 1):
        record = Record(20 + at, 0, facts[at].subject, facts[at].payload)
        taken += order.admit(record, FactSubject(NAME, "progress.reported"))
    assert len(taken) == 3
    assert not order.troubles()


def test_effects_of_a_real_cell_are_understood() -> None:
    """What the cell numbers and hashes is what the driver expects."""
    cell = Cell("main")
    core = DriverCore(SUBJECTS, "store/s1", "boot-a")
    opening = core.started(StoreStarted("s1", 1 << 30))
    sequence = 0
    for subject, payload in [
        (opening.subject, opening.payload),
        (
            SUBJECTS.fact("placement", "model.added"),
            encode(FactEnvelope("operator", msgspec.Raw(encode(ModelAdded("m"))))),
        ),
    ]:
        sequence += 1
        record = Record(sequence, sequence, subject, payload)
        core.read(record)
        for step in cell.take(record):
            for said in step.said:
                sequence += 1
                core.read(Record(sequence, sequence, said.subject, said.payload))
    assert [effect.message for effect in core.effects] == [FindModel("m")]
