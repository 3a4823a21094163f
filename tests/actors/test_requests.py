"""Requests: exactly one end from every state, attempts from durable positions, readers, keys, deadlines, retention."""

from __future__ import annotations

from typing import Any

import pytest
from cell_bench import MS, SECOND, accepted

from actors.actor import Unexpected
from actors.requests import REJECTIONS_LIMIT, REPLIES_LIMIT, Requests
from bus.messages import (
    CancelRequested,
    Death,
    Generation,
    Message,
    ModelAdded,
    PlacementRefused,
    PlaceRequest,
    ReaderAdded,
    ReaderAttached,
    ReaderRefused,
    ReplyTo,
    RequestAccepted,
    RequestEnded,
    RequestPlaced,
    RequestQuarantined,
    RequestsConfigured,
    RunSequence,
    SequenceEnded,
    SequenceRejected,
    SetTimer,
    ShowFrom,
    ShowPositions,
    SlotReleased,
    Span,
    StopSequence,
    TimerFired,
    To,
)
from bus.messages.requests import SMALL_CHARACTERS

W0, W1 = "gpu/s/0", "gpu/s/1"
R = accepted("k").request
INBOX, OTHER = ReplyTo("inbox"), ReplyTo("other", 2)
RETENTION = To("timer", SetTimer(3_600 * SECOND + 50, "retention"))


def place(attempt: int = 1) -> To:
    return To("placement", PlaceRequest(R, attempt, "m0", 7))


def released(attempt: int = 1) -> To:
    return To("placement", SlotReleased(R, attempt, "m0"))


def span(first: int, following: int, attempt: int = 1, sealed: int = 0) -> Span:
    return Span(W0, 3, attempt, first, following, 4, 5, sealed)


def queued(**changes: Any) -> Requests:
    requests = Requests("requests")
    requests.handle(accepted("k", sequence=7, **({"reply": INBOX} | changes)), 10)
    return requests


def running(**changes: Any) -> Requests:
    requests = queued(**changes)
    requests.handle(RequestPlaced(R, 1, W0), 20)
    return requests


def ends(said: list[To]) -> RequestEnded:
    (ended,) = [to.message for to in said if isinstance(to.message, RequestEnded)]
    return ended


def test_an_accepted_request_is_placed_and_run() -> None:
    requests = Requests("requests")
    assert requests.handle(accepted("k", sequence=7, reply=INBOX), 10) == [place()]
    run = RunSequence(R, 1, "m0", 7, 0, (), (INBOX,), Generation(8, prompt="hello"))
    assert requests.handle(RequestPlaced(R, 1, W0), 20) == [To(W0, run)]
    with pytest.raises(Unexpected):
        requests.handle(ModelAdded("x"), 20)


@pytest.mark.parametrize(("reason", "outcome", "end"), [
    ("stop", "finished", "stop"), ("length", "finished", "length"), ("cancelled", "cancelled", ""),
    ("deadline", "deadline", ""),
])  # fmt: skip
def test_the_worker_ends_it_and_shows_the_end(reason: Any, outcome: Any, end: Any) -> None:
    requests = running()
    ended = RequestEnded(R, "m0", outcome, 4, end, shown=True, prompt_tokens=3, attempts=1, elapsed_ns=40)
    fact = SequenceEnded(R, 1, reason, span(0, 4), 3)
    assert requests.handle(fact, 50) == [To("reader", ended), RETENTION, released()]
    assert requests.handle(fact, 50) == [], "once"


@pytest.mark.parametrize("tokens", [0, 4])
def test_an_end_that_the_seal_found_is_shown_by_the_reader_of_control(tokens: int) -> None:
    requests = running()
    said = requests.handle(SequenceEnded(R, 1, "stop", span(0, tokens, sealed=20)), 50)
    ended = ends(said)
    assert (ended.outcome, ended.shown, ended.replies) == ("finished", False, (INBOX,))
    assert ended.spans == ((span(0, 4, sealed=20),) if tokens else ())
    assert not any(isinstance(to.message, ShowPositions) for to in said), "with the end, not twice"


def test_a_dead_worker_leads_to_the_next_attempt_from_the_durable_position() -> None:
    requests = running()
    cut = span(0, 4, sealed=20)
    assert requests.handle(SequenceEnded(R, 1, "", cut, 3), 30) == [
        To("reader", ShowPositions(R, "m0", (INBOX,), (cut,))),
        place(2),
    ]
    assert requests.handle(SequenceEnded(R, 1, "", cut, 3), 30) == []
    run = RunSequence(R, 2, "m0", 7, 4, (cut,), (INBOX,))
    assert requests.handle(RequestPlaced(R, 2, W1), 40) == [To(W1, run)]
    ended = ends(requests.handle(SequenceEnded(R, 2, "length", span(4, 8, 2)), 50))
    assert (ended.positions, ended.attempts, ended.prompt_tokens) == (8, 2, 3)


