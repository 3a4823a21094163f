"""Several answers of one request: placed, ended and found on their own; accepted, cancelled and forgotten together."""

from __future__ import annotations

from typing import Any

import msgspec
from cell_bench import MS, SECOND, Bench, accepted, said

from actors.gpu import Gpu
from actors.gpu_state import Instance
from actors.request_state import RequestsState
from actors.requests import Requests
from bus.messages import (
    CancelRequested,
    Choice,
    ChoicesEnded,
    Generation,
    ModelCard,
    PlacementConfigured,
    PlacementRefused,
    PlaceRequest,
    ReaderAdded,
    ReaderAttached,
    ReaderRefused,
    ReplyTo,
    RequestEnded,
    RequestPlaced,
    RunSequence,
    SequenceEnded,
    SequenceFinished,
    SetTimer,
    ShowFrom,
    ShowPositions,
    SlotReleased,
    Span,
    StopSequence,
    TimerFired,
    To,
    choice_id,
    encode,
)

W = "gpu/s/0"
R = accepted("k").request
IDS = [choice_id(R, "c", "k", index) for index in range(3)]
CHOICES = [Choice(R, index, 3) for index in range(3)]
INBOX, LATE, WHOLE = ReplyTo("inbox"), ReplyTo("late", 2), ReplyTo("whole", single=True)


def span(following: int, *, sealed: int = 0) -> Span:
    return Span(W, 3, 1, 0, following, 4, 5, sealed)


def asked(**changes: Any) -> Any:
    generation = Generation(8, prompt="hello", n=3)
    fields = {"sequence": 7, "reply": INBOX, "generation": generation} | changes
    return msgspec.structs.replace(accepted("k"), **fields)


def family(*placed: int, **changes: Any) -> Requests:
    """Three answers, of which these run."""
    requests = Requests("requests")
    requests.handle(asked(**changes), 10)
    for index in placed:
        requests.handle(RequestPlaced(IDS[index], 1, W), 20)
    return requests


def finish(requests: Requests, index: int, now: int = 50) -> list[To]:
    return requests.handle(SequenceEnded(IDS[index], 1, "stop", span(index + 1), 3), now)


def known(requests: Requests) -> RequestsState:
    return requests.state


def test_each_answer_is_a_request_of_its_own_and_the_first_has_the_id() -> None:
    requests = Requests("requests")
    assert accepted("k").client == "c" and IDS[0] == R and len({*IDS}) == 3
    places = [To("placement", PlaceRequest(IDS[i], 1, "m0", 7, choice=CHOICES[i])) for i in range(3)]
    deadline = To("timer", SetTimer(10 + 40 * MS, R))
    assert requests.handle(asked(deadline_ms=40), 10) == [*places, deadline], "one timer for all"
    run = RunSequence(IDS[2], 1, "m0", 7, 0, (), (INBOX,), Generation(8, prompt="hello", n=3), CHOICES[2])
    assert requests.handle(RequestPlaced(IDS[2], 1, W), 20) == [To(W, run)]


def test_only_the_last_end_ends_the_streams() -> None:
    requests = family(0, 1, 2)
    for index in (1, 0):
        ended, released = finish(requests, index)
        assert isinstance(ended.message, RequestEnded) and ended.message.shown
        assert (ended.message.request, ended.message.choice) == (IDS[index], CHOICES[index])
        assert released == To("placement", SlotReleased(IDS[index], 1, "m0"))
        assert not known(requests).ended and not known(requests).over(R)
    ended, last, retention, _ = finish(requests, 2, 90)
    assert isinstance(ended.message, RequestEnded)
    assert last == To("reader", ChoicesEnded(R, "m0", (INBOX,)))
    assert retention == To("timer", SetTimer(3_600 * SECOND + 90, "retention")), "counted from the last end"
    assert known(requests).ended == dict.fromkeys(IDS, 90)
    assert requests.handle(SequenceEnded(IDS[2], 1, "stop", span(3), 3), 95) == []
    requests.handle(TimerFired(1, 1, 3_600 * SECOND + 90, "retention"), 3_600 * SECOND + 90)
    assert not known(requests).requests and not known(requests).families


def test_an_answer_that_lost_its_worker_goes_on_alone() -> None:
    requests = family(0, 1)
    shown, again = requests.handle(SequenceEnded(IDS[1], 1, "", span(2, sealed=20), 3), 30)
    assert shown.message == ShowPositions(IDS[1], "m0", (INBOX,), (span(2, sealed=20),), CHOICES[1])
    assert again.message == PlaceRequest(IDS[1], 2, "m0", 7, choice=CHOICES[1])
    assert [known(requests).requests[name].status for name in IDS] == ["running", "queued", "queued"]


