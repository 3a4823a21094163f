"""The deciding half of one worker: instances from lease to detach, sequences, closing, sealing."""

from __future__ import annotations

from typing import Any

import pytest

from actors.actor import Unexpected
from actors.gpu import Gpu
from bus.messages import (
    AddReader,
    AttachFailed,
    AttachModel,
    CancelSequence,
    CancelTaken,
    DetachModel,
    DriverLost,
    InstanceFailed,
    InstanceReady,
    InstanceStopped,
    LeaseGranted,
    LeaseModel,
    LeaseRefused,
    LeaseReturned,
    Message,
    ModelAttached,
    ModelDetached,
    ProgressReported,
    ReaderAdded,
    ReplyTo,
    RunSequence,
    SealedSequence,
    SealTokens,
    SequenceEnded,
    SequenceFailed,
    SequenceFinished,
    SequenceProgress,
    SequenceRefused,
    SequenceRejected,
    SequencesSealed,
    ShowFrom,
    Span,
    StartInstance,
    StartSequence,
    StopInstance,
    StopSequence,
    To,
    WorkerGone,
    WorkerReady,
    WorkerStarted,
)

NAME = "gpu/s/0"


def driver(message: Message) -> To:
    return To(f"driver/{NAME}", message)


def placement(message: Message) -> To:
    return To("placement", message)


def store(message: Message) -> To:
    return To("store/s", message)


def requests(message: Message) -> To:
    return To("requests", message)


def make(epoch: int = 3) -> Gpu:
    gpu = Gpu(NAME)
    gpu.handle(WorkerStarted("s", 0, 100, 4, sequence=epoch), 0)
    return gpu


def run(gpu: Gpu, model: str = "a") -> Gpu:
    gpu.handle(StartInstance(model, 2, 20, 10), 1)
    gpu.handle(LeaseGranted(model, "d", "ssd"), 1)
    gpu.handle(ModelAttached(model, 2, 5), 1)
    return gpu


def hold(gpu: Gpu, request: str = "r", attempt: int = 1, position: int = 0) -> Gpu:
    gpu.handle(RunSequence(request, attempt, "a", 9, position), 2)
    return gpu


def test_a_worker_starts_empty() -> None:
    assert Gpu(NAME).handle(WorkerStarted("s", 0, 100, 4, sequence=3), 0) == [placement(WorkerReady(NAME, "s", 100, 4))]
    with pytest.raises(Unexpected):
        Gpu(NAME).handle(WorkerStarted("s", 1, 100, 4, sequence=3), 0)


def test_an_instance_from_lease_to_ready() -> None:
    gpu = make()
    assert gpu.handle(StartInstance("a", 2, 20, 10), 1) == [store(LeaseModel(NAME, "a"))]
    assert gpu.handle(LeaseGranted("a", "d", "ssd"), 1) == [driver(AttachModel("a", "d", 2, 20, 10))]
    assert gpu.handle(ModelAttached("a", 1, 5), 1) == [placement(InstanceReady(NAME, "a", 1, "ssd", 5))]
    assert gpu.handle(StopInstance("a"), 2) == [driver(DetachModel("a"))]
    assert gpu.handle(ModelDetached("a"), 3) == [
        store(LeaseReturned(NAME, "a")),
        placement(InstanceStopped(NAME, "a")),
    ]


@pytest.mark.parametrize("detached_first", [False, True])
def test_a_model_is_attached_after_the_lease_and_after_what_makes_room(detached_first: bool) -> None:
    gpu = run(make())
    assert gpu.handle(StartInstance("b", 2, 20, 10, ("a",)), 2) == [
        driver(DetachModel("a")),
        store(LeaseModel(NAME, "b")),
    ]
    facts: list[Message] = [LeaseGranted("b", "d", "dram"), ModelDetached("a")]
    first, second = reversed(facts) if detached_first else facts
    attach = driver(AttachModel("b", "d", 2, 20, 10))
    assert attach not in gpu.handle(first, 3)
    assert gpu.handle(second, 3)[-1] == attach


def test_a_lease_refused_before_the_detach_is_asked_for_again_after_it() -> None:
    """Found in review: with DRAM for one model, the lease of the evicted one stood in the way of the new one."""
    gpu = run(make())
    gpu.handle(StartInstance("b", 2, 20, 10, ("a",)), 2)
    assert gpu.handle(LeaseRefused("b", "in use", retry=True), 2) == []
    assert gpu.handle(ModelDetached("a"), 3) == [
        store(LeaseReturned(NAME, "a")),
        placement(InstanceStopped(NAME, "a")),
        store(LeaseModel(NAME, "b")),
    ]
    refused = LeaseRefused("b", "in use", retry=True)
    assert gpu.handle(refused, 3) == [placement(InstanceFailed(NAME, "b", "in use", retry=True))]
    assert gpu.handle(refused, 3) == []