def test_nothing_durable_nothing_shown() -> None:
    assert running().handle(SequenceEnded(R, 1, ""), 30) == [place(2)]


def test_one_reply_readers_are_not_shown_pieces() -> None:
    """Found in review: a reader who wants the whole answer in one was shown a piece after a crash."""
    requests = running(reply=ReplyTo("once", single=True))
    assert requests.handle(SequenceEnded(R, 1, "", span(0, 4, sealed=20)), 30) == [place(2)]
    assert requests.handle(ReaderAttached(R, ReplyTo("too", single=True)), 30) == []


def test_rejected_with_retry_goes_on_elsewhere_and_without_it_fails() -> None:
    requests = running()
    assert requests.handle(SequenceRejected(R, 1, "no room", retry=True), 30) == [released(), place(2)]
    requests.handle(RequestPlaced(R, 2, W1), 30)
    said = requests.handle(SequenceRejected(R, 2, "too long"), 50)
    ended = RequestEnded(
        R, "m0", "failed", 0, code="invalid_request", reason="too long", replies=(INBOX,), attempts=2, elapsed_ns=40
    )
    assert said == [To("reader", ended), RETENTION, released(2)]


def test_a_sequence_that_broke_goes_on_behind_what_is_durable() -> None:
    requests = running()
    requests.handle(SequenceRejected(R, 1, "it broke", "engine_error", True, span(0, 2)), 30)
    (run,) = requests.handle(RequestPlaced(R, 2, W1), 40)
    assert run.message.position == 2 and run.message.history == (span(0, 2),)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["died", "rejected"])
def test_what_kills_its_workers_is_quarantined(kind: str) -> None:
    requests = running()
    for attempt in (1, 2, 3):
        fact: Message = SequenceEnded(R, attempt, "", span(attempt - 1, attempt, attempt, sealed=20))
        if kind == "rejected":
            fact = SequenceRejected(R, attempt, "it broke", "engine_error", retry=True)
        said = requests.handle(fact, 30)
        requests.handle(RequestPlaced(R, attempt + 1, W0), 30)
    ended = ends(said)
    assert (ended.outcome, ended.code) == ("quarantined", "quarantined") and "3 workers" in ended.reason
    assert (released(3) in said) is (kind == "rejected")
    assert len(ended.spans) == (3 if kind == "died" else 0)


def test_a_small_prompt_is_sent_along_once_and_a_large_one_never() -> None:
    for prompt, carried in (("x" * SMALL_CHARACTERS, True), ("x" * (SMALL_CHARACTERS + 1), False)):
        requests = Requests("requests")
        generation = Generation(8, prompt=prompt)
        requests.handle(RequestAccepted(R, "c", "k", "m0", generation, sequence=7), 10)
        (run,) = requests.handle(RequestPlaced(R, 1, W0), 20)
        assert isinstance(run.message, RunSequence)
        assert run.message.generation == (generation if carried else None)
        requests.handle(SequenceEnded(R, 1, ""), 30)
        (again,) = requests.handle(RequestPlaced(R, 2, W1), 40)
        assert isinstance(again.message, RunSequence) and again.message.generation is None


def test_what_workers_send_back_unbegun_is_no_death_and_still_bounded() -> None:
    requests = running()
    for attempt in range(1, REJECTIONS_LIMIT):
        assert released(attempt) in requests.handle(SequenceRejected(R, attempt, "full", retry=True), 30)
        requests.handle(RequestPlaced(R, attempt + 1, W0), 30)
    ended = ends(requests.handle(SequenceRejected(R, REJECTIONS_LIMIT, "full", retry=True), 30))
    assert ended.outcome == "quarantined" and f"{REJECTIONS_LIMIT} workers" in ended.reason


def test_the_limit_of_deaths_is_configuration() -> None:
    requests = running()
    requests.handle(RequestsConfigured(deaths_limit=1), 20)
    assert ends(requests.handle(SequenceEnded(R, 1, ""), 30)).outcome == "quarantined"


def test_a_worker_that_is_told_to_end_is_no_death_of_its_requests() -> None:
    requests = running()
    requests.handle(RequestsConfigured(deaths_limit=1, dead_letters=True), 20)
    for attempt in range(1, 4):
        assert not [
            to for to in requests.handle(SequenceEnded(R, attempt, "", left=True), 30) if to.receiver == "reader"
        ]
        requests.handle(RequestPlaced(R, attempt + 1, W0), 40)
    assert ends(requests.handle(SequenceEnded(R, 4, ""), 50)).outcome == "quarantined"


