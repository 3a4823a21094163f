"""Subjects: every name that can be made can be read back, and nothing else can."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.memory_stream import subject_matches
from bus.subjects import FactSubject, SaidSubject, Subjects, escape_model, unescape_model, valid_name

NAMES = Subjects("main")
TOKENS = st.from_regex(r"[A-Za-z0-9_/-]{1,8}", fullmatch=True)
KINDS = st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=3).map(".".join)


@given(st.text(max_size=40))
def test_model_names_survive_as_one_token(model: str) -> None:
    token = escape_model(model)
    assert re.fullmatch(r"[A-Za-z0-9_=-]*", token)
    assert unescape_model(token) == model


@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_only_what_escape_makes_is_unescaped(token: str) -> None:
    try:
        model = unescape_model(token)
    except ValueError:
        return
    assert escape_model(model) == token


@pytest.mark.parametrize("token", ["a.b", "a b", "=2f", "=", "=4", "=GG", "=FF", "=41", "a/b"])
def test_what_is_not_escaped_is_refused(token: str) -> None:
    with pytest.raises(ValueError):
        unescape_model(token)


@given(TOKENS, KINDS)
def test_facts(actor: str, kind: str) -> None:
    subject = NAMES.fact(actor, kind)
    assert NAMES.parse(subject) == FactSubject(actor, kind)
    assert subject_matches(NAMES.facts(), subject)
    assert subject_matches(NAMES.facts_of(actor), subject)
    assert not subject_matches(NAMES.facts_of(actor + "x"), subject)


@given(TOKENS, TOKENS, KINDS)
def test_what_was_said(sender: str, receiver: str, kind: str) -> None:
    subject = NAMES.said(sender, receiver, kind)
    assert NAMES.parse(subject) == SaidSubject(sender, receiver, kind)
    assert subject_matches(NAMES.said_to(receiver), subject)
    assert not subject_matches(NAMES.facts(), subject)
    assert [subject_matches(pattern, subject) for pattern in NAMES.ledger_filters].count(True) == 1


@pytest.mark.parametrize(
    "subject",
    [
        "longshore.main.fact.requests",
        "longshore.main.fact..kind",
        "longshore.main.said.a.b",
        "longshore.main.said.a..c",
        "longshore.other.fact.a.b",
        "longshore.main.tokens.gpu.1",
        "",
    ],
)
def test_other_subjects_say_nothing(subject: str) -> None:
    assert NAMES.parse(subject) is None


def test_names_of_cells() -> None:
    assert all(valid_name(name) for name in ("main", "a", "A-1_b", "0", "x" * 63))
    assert not any(valid_name(name) for name in ("", "-a", "a.b", "a b", "ä", "a\n", "x" * 64))
    with pytest.raises(ValueError, match="cell name"):
        Subjects("a.b")


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.b.c", "a.b", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("a.*.>", "a.b", False),
        ("a.*.>", "a.b.c", True),
    ],
)
def test_patterns(pattern: str, subject: str, matches: bool) -> None:
    assert subject_matches(pattern, subject) is matches