def test_what_cannot_start() -> None:
    gpu = run(make())
    (failed,) = gpu.handle(StartInstance("a", 2, 20, 10), 2)
    assert failed.message == InstanceFailed(NAME, "a", "the model is on this worker already", retry=True)
    (failed,) = Gpu(NAME).handle(StartInstance("a", 2, 20, 10), 2)
    assert failed.message == InstanceFailed(NAME, "a", "the worker is not up", retry=True)
    gpu.handle(StartInstance("b", 2, 20, 10), 2)
    assert gpu.handle(LeaseRefused("b", "never", retry=False), 2) == [placement(InstanceFailed(NAME, "b", "never"))]
    gpu.handle(StartInstance("b", 2, 20, 10), 2)
    gpu.handle(LeaseGranted("b", "d", "dram"), 2)
    assert gpu.handle(AttachFailed("b", "no memory", retry=True), 3) == [
        store(LeaseReturned(NAME, "b")),
        placement(InstanceFailed(NAME, "b", "no memory", retry=True)),
    ]
    assert gpu.handle(LeaseGranted("b", "d", "dram"), 3) == [store(LeaseReturned(NAME, "b"))]


def test_what_does_not_run_or_is_in_use_cannot_stop() -> None:
    gpu = hold(run(make()))
    for model in ("a", "b"):
        with pytest.raises(Unexpected):
            gpu.handle(StopInstance(model), 2)


def test_a_sequence_runs_where_its_model_runs() -> None:
    gpu = run(make())
    reply, span = ReplyTo("x"), Span(NAME, 1, 1, 0, 4, 1, 2, 7)
    said = gpu.handle(RunSequence("r", 2, "a", 9, 4, (span,), (reply,)), 2)
    assert said == [driver(StartSequence("r", 2, "a", 9, 4, (span,), (reply,)))]
    (rejected,) = gpu.handle(RunSequence("q", 1, "b", 9), 2)
    assert rejected == requests(SequenceRejected("q", 1, f"b does not run on {NAME}", retry=True))


@pytest.mark.parametrize(
    ("fact", "ending"),
    [
        (SequenceFinished("r", 1, "length", 0, 4, 5, 6, 11),
         SequenceEnded("r", 1, "length", Span(NAME, 3, 1, 0, 4, 5, 6), 11)),
        (SequenceFinished("r", 1, "cancelled", 0, 0), SequenceEnded("r", 1, "cancelled")),
        (SequenceRefused("r", 1, "too long"), SequenceRejected("r", 1, "too long")),
        (SequenceRefused("r", 1, "no room", retry=True), SequenceRejected("r", 1, "no room", retry=True)),
        (SequenceFailed("r", 1, "it broke", 0, 2, 5, 5),
         SequenceRejected("r", 1, "it broke", "engine_error", True, Span(NAME, 3, 1, 0, 2, 5, 5))),
    ],
)  # fmt: skip
def test_every_named_ending_of_a_sequence(fact: Any, ending: Message) -> None:
    gpu = hold(run(make()))
    assert gpu.handle(fact, 4) == [requests(ending)]
    with pytest.raises(Unexpected):
        gpu.handle(fact, 4)
    assert gpu.handle(StopInstance("a"), 5) == [driver(DetachModel("a"))]


def test_cancel_and_readers_reach_the_driver_while_it_holds_the_sequence() -> None:
    gpu = hold(run(make()))
    reply = ReplyTo("x", 2)
    assert gpu.handle(StopSequence("r", 1, "deadline"), 3) == [driver(CancelSequence("r", 1, "deadline"))]
    assert gpu.handle(CancelTaken("r", 1, True), 3) == []
    assert gpu.handle(ShowFrom("r", 1, reply), 3) == [driver(AddReader("r", 1, reply))]
    assert gpu.handle(ReaderAdded("r", 1, True, reply), 3) == []
    gpu.handle(ShowFrom("r", 1, reply), 3)
    assert gpu.handle(ReaderAdded("r", 1, False, reply), 3) == [requests(ReaderAdded("r", 1, False, reply))]
    for late in (StopSequence("r", 2, "cancelled"), ShowFrom("q", 1, reply)):
        assert gpu.handle(late, 3) == []
    progress = ProgressReported((SequenceProgress("r", 1, 5, "x"), SequenceProgress("q", 1, 5, "x")))
    assert gpu.handle(progress, 3) == [] and gpu.state.sequences["r/1"].next == 5


def test_a_reader_whom_the_driver_did_not_get_to_is_sent_back() -> None:
    """Found in review: the worker died between the sequence's end and its answer to the reader, who heard nothing."""
    gpu = hold(hold(run(make())), "q")
    for request in ("r", "q"):
        gpu.handle(ShowFrom(request, 1, ReplyTo(request)), 3)
    gpu.handle(SequenceFinished("r", 1, "stop", 0, 1, 4, 4), 3)
    said = gpu.handle(DriverLost(NAME, 3, "x"), 4)
    assert said[-1] == requests(ReaderAdded("r", 1, False, ReplyTo("r")))
    assert sum(isinstance(to.message, ReaderAdded) for to in said) == 1, "the seal speaks to the other one"


