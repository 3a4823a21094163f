"""The client contract, inward: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.api import (
    _INFER,
    ParsedRequest,
    Refusal,
    parse_infer,
    parse_key,
    parse_model,
    parse_request_id,
    parse_resume,
)
from bus.messages import OUTPUT_LIMIT_BYTES, encode, request_id
from bus.messages.requests import ReplyTo, RequestAccepted
from bus.replies import (
    CODES,
    Chunk,
    ChunkEnd,
    Status,
    chunk_of,
    decode_reply,
    encode_chunk,
    encode_reply,
    error_headers,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
MSGPACK = "application/msgpack"


def parse(body: Any, content_type: str | None = None) -> ParsedRequest:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_infer(payload, content_type, "llama-a")


def test_the_smallest_request_takes_the_documented_defaults() -> None:
    parsed = parse({"prompt": "hello"})
    generation = parsed.accepted.generation
    assert (generation.max_tokens, generation.temperature, generation.top_p, generation.top_k) == (256, -1, -1, -1)
    assert (parsed.start, parsed.stream, parsed.encoding, parsed.accepted.client) == (0, True, "json", "anonymous")
    assert parsed.request == request_id("anonymous", parsed.accepted.key)
    assert parsed.accepted.reply is None and parsed.fact("") is parsed.accepted
    assert parsed.fact("_INBOX.1").reply == ReplyTo("_INBOX.1")


def test_every_field_arrives_in_both_encodings() -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 4,
        "seed": 9, "stop": "x", "client": "shop", "key": "k", "deadline_ms": 10, "from": 2, "stream": False,
        "min_tokens": 2, "stop_tokens": [7, 5, 7], "repetition_penalty": 1.5, "presence_penalty": -1,
        "frequency_penalty": 0.25, "logit_bias": {"10": -100, "9": 3}, "priority": -7, "logprobs": 0, "n": 2,
    }  # fmt: skip
    one = parse(body)
    other = parse(msgspec.msgpack.encode(body), MSGPACK)
    assert one.accepted == other.accepted and other.encoding == "msgpack"
    generation = one.accepted.generation
    assert (generation.max_tokens, generation.temperature, generation.top_k, generation.seed) == (3, 0.0, 4, 9)
    assert generation.stop == ("x",) and one.accepted.deadline_ms == 10
    assert (generation.min_tokens, generation.stop_tokens) == (2, (5, 7))
    penalties = (generation.repetition_penalty, generation.presence_penalty, generation.frequency_penalty)
    assert penalties == (1.5, -1.0, 0.25)
    assert (generation.logprobs, generation.n) == (0, 2)
    assert generation.logit_bias == ((9, 3.0), (10, -100.0)) and one.accepted.priority == -7
    numbered = msgspec.msgpack.encode(body | {"logit_bias": {9: 3, 10: -100}})
    assert parse(numbered, MSGPACK).accepted == one.accepted
    assert one.fact("r").reply == ReplyTo("r", 2, "json", True)


def test_a_repeat_gets_the_same_id_and_seed_and_another_request_gets_others() -> None:
    one, two = parse({"prompt": "a", "key": "k"}), parse({"prompt": "a", "key": "k"})
    assert one.accepted == two.accepted
    assert parse({"prompt": "a"}).request != parse({"prompt": "a"}).request
    assert parse({"prompt": "a", "key": "l"}).accepted.generation.seed != one.accepted.generation.seed


def test_a_field_that_says_its_default_says_nothing_to_the_byte() -> None:
    """Ledgers of before these fields stay as they are, and a repeat that spells defaults out is the same request."""
    body = {"prompt": "a", "key": "k", "seed": 1, "temperature": 0, "top_p": 0.5}
    plain = encode(parse(body).accepted)
    assert plain == (
        b'{"kind":"request.accepted","request":"d6df01a1e2f9d41ffd37cfb020133433","client":"anonymous","key":"k",'
        b'"model":"llama-a","generation":{"max_tokens":256,"prompt":"a","temperature":0.0,"top_p":0.5,"seed":1}}'
    )
    spelled = {
        "min_tokens": 0, "stop_tokens": [], "repetition_penalty": 1, "presence_penalty": -0.0, "frequency_penalty": 0,
        "logit_bias": {}, "priority": 0, "n": 1,
    }  # fmt: skip
    assert encode(parse(body | spelled).accepted) == plain


def test_null_counts_as_absent() -> None:
    assert parse({"prompt": "a", "key": "k", "stop": None}).accepted == parse({"prompt": "a", "key": "k"}).accepted


def test_a_default_key_stands_in_for_an_absent_one_only() -> None:
    assert parse_infer(b'{"prompt":"a"}', None, "m", default_key="submit:7").accepted.key == "submit:7"
    assert parse_infer(b'{"prompt":"a","key":"k"}', None, "m", default_key="submit:7").accepted.key == "k"


STOP = "stop must be a text or a list of at most 8 texts, each of 1 to 256 characters, got "
NAME = "client must be a text of 1 to 200 characters without a zero byte, got "
BIAS_KEYS = "logit_bias must have token ids from 0 to 2147483647 as keys, got "
REFUSED: list[tuple[Any, str]] = [
    ({"prompt": ""}, "prompt must not be empty"),
    ({"prompt": 3}, "prompt must be a text, got 3"),
    ({}, "give exactly one of prompt, messages, tokens and prompt_parts, got none of them"),
    (
        {"prompt": "a", "tokens": [1]},
        "give exactly one of prompt, messages, tokens and prompt_parts, got prompt and tokens",
    ),
    ({"prompt": "a", "max_tokens": "many"}, 'max_tokens must be a whole number from 1 to 1000000, got "many"'),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens must be a whole number from 1 to 1000000, got 0"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens must be a whole number from 1 to 1000000, got true"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be a whole number from 1 to 1000000, got 1.5"),
    ({"prompt": "a", "max_token": 3}, 'unknown field "max_token": did you mean max_tokens?'),
    ({"prompt": "a", "temperature": -1}, "temperature must be a number from 0 to 100, got -1"),
    ({"prompt": "a", "temperature": 10**30}, "temperature must be a number from 0 to 100, got 1" + "0" * 30),
    ({"prompt": "a", "top_p": 0}, "top_p must be a number above 0 and at most 1, got 0"),
    ({"prompt": "a", "top_p": 1.01}, "top_p must be a number above 0 and at most 1, got 1.01"),
    ({"prompt": "a", "top_k": -1}, "top_k must be a whole number from 0 to 2147483647, got -1"),
    ({"prompt": "a", "stop": ""}, STOP + '""'),
    ({"prompt": "a", "stream": 1}, "stream must be true or false, got 1"),
    ({"prompt": "a", "from": -1}, "from must be a whole number from 0 to 9007199254740992, got -1"),
    ({"tokens": [1, -2]}, "tokens[1] must be a whole number from 0 to 2147483647, got -2"),
    ({"tokens": []}, "tokens must be a list of at least one token id, got []"),
    ({"messages": [{"r": 1}]}, 'messages[0] must have exactly the fields role and content, got {"r": 1}'),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content must be a text, got 1"),
    ({"prompt": "a", "client": "\0"}, NAME + '"\\u0000"'),
    ({"prompt": "a", "max_tokens": 3, "min_tokens": 4}, "min_tokens must be at most max_tokens, 3, got 4"),
    ({"prompt": "a", "stop_tokens": 3}, "stop_tokens must be a list of at most 32 token ids, got 3"),
    ({"prompt": "a", "stop_tokens": [-1]}, "stop_tokens[0] must be a whole number from 0 to 2147483647, got -1"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty must be a number above 0 and at most 10, got 0"),
    ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty must be a number from -2 to 2, got 2.5"),
    ({"prompt": "a", "frequency_penalty": "x"}, 'frequency_penalty must be a number from -2 to 2, got "x"'),
    ({"prompt": "a", "logit_bias": [1]}, "logit_bias must be an object of at most 300 token ids with numbers, got [1]"),
    ({"prompt": "a", "logit_bias": {"01": 1}}, BIAS_KEYS + '"01"'),
    ({"prompt": "a", "logit_bias": {"ten": 1}}, BIAS_KEYS + '"ten"'),
    ({"prompt": "a", "logit_bias": {"9": 101}}, "logit_bias[9] must be a number from -100 to 100, got 101"),
    ({"prompt": "a", "priority": 101}, "priority must be a whole number from -100 to 100, got 101"),
    ([1], "the body must be an object with fields, got [1]"),
    (b"", "the body is empty: send JSON with a prompt"),
    (b"hello", "the body is not JSON: JSON is malformed: invalid character (byte 0)"),
    (b'{"prompt":"a","temperature":NaN}', "the body is not JSON: JSON is malformed: invalid character (byte 28)"),
    (b'{"prompt":"\xff"}', "the body is not JSON: a text in it is not UTF-8"),
    (b"[" * 50_000, "the body is nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), REFUSED, ids=[sentence[:50] for _, sentence in REFUSED])
def test_what_is_wrong_is_told_in_one_sentence(body: Any, sentence: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse(body)
    assert (caught.value.code, caught.value.name, caught.value.message) == (400, "bad_request", sentence)


def test_an_unknown_field_without_a_neighbour_lists_the_known_ones() -> None:
    with pytest.raises(Refusal, match=r'unknown field "zzzzzz": known are prompt, messages, tokens, max_tokens,'):
        parse({"prompt": "a", "zzzzzz": {}})


def test_non_finite_numbers_are_refused_where_an_encoding_has_them() -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(Refusal, match="temperature must be a number from 0 to 100"):
            parse(msgspec.msgpack.encode({"prompt": "a", "temperature": value}), MSGPACK)


@pytest.mark.parametrize(
    ("payload", "content_type"),
    [
        (b'{"prompt":"' + b"a" * 900_000 + b'"}', None),
        (b'{"prompt":"' + b"a" * 400_001 + b'"}', None),
        (msgspec.msgpack.encode({"prompt": "\x01" * 300_000}), MSGPACK),
        (msgspec.msgpack.encode({"tokens": [2_000_000_000] * 100_000}), MSGPACK),
    ],
    ids=["body", "prompt", "prompt that grows as JSON", "tokens that grow as JSON"],
)
def test_what_would_not_fit_into_the_ledger_is_too_large(payload: bytes, content_type: str | None) -> None:
    with pytest.raises(Refusal) as caught:
        parse(payload, content_type)
    assert (caught.value.code, caught.value.name) == (413, "too_large")
    assert "at most" in caught.value.message


def test_the_largest_unchecked_body_stays_below_the_limit_of_the_ledger() -> None:
    prompt = "\x01" * (OUTPUT_LIMIT_BYTES // 8 - 30)
    parsed = parse(msgspec.msgpack.encode({"prompt": prompt}), MSGPACK)
    assert len(encode(parsed.fact("r" * 512))) < OUTPUT_LIMIT_BYTES


def test_content_types() -> None:
    assert parse({"prompt": "a"}, "application/json; charset=utf-8").encoding == "json"
    with pytest.raises(Refusal, match=r'Content-Type must be application/json or application/msgpack, got "text/xml"'):
        parse({"prompt": "a"}, "text/xml")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from([*_INFER, "x"])
NEAR = {
    "min_tokens": st.integers(-1, 5) | st.none(),
    "stop_tokens": st.lists(st.integers(-1, 2**32), max_size=34),
    "repetition_penalty": st.floats(-0.5, 10.5),
    "presence_penalty": st.floats(-2.5, 2.5) | st.integers(-3, 3),
    "frequency_penalty": st.floats(-2.5, 2.5),
    "logit_bias": st.dictionaries(st.integers(-1, 2**32).map(str) | st.text(max_size=3), st.floats(-101, 101)),
    "priority": st.integers(-102, 102),
    "logprobs": st.integers(-1, 21),
    "n": st.integers(0, 17) | st.floats(0, 17),
}
"""Values near what the field takes: what is drawn from anything seldom gets past a type."""


def check_never_another_exception(payload: bytes, content_type: str | None) -> None:
    try:
        parsed = parse_infer(payload, content_type, "m")
    except Refusal as refusal:
        assert refusal.message and "\n" not in refusal.message and len(refusal.message) < 600
        assert CODES[refusal.name] == refusal.code
        assert all(value.isprintable() for value in refusal.headers().values())
    else:
        assert msgspec.json.decode(encode(parsed.fact("r")), type=RequestAccepted) == parsed.fact("r")


@UNHURRIED
@given(st.binary(max_size=200), st.sampled_from([None, MSGPACK]))
def test_any_bytes_give_a_request_or_a_refusal(payload: bytes, content_type: str | None) -> None:
    check_never_another_exception(payload, content_type)


@UNHURRIED
@given(st.dictionaries(FIELDS, ANY_JSON, max_size=5), st.fixed_dictionaries({}, optional=NEAR), st.booleans())
def test_any_fields_give_a_request_or_a_refusal(body: dict[str, Any], near: dict[str, Any], valid_prompt: bool) -> None:
    body = body | near if valid_prompt else near | body
    if valid_prompt:
        body = {key: value for key, value in body.items() if key not in ("messages", "tokens")} | {"prompt": "a"}
    check_never_another_exception(json.dumps(body).encode(), None)
    try:
        packed = msgspec.msgpack.encode(body)
    except (OverflowError, UnicodeEncodeError):
        return
    check_never_another_exception(packed, MSGPACK)


def test_resume_and_request_ids() -> None:
    assert parse_resume(b"", None).reply_to("r") == ReplyTo("r")
    assert parse_resume(b'{"from":3,"stream":false}', None).reply_to("r") == ReplyTo("r", 3, "json", True)
    with pytest.raises(Refusal, match='unknown field "form": did you mean from'):
        parse_resume(b'{"form":3}', None)
    identity = request_id("a", "b")
    assert parse_request_id(identity) == identity
    with pytest.raises(Refusal) as caught:
        parse_request_id(identity.upper())
    assert caught.value.code == 404


def test_models_are_named_in_admin_requests() -> None:
    assert parse_model(b'{"model":"a"}', None, source=False) == ("a", "")
    with pytest.raises(Refusal, match="model is missing"):
        parse_model(b"{}", None, source=False)
    with pytest.raises(Refusal, match="model is missing: name the model"):
        parse_model(b"", None, source=False)


def test_an_added_model_may_name_its_source() -> None:
    for source in ("/shared/models/a", "https://models.example.org/a"):
        assert parse_model(msgspec.json.encode({"model": "a", "source": source}), None, source=True) == ("a", source)
    for wrong in ("models/a", "ftp://x/a", "http://", "", "/a" * 600, 3, "/a\n"):
        with pytest.raises(Refusal, match="source must be an absolute directory"):
            parse_model(msgspec.json.encode({"model": "a", "source": wrong}), None, source=True)
    with pytest.raises(Refusal, match="source"):
        parse_model(b'{"model":"a","source":"/a"}', None, source=False)


def test_a_key_is_read_from_a_body_that_is_wrong_otherwise() -> None:
    assert parse_key(b'{"key":"k","zzz":1}', None) == "k"
    assert parse_key(msgspec.msgpack.encode({"key": "k"}), "application/msgpack") == "k"
    for body in (b"", b"junk", b"[]", b"3", b'"key"', b"{}", b'{"key":3}', b'{"key":""}', b'{"key":null}'):
        assert parse_key(body, None) == ""
    assert parse_key(b'{"key":"k"}', "text/plain") == ""


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_replies_survive_their_encoding(encoding: Any) -> None:
    one = chunk_of("r", 0, [5], ["a"])
    assert one.texts == () and decode_reply(encode_chunk(one, encoding), encoding) == one
    two = chunk_of("r", 1, [5, 6], ["a", ""], end="stop")
    assert two.texts == ("a", "") and two.next == 3 and decode_reply(encode_chunk(two, encoding), encoding) == two
    refused = Refusal("queue_full", "come again", retry_ms=5).status()
    assert decode_reply(encode_reply(refused, encoding), encoding) == refused
    assert isinstance(refused, Status)


def test_bytes_on_the_wire_are_the_documented_ones() -> None:
    assert encode_chunk(chunk_of("r", 0, [5], ["a"])) == b'{"request":"r","position":0,"tokens":[5],"text":"a"}'
    assert encode_reply(Refusal("queue_full", "no", retry_ms=5).status()) == (
        b'{"status":"refused","error":{"code":"queue_full","message":"no","retry_ms":5}}'
    )
    assert error_headers(400, "a\r\nb\x00 é") == {"Nats-Service-Error": "a b? ?", "Nats-Service-Error-Code": "400"}


@pytest.mark.parametrize(
    "payload",
    [b"x", b"{}", b'{"status":"odd"}', b'{"request":"r","position":0,"tokens":[1,2],"text":"ab","texts":["a","c"]}'],
)
def test_what_no_cell_says_is_no_reply(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a reply of a cell"):
        decode_reply(payload)
    with pytest.raises(ValueError, match="position -1"):
        Chunk("r", -1, (), "")


def test_the_document_names_every_field_and_every_refusal() -> None:
    document = (Path(__file__).parents[2] / "docs" / "subjects.md").read_text()
    for name in (*_INFER, *CODES, *get_args(ChunkEnd)):
        assert not name or f"`{name}`" in document, name