def test_a_dead_letter_tells_what_happened_where_the_cell_wants_them() -> None:
    requests = running()
    requests.handle(RequestsConfigured(deaths_limit=2, dead_letters=True), 20)
    requests.handle(SequenceRejected(R, 1, "full", retry=True), 30)
    requests.handle(RequestPlaced(R, 2, W0), 30)
    requests.handle(SequenceEnded(R, 2, "", span(0, 4, 2, sealed=20)), 30)
    requests.handle(RequestPlaced(R, 3, W1), 30)
    said = requests.handle(SequenceEnded(R, 3, ""), 40)
    (letter,) = [to.message for to in said if to.receiver == "dead"]
    assert isinstance(letter, RequestQuarantined)
    assert letter.deaths == (
        Death(W0, 1, 0, 0, "invalid_request: full"),
        Death(W0, 2, 4, 3, "its worker died"),
        Death(W1, 3, 4, 0, "its worker died"),
    )
    assert letter.accepted == 7 and letter.reason == ends(said).reason


@pytest.mark.parametrize("code", ["queue_full", "too_large", "unknown_model", "start_failed"])
def test_what_placement_refuses_fails_with_its_reason(code: Any) -> None:
    requests = queued()
    said = requests.handle(PlacementRefused(R, 1, code, "because", 300), 50)
    ended = ends(said)
    assert (ended.outcome, ended.code, ended.reason, ended.retry_ms) == ("failed", code, "because", 300)
    assert requests.handle(PlacementRefused(R, 1, code, "because"), 50) == []


def test_placed_too_late_gives_the_slot_back() -> None:
    requests = queued()
    requests.handle(CancelRequested(R), 20)
    assert requests.handle(RequestPlaced(R, 1, W0), 30) == [released()]
    assert requests.handle(RequestPlaced("nobody", 1, W0), 30) == [To("placement", SlotReleased("nobody", 1, "?"))]


# ---- cancel and deadline ---------------------------------------------------------------------------------------


def deadline(due: int) -> TimerFired:
    return TimerFired(7, 1, due, R)


def test_a_queued_request_ends_at_once() -> None:
    said = queued().handle(CancelRequested(R), 50)
    assert ends(said).outcome == "cancelled" and said[-1] == released()
    requests = queued(deadline_ms=1)
    said = requests.handle(deadline(10 + MS), 10 + MS)
    assert ends(said).outcome == "deadline" and said[-1] == released()
    assert requests.handle(CancelRequested(R), 50) == [] and requests.handle(CancelRequested("nobody"), 50) == []


def test_the_deadline_is_a_timer() -> None:
    said = Requests("requests").handle(accepted("k", sequence=7, deadline_ms=5), 10)
    assert said[1] == To("timer", SetTimer(10 + 5 * MS, R))


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_running_request_is_ended_by_its_worker_alone(reason: Any) -> None:
    requests = running(deadline_ms=1)
    stop: Message = CancelRequested(R) if reason == "cancelled" else deadline(10 + MS)
    assert requests.handle(stop, 10 + MS) == [To(W0, StopSequence(R, 1, reason))]
    assert requests.handle(CancelRequested(R), 40 + MS) == [], "once"
    assert ends(requests.handle(SequenceEnded(R, 1, "stop", span(0, 2)), 50 + MS)).outcome == "finished"


@pytest.mark.parametrize("fact", [
    SequenceEnded(R, 1, "", Span(W0, 3, 1, 0, 2, 4, 5, 20)),
    SequenceRejected(R, 1, "no room", retry=True, span=Span(W0, 3, 1, 0, 2, 4, 5)),
])  # fmt: skip
def test_who_is_being_stopped_gets_no_further_attempt(fact: Any) -> None:
    """Found in review: after a rejection with retry it ran on, and could never be cancelled again."""
    requests = running()
    requests.handle(CancelRequested(R), 40)
    said = requests.handle(fact, 50)
    assert ends(said).outcome == "cancelled" and ends(said).positions == 2
    assert not any(isinstance(to.message, PlaceRequest) for to in said)


def test_an_old_deadline_does_not_touch_a_later_life_of_the_key() -> None:
    """Found in review: the timer of a forgotten request stopped the new one under the same key."""
    requests = queued(deadline_ms=5000)
    requests.handle(CancelRequested(R), 50)
    requests.handle(RequestsConfigured(retention_ms=1), 50)
    requests.handle(TimerFired(1, 1, 1, "retention"), SECOND)
    requests.handle(accepted("k", sequence=99), 2 * SECOND)
    assert requests.handle(deadline(10 + 5000 * MS), 6 * SECOND) == []
    assert requests.state.requests[R].status == "queued"


# ---- readers and keys ------------------------------------------------------------------------------------------


