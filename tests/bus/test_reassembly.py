"""Positions: whatever repeats, overlaps, comes early or never, each one is given out once, in order, or not at all."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.logprobs import TokenLogprobs
from bus.reassembly import EARLY_LIMIT, Choices, Reassembly, cut
from bus.replies import Chunk, TokenCounts, chunk_of

USAGE = TokenCounts(3, 0)


def piece(position: int) -> str:
    """The text of one position; some are empty, as pieces of half a character are."""
    return "" if position % 3 == 1 else f"<{position}>"


def part(first: int, next_: int, total: int) -> Chunk:
    """Positions [first, next_) of an answer with `total` of them."""
    end = next_ == total
    tokens = list(range(100 + first, 100 + next_))
    texts = [piece(p) for p in range(first, next_)]
    logprobs = [TokenLogprobs(-float(p), ()) for p in range(first, next_)]
    return chunk_of(
        "r", first, tokens, texts, end="stop" if end else "", usage=USAGE if end else None, logprobs=logprobs
    )


def spans(total: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, total), st.integers(0, total)).map(lambda two: (min(two), max(two)))


@st.composite
def showings(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """An answer's length, the position wanted first, and what is shown of it, in that order."""
    total = draw(st.integers(0, 12))
    start = draw(st.integers(0, total))
    return total, start, draw(st.lists(spans(total), max_size=20))


@settings(deadline=None)
@given(showings())
def test_once_and_in_order_and_complete_after_asking_for_what_is_missing(
    case: tuple[int, int, list[tuple[int, int]]],
) -> None:
    total, start, shown = case
    positions = Reassembly(start)
    got: list[Chunk] = []
    for first, next_ in shown:
        got += positions.feed(part(first, next_, total))
        if positions.hole:
            assert not positions.ended
    asked = 0
    while not positions.ended:
        asked += 1
        assert asked <= total + 2, "asking for the next position must make progress"
        got += positions.feed(part(positions.next, min(positions.next + 2, total), total))
    tokens = [token for chunk in got for token in chunk.tokens]
    assert tokens == list(range(100 + start, 100 + total))
    assert "".join(chunk.text for chunk in got) == "".join(piece(p) for p in range(start, total))
    assert all(chunk.tokens or chunk.end for chunk in got), "a chunk that says nothing is no news"
    assert [chunk.end for chunk in got if chunk.end] == ["stop"] and got[-1].usage == USAGE
    assert positions.feed(part(0, total, total)) == [] and not positions.hole


@given(spans(8), st.integers(0, 9))
def test_a_cut_keeps_tokens_and_text_together(span: tuple[int, int], start: int) -> None:
    chunk = part(*span, 20)
    rest = cut(chunk, start)
    assert rest is not None
    assert rest.position == max(start, chunk.position)
    assert rest.tokens == tuple(100 + p for p in range(max(start, span[0]), span[1]))
    assert rest.text == "".join(piece(p) for p in range(max(start, span[0]), span[1]))
    assert [one.logprob for one in rest.logprobs] == [-p for p in range(max(start, span[0]), span[1])]
    assert len(rest.texts) == (len(rest.tokens) if len(rest.tokens) > 1 else 0)


def test_a_chunk_that_cannot_be_cut_leaves_a_hole_and_keeps_its_end() -> None:
    positions = Reassembly(1)
    assert positions.feed(Chunk("r", 0, (100, 101), "ab", end="stop")) == []
    assert positions.hole and positions.next == 1
    got = positions.feed(Chunk("r", 1, (101,), "b"))
    assert [chunk.text for chunk in got] == ["b", ""] and got[-1].end == "stop" and positions.ended


def test_what_came_early_is_given_out_when_the_hole_closes() -> None:
    positions = Reassembly()
    assert positions.feed(part(2, 3, 4)) == [] and positions.hole
    assert positions.feed(part(3, 4, 4)) == []
    assert [chunk.position for chunk in positions.feed(part(0, 2, 4))] == [0, 2, 3]
    assert positions.ended and not positions.hole


def test_what_comes_far_too_early_is_forgotten_but_the_hole_is_not() -> None:
    positions = Reassembly()
    for position in range(1, 2 * EARLY_LIMIT):
        positions.feed(Chunk("r", position, (1,), "a"))
    assert positions.hole
    assert len(positions.feed(Chunk("r", 0, (1,), "a"))) <= EARLY_LIMIT + 2


def test_an_end_below_the_wanted_position_ends_the_answer() -> None:
    positions = Reassembly(50)
    (last,) = positions.feed(Chunk("r", 10, (), "", end="stop"))
    assert (last.position, last.tokens, last.end) == (50, (), "stop") and positions.ended


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), spans(6)), max_size=30), st.booleans())
def test_each_of_several_answers_comes_once_and_in_order(shown: list[tuple[int, tuple[int, int]]], told: bool) -> None:
    """`told`: the reader knows from the beginning how many there are."""
    lengths = (4, 6, 0)

    def of(choice: int, first: int, next_: int) -> Chunk:
        total = lengths[choice]
        chunk = part(min(first, total), min(next_, total), total)
        return msgspec.structs.replace(chunk, choice=choice, n=3 if chunk.end else 1)

    positions = Choices(0, 3 if told else 1)
    got: list[Chunk] = []
    for choice, (first, next_) in shown:
        got += positions.feed(of(choice, first, next_))
    for _ in range(20):
        for choice in (2, 0, 1):
            got += positions.feed(of(choice, positions.next, positions.next + 2))
    assert positions.ended and not positions.hole
    for choice, total in enumerate(lengths):
        mine = [chunk for chunk in got if chunk.choice == choice]
        assert [token for chunk in mine for token in chunk.tokens] == list(range(100, 100 + total))
        assert [chunk.end for chunk in mine if chunk.end] == ["stop"] and mine[-1].end