def test_a_reader_who_comes_late_sees_every_answer_wherever_it_is() -> None:
    requests = family(0, 1)
    finish(requests, 0)
    requests.handle(SequenceEnded(IDS[1], 1, "", span(2, sealed=20), 3), 30)
    requests.handle(RequestPlaced(IDS[2], 1, W), 40)
    one, two, three = requests.handle(ReaderAttached(R, LATE), 60)
    assert isinstance(one.message, RequestEnded) and one.message.replies == (LATE,) and one.message.spans
    assert two.message == ShowPositions(IDS[1], "m0", (LATE,), (span(2, sealed=20),), CHOICES[1])
    assert three == To(W, ShowFrom(IDS[2], 1, LATE))
    requests.handle(RequestPlaced(IDS[1], 2, W), 70)
    finish(requests, 2, 80)
    said_last = requests.handle(SequenceEnded(IDS[1], 2, "length", Span(W, 3, 2, 2, 4, 6, 7), 3), 90)
    assert To("reader", ChoicesEnded(R, "m0", (INBOX, LATE))) in said_last
    *ends, last = requests.handle(ReaderAttached(R, LATE), 100)
    assert [to.message.request for to in ends] == IDS  # type: ignore[attr-defined]
    assert last == To("reader", ChoicesEnded(R, "m0", (LATE,)))


def test_a_reader_whom_the_worker_no_longer_met_gets_that_end_and_one_more_last_word() -> None:
    requests = family(0, 1, 2)
    for index in range(3):
        finish(requests, index)
    end, last = requests.handle(ReaderAdded(IDS[1], 1, False, LATE), 60)
    assert isinstance(end.message, RequestEnded) and (end.message.request, end.message.replies) == (IDS[1], (LATE,))
    assert last == To("reader", ChoicesEnded(R, "m0", (LATE,)))


def test_a_reader_whom_the_worker_missed_gets_that_end_before_the_last_word() -> None:
    gpu = Gpu(W)
    gpu.state.epoch, gpu.state.instances["m0"] = 1, Instance(8, 10, 10, status="running")
    for index in (0, 2):
        gpu.handle(RunSequence(IDS[index], 1, "m0", 7, choice=CHOICES[index]), 10)
        gpu.handle(ShowFrom(IDS[index], 1, LATE), 20)
    assert gpu.handle(ReaderAdded(IDS[0], 1, True, LATE), 30) == []
    (ended,) = gpu.handle(SequenceFinished(IDS[2], 1, "stop", 0, 3, 4, 5), 40)
    assert isinstance(ended.message, SequenceEnded) and ended.message.missed == (LATE,)
    assert gpu.handle(ReaderAdded(IDS[2], 1, False, LATE), 50) == [], "told with the end already"
    (ended,) = gpu.handle(SequenceFinished(IDS[0], 1, "stop", 0, 1, 4, 5), 60)
    assert isinstance(ended.message, SequenceEnded) and ended.message.missed == ()
    requests = family(0, 1, 2)
    requests.handle(ReaderAttached(R, LATE), 30)
    finish(requests, 0)
    finish(requests, 1)
    end = SequenceEnded(IDS[2], 1, "stop", span(3), 3, (LATE,))
    shown, missed, last, *_ = [to.message for to in requests.handle(end, 50)]
    assert isinstance(shown, RequestEnded) and shown.shown
    assert isinstance(missed, RequestEnded) and (missed.replies, missed.spans) == ((LATE,), (span(3),))
    assert last == ChoicesEnded(R, "m0", (INBOX, LATE))


def test_a_request_with_one_answer_says_what_it_always_said() -> None:
    here = Bench()
    messages = [*here.alone("requests", accepted("k", deadline_ms=5, reply=INBOX))]
    payloads = b"".join(one.payload for step in messages for one in step.said)
    assert b'"request.place"' in payloads and not any(word in payloads for word in (b"choice", b"priority", b"missed"))


