"""The contract of embeddings: bodies that are taken and refused, and the one answer."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.api import ParsedRequest, Refusal, parse_infer
from bus.embeddings import encode_answer, numbers, parse_embed, parse_submitted
from bus.messages import ReplyTo, body_digest, decode_fact_body, encode, is_small
from bus.reassembly import Reassembly
from bus.replies import Chunk, ErrorBody, TokenCounts, chunk_of, decode_reply, encode_chunk

VECTORS = (struct.pack("<3f", 0.1, -2.5, 1e-30), struct.pack("<3f", 3.0, 1 / 3, -0.0))


def parse(body: Any, **more: str) -> ParsedRequest:
    return parse_embed(json.dumps(body).encode(), None, "bert", **more)


def test_a_body_becomes_a_request_of_one_position_for_each_input() -> None:
    parsed = parse({"input": ["one", "two"], "client": "shop", "key": "k", "deadline_ms": 5, "priority": 3})
    assert parsed.accepted.generation.inputs == ("one", "two")
    assert (parsed.accepted.generation.max_tokens, parsed.accepted.deadline_ms, parsed.accepted.priority) == (2, 5, 3)
    assert (parsed.stream, parsed.form) == (False, "float")
    assert parsed.fact("r").reply == ReplyTo("r", single=True, form="float")
    assert decode_fact_body(encode(parsed.accepted)) == parsed.accepted
    assert parse({"tokens": [[1, 2], [3]]}).accepted.generation.inputs == ((1, 2), (3,))
    assert parse({"input": "one", "encoding": "base64"}).fact("r").reply == ReplyTo("r", single=True, form="base64")
    assert parse({"input": "one", "encoding": "base64", "stream": True}).fact("r").reply == ReplyTo("r")


def test_a_repeat_is_the_same_request_however_it_wants_to_be_answered() -> None:
    one, other = parse({"input": "a", "key": "k"}), parse({"input": ["a"], "key": "k", "encoding": "base64"})
    assert one.request == other.request
    assert body_digest(one.accepted.generation, "m") == body_digest(other.accepted.generation, "m")
    assert body_digest(one.accepted.generation, "m") != body_digest(parse({"input": "b"}).accepted.generation, "m")


def test_only_small_inputs_travel_with_their_effect() -> None:
    assert is_small(parse({"input": ["a" * 500, "b" * 500]}).accepted.generation)
    assert not is_small(parse({"input": ["a" * 600, "b" * 600]}).accepted.generation)
    assert not is_small(parse({"tokens": [[1] * 300]}).accepted.generation)


REFUSED: list[tuple[Any, str]] = [
    ({}, "give exactly one of input and tokens, got none of them"),
    ({"input": "a", "tokens": [[1]]}, "give exactly one of input and tokens, got input and tokens"),
    ({"input": []}, "input must be a text or a list of 1 to 256 texts, got []"),
    ({"input": ["a"] * 257}, "input must be a text or a list of 1 to 256 texts, got"),
    ({"input": ["a", ""]}, "input[1] must not be empty"),
    ({"input": ""}, "input must not be empty"),
    ({"input": ["a", 5]}, "input[1] must be a text, got 5"),
    ({"tokens": [1, 2]}, "tokens[0] must be a list of at least one token id, got 1"),
    ({"tokens": [[1], []]}, "tokens[1] must be a list of at least one token id, got []"),
    ({"tokens": [[1, -2]]}, "tokens[0][1] must be a whole number from 0 to 2147483647, got -2"),
    ({"input": "a", "encoding": "int8"}, 'encoding must be float or base64, got "int8"'),
    ({"input": "a", "prompt": "b"}, 'unknown field "prompt"'),
    ([], "the body must be an object with fields, got []"),
]


@pytest.mark.parametrize(("body", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_what_is_wrong_is_told_in_one_sentence(body: Any, sentence: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse(body)
    assert caught.value.name == "bad_request" and caught.value.message.startswith(sentence)


def test_what_is_too_large_is_told_so() -> None:
    with pytest.raises(Refusal, match="at most 400000"):
        parse({"input": ["a", "b" * 400_001]})
    with pytest.raises(Refusal, match="at most 900000"):
        parse({"input": ["a" * 300_000] * 3})
    with pytest.raises(Refusal, match="as JSON"):
        parse_embed(msgspec.msgpack.encode({"input": ["\x01" * 300_000]}), "application/msgpack", "bert")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["input", "tokens", "encoding", "key", "stream", "from", "x"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4), max_leaves=8), max_size=4) | st.binary(max_size=40))  # fmt: skip
def test_any_body_is_a_request_or_a_refusal(body: Any) -> None:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    for parser in (parse_embed, parse_submitted):
        try:
            parser(payload, None, "bert")
        except Refusal:
            pass


def test_a_submission_is_told_from_the_other_kind_by_its_fields() -> None:
    for body in ({"input": "a"}, {"tokens": [[1]]}):
        assert parse_submitted(json.dumps(body).encode(), None, "m").accepted.generation.inputs
    for body in ({"prompt": "a"}, {"tokens": [1]}):
        payload = json.dumps(body | {"key": "k"}).encode()
        assert parse_submitted(payload, None, "m") == parse_infer(payload, None, "m")


def test_numbers_of_the_answer_are_the_very_vectors() -> None:
    chunk = chunk_of("r", 0, (4, 5), ("", ""), end="stop", usage=TokenCounts(9, 2), vectors=VECTORS)
    answer = json.loads(encode_answer(chunk, "float", "json"))
    assert [struct.pack("<3f", *vector) for vector in answer["embeddings"]] == list(VECTORS)
    assert {name: answer[name] for name in answer if name != "embeddings"} == {
        "request": "r",
        "usage": {"prompt_tokens": 9},
    }
    answer = json.loads(encode_answer(chunk, "base64", "json"))
    assert [base64.b64decode(vector) for vector in answer["embeddings"]] == list(VECTORS)
    assert msgspec.msgpack.decode(encode_answer(chunk, "base64", "msgpack"))["embeddings"] == list(VECTORS)
    assert numbers(VECTORS[0])[1] == -2.5


def test_an_answer_that_ended_otherwise_says_so() -> None:
    chunk = Chunk("r", 1, (), "", end="failed", usage=TokenCounts(0, 0), error=ErrorBody("invalid_request", "no"))
    answer = json.loads(encode_answer(chunk, "float", "json"))
    assert (answer["end"], answer["error"]["code"], answer["embeddings"]) == ("failed", "invalid_request", [])


@pytest.mark.parametrize("form", ["float", "base64"])
def test_an_answer_that_no_message_carries_says_how_to_ask(form: Any) -> None:
    vectors = [bytes(16_384)] * 256
    chunk = chunk_of("r", 0, [1] * 256, [""] * 256, end="stop", usage=TokenCounts(256, 256), vectors=vectors)
    payload = encode_answer(chunk, form, "json")
    answer = json.loads(payload)
    assert len(payload) < 1000 and answer["end"] == "failed" and answer["error"]["code"] == "too_large"


def test_chunks_of_vectors_are_cut_where_they_overlap() -> None:
    positions = Reassembly()
    whole = chunk_of("r", 0, (4, 5), ("", ""), end="stop", vectors=VECTORS)
    first = chunk_of("r", 0, (4,), ("",), vectors=VECTORS[:1])
    assert decode_reply(encode_chunk(whole)) == whole
    assert [vector for chunk in (*positions.feed(first), *positions.feed(whole)) for vector in chunk.vectors] == list(
        VECTORS
    )
    assert positions.ended
    with pytest.raises(ValueError, match="not one for each input"):
        Chunk("r", 0, (4, 5), "", vectors=VECTORS[:1])
