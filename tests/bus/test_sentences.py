"""Every kind of message reads as a sentence, and nothing in a ledger is too strange to be shown."""

from __future__ import annotations

import doctest
import types
import typing
from typing import Any, get_args, get_origin

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus import messages as m
from bus import phrases, reassembly
from bus.contract import Record
from bus.messages import names as names_of_models
from bus.phrases import names, plural
from bus.sentences import read_event, sentence, style_of
from bus.subjects import Subjects
from bus.wording import WORDS

SUBJECTS = Subjects("main")
KINDS = sorted({*m.FACTS, *m.SAID}, key=m.kind_of)
WORDS_OF_FIELDS = {
    "reason": "stop",
    "end": "stop",
    "device": "cpu",
    "request": "3f2a91c0" + "0" * 24,
    "model": "llama-a",
}


def value_of(kind: Any, name: str, choose: int) -> Any:
    """Some value of an annotated type; `choose` picks another one of a choice."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return value_of(arguments[0], name, choose)
    if origin is typing.Literal:
        return arguments[choose % len(arguments)]
    if origin in (typing.Union, types.UnionType):
        return value_of(arguments[choose % len(arguments)], name, choose)
    if origin is tuple:
        return tuple(value_of(arguments[0], name, choose) for _ in range(choose % 5))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        return kind(**{field: value_of(hint, field, choose) for field, hint in hints.items() if field[0] != "_"})
    if kind is str:
        return WORDS_OF_FIELDS.get(name, f"some {name}")
    if kind is bool:
        return choose % 2 == 0
    return {int: 1 + choose * 1_234_567, float: 0.5, type(None): None}[kind]


def of(kind: type[m.Message], choose: int) -> m.Message:
    message: m.Message = value_of(kind, "", choose)
    return message


@pytest.mark.parametrize("kind", KINDS, ids=m.kind_of)
def test_every_kind_has_its_sentence(kind: type[m.Message]) -> None:
    assert kind in WORDS
    for choose in range(6):
        message = of(kind, choose)
        text = sentence(message, "gpu/s1/0", "store/s1")
        assert text and "\n" not in text and "Struct" not in text and "(request=" not in text
        assert "None" not in text and "()" not in text and "  " not in text
        if choose == 1 and "request" in kind.__struct_fields__:
            assert "3f2a91c0…" in text


def test_no_words_for_kinds_that_do_not_exist() -> None:
    assert set(WORDS) == set(KINDS)


REQUEST = "3f2a91c0" + "0" * 24
CANDIDATE = m.Candidate("gpu/s1/0", "ssd", 40_000_000, 180_000_000, 0, 20_000_000, ("gpt2-c",))
SENTENCES: list[tuple[m.Message, str]] = [
    (
        m.RequestAccepted(REQUEST, "shop", "k", "llama-a", m.Generation(64, prompt="one two three")),
        "request 3f2a91c0… for llama-a accepted from shop (3 words, at most 64 tokens)",
    ),
    (
        m.PlacementDecided("llama-a", "gpu/s1/0", REQUEST, 1, (CANDIDATE,), 4),
        "placement starts llama-a on gpu/s1/0 from SSD in about 240 ms for request 3f2a91c0… "
        "(weighed 4 workers; evicts gpt2-c, idle longest)",
    ),
    (
        m.SequenceFinished(REQUEST, 1, "stop", 0, 12, prefill_ns=31_000_000, total_ns=1_500_000_000),
        "gpu/s1/0 finished request 3f2a91c0… (stop): positions 0 to 11, first token after 31 ms, all in 1.5 s",
    ),
    (
        m.SequenceEnded(REQUEST, 1, "", m.Span("gpu/s1/0", 7, 1, 0, 5, 1, 5)),
        "request 3f2a91c0… was cut off when gpu/s1/0 was sealed, positions 0 to 4 are durable",
    ),
    (m.DriverLost("gpu/s1/0", 7, "silent for 1000 ms"), "gpu/s1/0 is lost (epoch 7): silent for 1000 ms"),
    (
        m.RequestEnded(REQUEST, "a", "quarantined", 5, reason="3 workers died under it", attempts=3),
        "request 3f2a91c0… was quarantined after 5 tokens, 3 attempts: 3 workers died under it",
    ),
    (
        m.RequestQuarantined(REQUEST, "a", "c", "k", 7, (m.Death("gpu/s1/0", 1, 5, 3),), "1 worker died"),
        "request 3f2a91c0… for a is a dead letter after 1 attempt: 1 worker died",
    ),
    (m.RequestEnded(REQUEST, "a", "failed", 0, code="x", reason="no"), "request 3f2a91c0… failed after 0 tokens: no"),
    (m.StepSkipped(9, "placement", "KeyError: 'x'"), "fact 9 was skipped, placement failed on it: KeyError: 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "text"), SENTENCES, ids=[m.kind_of(message) for message, _ in SENTENCES])
def test_sentences_read_as_people_want_them(message: m.Message, text: str) -> None:
    assert sentence(message, "gpu/s1/0", "gpu/s1/0") == text


def test_records_become_events() -> None:
    fact = m.FactEnvelope("intake", msgspec.Raw(m.encode(m.CancelRequested("r"))))
    record = Record(7, 10**18, SUBJECTS.fact("requests", "cancel.requested"), m.encode(fact))
    event = read_event(SUBJECTS, record)
    assert (event.kind, event.sender, event.receiver, event.fact) == ("cancel.requested", "intake", "requests", True)
    assert event.text == "request r is to be cancelled" and event.message == m.CancelRequested("r")
    said = m.SaidEnvelope(7, 0, 1, msgspec.Raw(m.encode(m.DropModel("a"))))
    event = read_event(SUBJECTS, Record(8, 0, SUBJECTS.said("placement", "store/s1", "model.drop"), m.encode(said)))
    assert (event.sender, event.receiver, event.cause, event.fact) == ("placement", "store/s1", 7, False)
    assert event.text == "store/s1 is to delete a once nobody uses it"
    assert event.as_json()["envelope"]["body"] == {"kind": "model.drop", "model": "a"}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(
        [SUBJECTS.fact("a", "future.kind"), SUBJECTS.said("a", "b", "timer.set"), "elsewhere", "longshore.x"]
    ),
    st.binary(max_size=60)
    | st.just(b'{"sender":"s","body":{"kind":"future.kind","x":"\\u0007"}}')
    | st.just(b"[" * 9999),
)
def test_what_is_not_understood_is_shown_all_the_same(subject: str, payload: bytes) -> None:
    event = read_event(SUBJECTS, Record(1, 0, subject, payload))
    assert event.message is None and event.text.startswith("not understood here:") and event.text.isprintable()
    assert event.as_json()["sequence"] == 1


def test_colours_go_by_group_and_trouble_is_red() -> None:
    assert style_of("sequence.finished") == "green" and style_of("placement.decided") == "magenta"
    assert all(style_of(m.kind_of(kind)) for kind in KINDS)
    for kind in ("driver.lost", "load.failed", "step.skipped", "placement.refused", "epoch.closed"):
        assert style_of(kind) == "bold red"


def test_parts_of_sentences() -> None:
    for module in (phrases, reassembly, names_of_models):
        assert doctest.testmod(module).failed == 0
    assert (plural(1, "slot"), plural(2, "slot")) == ("1 slot", "2 slots")
    assert (names([]), names(["a", "b"]), names(list("abcde"))) == ("nothing", "a, b", "a, b, c and 2 more")
