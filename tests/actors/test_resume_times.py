"""a·(t_in + t_out) + b is found from moves, whatever they were, and stays a number that a snapshot can hold."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.resume_times import FIRST_FIXED_NS, FIRST_TOKEN_NS, ResumeTimes

MS = 1_000_000


def test_before_anything_was_seen_it_is_a_fair_guess() -> None:
    times = ResumeTimes()
    a, b = times.line()
    assert a == pytest.approx(FIRST_TOKEN_NS, rel=0.1) and b == pytest.approx(FIRST_FIXED_NS, rel=0.1)
    assert times.estimate(2000, 2) == 2000 * a + b and times.estimate(0, 0) == 0


def test_the_line_is_found() -> None:
    times = ResumeTimes()
    for number in range(80):
        tokens = 100 + 700 * (number % 5)
        times.learn(tokens, tokens * 40_000 + 20 * MS)
    a, b = times.line()
    assert a == pytest.approx(40_000, rel=0.05) and b == pytest.approx(20 * MS, rel=0.15)
    assert times.moves == 80 and times.error_ns < MS


def test_moves_of_one_length_say_nothing_about_others_but_are_met() -> None:
    times = ResumeTimes()
    for number in range(60):
        times.learn(300, (500 + number % 2) * MS)
    a, _ = times.line()
    assert times.estimate(300) == pytest.approx(500 * MS, rel=0.02) and a < FIRST_TOKEN_NS


@given(st.lists(st.tuples(st.integers(-1, 2**40), st.integers(-5, 2**62)), max_size=40))
def test_nothing_that_is_seen_breaks_it(moves: list[tuple[int, int]]) -> None:
    times = ResumeTimes()
    for tokens, elapsed in moves:
        times.learn(tokens, elapsed)
        a, b = times.line()
        assert a >= 0 and b >= 0 and times.error_ns >= 0
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(times), type=ResumeTimes) == times