def test_a_repeated_key_adds_a_reader_and_another_body_is_refused() -> None:
    requests = running()
    assert requests.handle(accepted("k", sequence=8, reply=OTHER), 30) == [To(W0, ShowFrom(R, 1, OTHER))]
    assert requests.handle(accepted("k", sequence=8), 30) == []
    (refused,) = requests.handle(accepted("k", sequence=9, prompt="else", reply=OTHER), 30)
    assert isinstance(refused.message, ReaderRefused) and refused.message.code == "key_reused"
    (refused,) = requests.handle(accepted("k", "m1", sequence=9, reply=OTHER), 30)
    assert isinstance(refused.message, ReaderRefused) and refused.message.code == "key_reused"
    assert Generation(1).prompt is None


def test_a_reader_is_shown_what_there_is_in_every_state() -> None:
    requests = queued()
    attach = ReaderAttached(R, OTHER)
    assert requests.handle(attach, 20) == [], "it will be shown from the start"
    assert requests.state.requests[R].replies == [INBOX, OTHER]
    requests.handle(RequestPlaced(R, 1, W0), 20)
    assert requests.handle(attach, 20) == [To(W0, ShowFrom(R, 1, OTHER))]
    cut = span(0, 4, sealed=20)
    requests.handle(SequenceEnded(R, 1, "", cut), 30)
    assert requests.handle(attach, 30) == [To("reader", ShowPositions(R, "m0", (OTHER,), (cut,)))]
    requests.handle(RequestPlaced(R, 2, W0), 30)
    requests.handle(SequenceEnded(R, 2, "stop", span(4, 5, 2)), 30)
    (again,) = requests.handle(attach, 40)
    assert isinstance(again.message, RequestEnded) and again.message.replies == (OTHER,)
    assert again.message.spans == (cut, span(4, 5, 2)) and not again.message.shown


def test_a_reader_who_came_too_late_for_the_worker_is_shown_the_rest() -> None:
    requests = running()
    assert requests.handle(ReaderAdded(R, 1, True, OTHER), 30) == []
    assert requests.handle(ReaderAdded(R, 1, False, OTHER), 30) == [To(W0, ShowFrom(R, 1, OTHER))]
    requests.handle(SequenceEnded(R, 1, "stop", span(0, 4)), 30)
    assert ends(requests.handle(ReaderAdded(R, 1, False, OTHER), 40)).replies == (OTHER,)
    assert requests.handle(ReaderAdded("nobody", 1, False, OTHER), 40) == []


def test_a_reader_of_nothing_is_refused() -> None:
    (refused,) = queued().handle(ReaderAttached("nobody", OTHER), 30)
    assert isinstance(refused.message, ReaderRefused) and refused.message.code == "unknown_request"
    assert "kept for 3600 s" in refused.message.reason


def test_readers_are_bounded_and_the_oldest_makes_room() -> None:
    requests = queued()
    for i in range(REPLIES_LIMIT):
        requests.handle(ReaderAttached(R, ReplyTo(f"r{i}")), 20)
    replies = requests.state.requests[R].replies
    assert len(replies) == REPLIES_LIMIT and replies[0].subject == "r0"
    requests.handle(ReaderAttached(R, ReplyTo("r0", 5)), 20)
    assert requests.state.requests[R].replies[-1] == ReplyTo("r0", 5)


# ---- retention -------------------------------------------------------------------------------------------------


def test_ended_requests_are_forgotten_after_the_retention_by_one_timer() -> None:
    requests = Requests("requests")
    requests.handle(RequestsConfigured(retention_ms=10_000), 0)
    timers = []
    for i, key in enumerate("abc"):
        requests.handle(accepted(key), i * SECOND)
        said = requests.handle(CancelRequested(accepted(key).request), i * SECOND)
        timers += [to.message for to in said if isinstance(to.message, SetTimer)]
    assert timers == [SetTimer(10 * SECOND, "retention")]
    said = requests.handle(TimerFired(1, 1, 10 * SECOND, "retention"), 11 * SECOND)
    assert said == [To("timer", SetTimer(12 * SECOND, "retention"))]
    assert list(requests.state.requests) == [accepted("c").request] == list(requests.state.ended)
    assert requests.handle(TimerFired(1, 1, 12 * SECOND, "retention"), 12 * SECOND) == []
    assert not requests.state.requests and not requests.state.retention_timer


def test_the_timer_of_the_retention_fires_once_a_second_at_most() -> None:
    requests = Requests("requests")
    requests.handle(RequestsConfigured(retention_ms=10), 0)
    for i in range(3):
        requests.handle(accepted(f"{i}"), i)
        requests.handle(CancelRequested(accepted(f"{i}").request), i)
    requests.handle(TimerFired(1, 1, 10 * MS, "retention"), 10 * MS)
    (timer,) = requests.handle(TimerFired(1, 1, 10 * MS, "retention"), 10 * MS)
    assert timer.message == SetTimer(10 * MS + SECOND, "retention")
