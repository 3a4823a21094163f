"""Text of an answer: never half a character, stop strings across tokens, nothing lost and nothing twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from models.detokenizer import Detokenizer
from models.sample_tokenizer import train_tokenizer
from models.stops import StopFilter


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = train_tokenizer("the ship waits outside the harbour", 300, 64)
    return tokenizer, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


def sentence_piece():
    """A tokenizer of the SentencePiece kind: a leading space per word, single bytes for what it has no piece for."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("▁ship", "▁harbour", "s", "▁"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return vocabulary, tokenizer.decode


def pieces(decode, tokens, prompt=()):
    detokenizer = Detokenizer(decode, prompt)
    return [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]


@given(st.text(min_size=0, max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_out_as_it_is_and_never_in_halves(byte_level, text):
    tokenizer, decode = byte_level
    shown = pieces(decode, tokenizer(text)["input_ids"])
    assert "".join(shown) == decode(tokenizer(text)["input_ids"])
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


@given(st.lists(st.integers(0, 255), max_size=80))
@settings(max_examples=200, deadline=None)
def test_broken_bytes_give_what_decoding_all_at_once_gives(byte_level, raw):
    tokenizer, decode = byte_level
    single = tokenizer.convert_tokens_to_ids([_BYTES[byte] for byte in raw])
    assert "".join(pieces(decode, single)) == decode(single)


def test_a_character_appears_with_its_last_byte(byte_level):
    tokenizer, decode = byte_level
    tokens = tokenizer("a雪b")["input_ids"]
    assert pieces(decode, tokens) == ["a", "", "", "雪", "b", ""]


def test_half_a_character_at_the_end_is_shown_with_the_end(byte_level):
    tokenizer, decode = byte_level
    tokens = tokenizer("a雪")["input_ids"][:-1]
    assert pieces(decode, tokens) == ["a", "", "", "\ufffd"]


def test_a_character_that_the_prompt_began_is_finished(byte_level):
    tokenizer, decode = byte_level
    *begun, last = tokenizer("a雪")["input_ids"]
    assert pieces(decode, [last], prompt=begun) == ["雪", ""]


def test_leading_spaces_of_pieces_are_kept():
    vocabulary, decode = sentence_piece()
    ship, harbour, plural = vocabulary["▁ship"], vocabulary["▁harbour"], vocabulary["s"]
    assert pieces(decode, [harbour, ship, plural] * 12, prompt=[ship])[:3] == [" harbour", " ship", "s"]
    snow = [vocabulary[f"<0x{byte:02X}>"] for byte in "雪".encode()]
    assert "".join(pieces(decode, [ship, *snow] * 12)) == "ship雪" + " ship雪" * 11
    assert not any("\ufffd" in piece for piece in pieces(decode, [ship, *snow] * 12))


def test_a_long_answer_decodes_few_tokens_at_a_time(byte_level):
    _, decode = byte_level
    looked = []

    def counting(tokens):
        looked.append(len(tokens))
        return decode(tokens)

    rng = random.Random(5)
    tokens = [rng.randrange(6, 300) for _ in range(2000)]
    assert "".join(pieces(counting, tokens)) == decode(tokens)
    assert max(looked) <= 19
    assert len(looked) < 2400


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), st.integers())
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_where_they_first_appear(text, stops, seed):
    rng = random.Random(seed)
    stop_filter = StopFilter(tuple(stops))
    shown, taken = "", 0
    while taken < len(text) and not stop_filter.stopped:
        size = rng.randint(1, 4)
        shown += stop_filter.push(text[taken : taken + size])
        taken += size
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    first = min(((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text), default=None)
    if stop_filter.stopped:
        assert stop_filter.flush() == ""
        assert shown == text[: first[1]]
    else:
        assert first is None
        assert shown + stop_filter.flush() == text


def test_what_may_become_a_stop_string_is_held_and_then_shown():
    stop_filter = StopFilter(("<end>",))
    assert [stop_filter.push(piece) for piece in ("a<", "e", "nx", "<en", "d>b")] == ["a", "", "<enx", "", ""]
    assert stop_filter.stopped


def _byte_names():
    """The character that byte-level BPE writes for each byte (the table of GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, extra = {byte: chr(byte) for byte in plain}, 0
    for byte in range(256):
        if byte not in names:
            names[byte] = chr(256 + extra)
            extra += 1
    return names


_BYTES = _byte_names()