def lost(gpu: Gpu) -> list[To]:
    return gpu.handle(DriverLost(NAME, gpu.state.epoch, "silence"), 5)


def test_a_lost_worker_gives_back_leases_and_has_its_tokens_sealed() -> None:
    gpu = hold(run(make()))
    assert gpu.handle(DriverLost(NAME, 2, "old"), 5) == []
    assert lost(gpu) == [
        To("sealer", SealTokens(NAME, 3, ("r/1",))),
        placement(WorkerGone(NAME)),
        store(LeaseReturned(NAME, "a")),
    ]
    assert lost(gpu) == []
    assert lost(run(make())) == [placement(WorkerGone(NAME)), store(LeaseReturned(NAME, "a"))]


def test_a_new_start_closes_the_old_epoch_and_so_does_a_start_that_never_was() -> None:
    gpu = hold(run(make()))
    said = gpu.handle(WorkerStarted("s", 0, 100, 4, sequence=8), 5)
    assert said[0] == To("sealer", SealTokens(NAME, 3, ("r/1",)))
    assert said[-1] == placement(WorkerReady(NAME, "s", 100, 4))
    assert make().handle(DriverLost(NAME, 4, "x"), 5) == [placement(WorkerGone(NAME))]


def test_sealing_needs_only_the_pages_behind_the_last_known_one() -> None:
    gpu = hold(run(make()))
    gpu.handle(SequenceFinished("r", 1, "stop", 0, 1, 4, 6), 3)
    assert lost(hold(gpu, "q"))[0] == To("sealer", SealTokens(NAME, 3, ("q/1",), 6))


def sealed(request: str, tokens: tuple[int, ...], end: str = "", first: int = 0) -> SealedSequence:
    return SealedSequence(request, 1, first, tokens, 4, 5, end, 11)


def test_what_is_sealed_ends_as_its_pages_say_and_the_rest_without_a_position() -> None:
    gpu = hold(hold(hold(run(make())), "q"), "p")
    lost(gpu)
    statement = SequencesSealed(
        NAME, 3, (sealed("r", (7, 7)), sealed("q", (), "stop"), sealed("other", (1,))), sequence=20
    )
    assert gpu.handle(statement, 6) == [
        requests(SequenceEnded("r", 1, "", Span(NAME, 3, 1, 0, 2, 4, 5, 20), 11)),
        requests(SequenceEnded("q", 1, "stop", Span(NAME, 3, 1, 0, 0, 4, 5, 20), 11)),
        requests(SequenceEnded("p", 1, "")),
    ]
    assert gpu.handle(statement, 6) == [] and not gpu.state.sealing


def test_a_statement_in_parts_is_complete_with_its_last_part() -> None:
    gpu = hold(hold(hold(run(make())), "q"), "p")
    lost(gpu)
    second = SequencesSealed(NAME, 3, (sealed("q", (7,), "handed-over"),), 1, 2, sequence=20)
    assert gpu.handle(second, 6) == [requests(SequenceEnded("q", 1, "", Span(NAME, 3, 1, 0, 1, 4, 5, 20), 11))]
    assert gpu.handle(second, 6) == []
    first = SequencesSealed(NAME, 3, (sealed("r", (7,)),), 0, 2, sequence=21)
    assert [to.message.request for to in gpu.handle(first, 6)] == ["r", "p"]  # type: ignore[attr-defined]
    assert gpu.handle(SequencesSealed(NAME, 9, (), sequence=22), 6) == []


def test_a_worker_that_leaves_is_no_death_of_what_it_held_from_rules_3_on() -> None:
    for rules, left in ((2, False), (3, True)):
        gpu = hold(hold(run(make())), "q")
        gpu.rules = rules
        gpu.handle(DriverLost(NAME, 3, "its process was told to end", leaving=True), 5)
        said = gpu.handle(SequencesSealed(NAME, 3, (sealed("r", (7,)),), sequence=20), 6)
        assert [to.message.left for to in said] == [left, left]  # type: ignore[attr-defined]


def test_two_epochs_are_sealed_each_for_itself() -> None:
    gpu = hold(run(make()))
    gpu.handle(WorkerStarted("s", 0, 100, 4, sequence=8), 5)
    hold(run(gpu), "q")
    lost(gpu)
    (ended,) = gpu.handle(SequencesSealed(NAME, 8, (), sequence=30), 6)
    assert ended == requests(SequenceEnded("q", 1, ""))
    (ended,) = gpu.handle(SequencesSealed(NAME, 3, (), sequence=31), 6)
    assert ended == requests(SequenceEnded("r", 1, ""))
