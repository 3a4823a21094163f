"""The order in which facts are taken, by hand; `test_cell.py` and the worlds see it from above."""

from __future__ import annotations

import msgspec
import pytest
from cell_bench import Bench, Chained, worker_started
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.contract import Record
from bus.messages import (
    DriverLost,
    FactEnvelope,
    ModelAdded,
    ProgressReported,
    WorkerStarted,
    encode,
    kind_of,
)
from bus.ordering import BOOTS_REMEMBERED, HELD_LIMIT, FactOrder, OrderState, TakenFact
from bus.subjects import FactSubject

GPU = "gpu/s0/0"


class Ledger:
    def __init__(self) -> None:
        self.order = FactOrder()
        self.at = 0

    def put(self, actor: str, kind: str, payload: bytes) -> list[TakenFact]:
        self.at += 1
        return self.order.admit(Record(self.at, self.at, "", payload), FactSubject(actor, kind))

    def start(self, boot: str) -> Chained:
        driver = Chained(GPU, boot)
        self.put(GPU, *driver.started(worker_started()))
        driver.epoch = self.at
        return driver


@given(st.permutations(range(7)), st.lists(st.integers(0, 6)))
@settings(deadline=None)
def test_whatever_the_arrival_facts_are_taken_once_and_in_their_order(order: list[int], repeats: list[int]) -> None:
    ledger = Ledger()
    driver = ledger.start("b")
    facts = [driver.fact(ProgressReported(()), answers=i) for i in range(7)]
    taken = [fact.answers for i in [*order, *repeats] for fact in ledger.put(GPU, *facts[i])]
    assert taken == list(range(7)) and ledger.order.troubles() == []


def test_facts_that_stand_alone_are_taken_at_once_and_each_time() -> None:
    ledger = Ledger()
    payload = encode(FactEnvelope("operator", msgspec.Raw(encode(ModelAdded("m")))))
    for _ in range(2):
        (fact,) = ledger.put("placement", kind_of(ModelAdded), payload)
        assert (fact.message, fact.epoch, fact.sender) == (ModelAdded("m"), 0, "operator")


@pytest.mark.parametrize(
    ("actor", "kind", "payload", "error"),
    [
        ("placement", "model.added", b"", "not a fact envelope"),
        ("placement", "model.added", b'{"sender":"x","body":{"kind":"model.added"}}', "not a valid model.added"),
        (
            "placement",
            "model.gone",
            encode(FactEnvelope("x", msgspec.Raw(encode(ModelAdded("m"))))),
            "body model.a",
        ),
        ("placement", "request.ended", b'{"sender":"x","body":{"kind":"request.ended"}}', "not a valid request.ended"),
        (GPU, "worker.started", encode(FactEnvelope(GPU, msgspec.Raw(encode(worker_started())))), "needs a boot id"),
        (GPU, "model.added", encode(FactEnvelope(GPU, msgspec.Raw(b"1"), boot="b")), "names its epoch"),
        (GPU, "model.added", encode(FactEnvelope("gpu/s0/1", msgspec.Raw(b"1"), boot="b")), "its own name only"),
    ],
)
def test_what_cannot_be_read_is_taken_as_an_error(actor: str, kind: str, payload: bytes, error: str) -> None:
    (fact,) = Ledger().put(actor, kind, payload)
    assert fact.message is None and error in fact.error and fact.epoch == 0


def test_a_started_inside_an_epoch_is_an_error_of_that_epoch() -> None:
    ledger = Ledger()
    driver = ledger.start("b")
    (fact,) = ledger.put(GPU, *driver.fact(worker_started()))
    assert fact.message is None and "does not belong inside" in fact.error and fact.epoch == driver.epoch


def test_boots_are_remembered_within_a_bound() -> None:
    ledger = Ledger()
    for i in range(BOOTS_REMEMBERED + 5):
        ledger.start(f"b{i}")
    assert ledger.put(GPU, *Chained(GPU, f"b{BOOTS_REMEMBERED}").started(worker_started())) == []
    assert len(ledger.order.state.boots[GPU]) == BOOTS_REMEMBERED


def test_who_runs_far_ahead_of_a_hole_is_broken() -> None:
    ledger = Ledger()
    driver = ledger.start("b")
    driver.fact(ProgressReported(()))
    for _ in range(HELD_LIMIT + 1):
        assert ledger.put(GPU, *driver.fact(ProgressReported(()))) == []
    (trouble,) = ledger.order.troubles()
    assert "are held behind missing fact 1" in trouble.reason and trouble.hole == 0


def test_lost_names_the_driver_in_its_subject_and_its_open_epoch() -> None:
    ledger = Ledger()
    driver = ledger.start("b")
    for name, epoch in (("gpu/s0/1", driver.epoch), (GPU, driver.epoch + 1)):
        payload = encode(FactEnvelope("watch", msgspec.Raw(encode(DriverLost(name, epoch, "x")))))
        assert ledger.put(GPU, kind_of(DriverLost), payload) == []
    payload = encode(FactEnvelope("watch", msgspec.Raw(encode(DriverLost(GPU, driver.epoch, "x")))))
    (fact,) = ledger.put(GPU, kind_of(DriverLost), payload)
    assert fact.epoch == driver.epoch and ledger.order.epoch_of(GPU) is None


def test_an_epoch_that_the_cell_closed_takes_nothing_and_can_still_be_lost() -> None:
    """Found in review: `lost` of such an epoch was a repeat, and nobody told the deciding half that it was over."""
    ledger = Ledger()
    driver = ledger.start("b")
    ledger.order.close(GPU, driver.epoch + 1)
    (fact,) = ledger.put(GPU, *driver.fact(ProgressReported(())))
    assert not ledger.order.closed(fact)
    ledger.order.close(GPU, driver.epoch)
    assert ledger.order.closed(fact) and ledger.put(GPU, *driver.fact(ProgressReported(()))) == []
    (trouble,) = ledger.order.troubles()
    assert (trouble.driver, trouble.epoch, trouble.hole) == (GPU, driver.epoch, 0)
    payload = encode(FactEnvelope("watch", msgspec.Raw(encode(DriverLost(GPU, driver.epoch, "x")))))
    (lost,) = ledger.put(GPU, kind_of(DriverLost), payload)
    assert not ledger.order.closed(lost) and ledger.order.troubles() == []


def test_the_state_can_be_written_and_read_back() -> None:
    ledger = Ledger()
    driver = ledger.start("b")
    first, second = driver.fact(ProgressReported(())), driver.fact(ProgressReported(()))
    ledger.put(GPU, *second)
    ledger.order = FactOrder(msgspec.msgpack.decode(msgspec.msgpack.encode(ledger.order.state), type=OrderState))
    assert len(ledger.put(GPU, *first)) == 2


def test_the_bench_of_these_tests_starts_what_the_ledger_starts() -> None:
    bench = Bench()
    assert bench.start(GPU, worker_started()).epoch == 1
    assert kind_of(WorkerStarted) in bench.ledger[0].subject