def test_one_single_reply_has_all_answers_and_no_worker_shows_it() -> None:
    requests = family(0, 1, 2, reply=WHOLE)
    assert all(not request.replies for request in known(requests).requests.values())
    assert requests.handle(ReaderAttached(R, INBOX), 30)[0] == To(W, ShowFrom(IDS[0], 1, INBOX))
    finish(requests, 0)
    finish(requests, 1)
    last = next(to.message for to in finish(requests, 2) if isinstance(to.message, ChoicesEnded))
    assert last.replies == (WHOLE, INBOX)
    assert [(c.request, c.positions, c.spans, c.shown) for c in last.choices] == [
        (IDS[index], index + 1, (span(index + 1),), False) for index in range(3)
    ]
    # Control passes over what the worker has shown, by these bytes: this is not among it.
    assert b'"shown":true' not in encode(last)
    assert requests.handle(ReaderAttached(R, WHOLE), 60) == [
        To("reader", msgspec.structs.replace(last, replies=(WHOLE,)))
    ]


def test_cancel_and_deadline_end_all_that_have_not_ended() -> None:
    for reason in ("cancelled", "deadline"):
        requests = family(0, 1, deadline_ms=40)
        finish(requests, 0)
        fact = CancelRequested(R) if reason == "cancelled" else TimerFired(1, 1, 10 + 40 * MS, R)
        stop, ended, _ = requests.handle(fact, 41 * MS)
        assert stop == To(W, StopSequence(IDS[1], 1, reason))  # type: ignore[arg-type]
        assert isinstance(ended.message, RequestEnded)
        assert (ended.message.request, ended.message.outcome) == (IDS[2], reason)
        assert requests.handle(fact, 42 * MS) == []
        last = requests.handle(SequenceEnded(IDS[1], 1, reason, span(1), 3), 43 * MS)  # type: ignore[arg-type]
        assert To("reader", ChoicesEnded(R, "m0", (INBOX,))) in last


def test_the_other_ids_are_no_names_outside() -> None:
    requests = family(0, 1, 2)
    (refused,) = requests.handle(ReaderAttached(IDS[1], LATE), 30)
    assert isinstance(refused.message, ReaderRefused) and refused.message.code == "unknown_request"
    assert known(requests).known(IDS[1]) is None and known(requests).known(R) is not None


def test_a_repeat_reads_all_answers_and_another_body_is_refused() -> None:
    requests = family(0, 1, 2)
    again = requests.handle(asked(reply=LATE), 30)
    assert again == [To(W, ShowFrom(name, 1, LATE)) for name in IDS]
    for other in (Generation(8, prompt="hello", n=2), Generation(8, prompt="hello")):
        (refused,) = requests.handle(asked(generation=other), 30)
        assert isinstance(refused.message, ReaderRefused) and refused.message.code == "key_reused"


def bench(limit: int) -> Bench:
    here = Bench()
    here.alone("placement", PlacementConfigured(queue_limit=limit))
    from bus.messages import HeldModel, StoreStarted

    card = ModelCard("m0", "d", 40, 10, 1, 100)
    here.start("store/s0", StoreStarted("s0", 100, (HeldModel(card),)))
    return here


def test_all_of_them_get_into_the_queue_or_none() -> None:
    here = bench(5)
    here.alone("requests", asked())
    ends = [m for m in said(here.alone("requests", asked(key="l", request="l" * 32))) if isinstance(m, RequestEnded)]
    assert [end.code for end in ends] == ["queue_full"] * 3 and ends[0].choice == Choice("l" * 32, 0, 3)
    assert "3 requests wait already (the limit is 5), 3 more do not fit" in ends[0].reason
    one = here.alone("requests", accepted("m"))
    assert not any(isinstance(message, PlacementRefused) for message in said(one)), "there is room for one"
    two = msgspec.structs.replace(asked(key="n", request="n" * 32), generation=Generation(8, prompt="x", n=2))
    assert sum(isinstance(message, PlacementRefused) for message in said(here.alone("requests", two))) == 2


def test_a_step_that_failed_tells_every_answer_and_the_last_word(monkeypatch: Any) -> None:
    here = Bench()

    def broken(self: Requests, message: Any, now: int) -> list[To]:
        raise ValueError("broken")

    monkeypatch.setattr(Requests, "on_RequestAccepted", broken)
    messages = said(here.alone("requests", asked()))
    assert [type(message).__name__ for message in messages] == ["StepSkipped", *["RequestEnded"] * 3, "ChoicesEnded"]
    assert [(m.request, m.replies) for m in messages if isinstance(m, RequestEnded)] == [(i, (INBOX,)) for i in IDS]
    last = said(here.alone("requests", asked(reply=WHOLE)))[-1]
    assert isinstance(last, ChoicesEnded) and [one.outcome for one in last.choices] == ["failed"] * 3
