"""Embeddings on the wire: the body of `embed.<model>`, its answer, and vectors as bytes and as numbers.

A vector is float32, little endian, wherever it travels as bytes: in pages, in chunks and in answers with `base64`. In
JSON these bytes are base64, in MessagePack they are bytes.
"""

from __future__ import annotations

import secrets
import sys
from array import array
from typing import Any

import msgspec

from bus.api import (
    _INFER,
    _UNCHECKED_BYTES,
    DEFAULT_CLIENT,
    NAME_LIMIT,
    ParsedRequest,
    _bounded_text,
    _changed,
    _decode,
    _fields,
    _whole,
    bad,
    encoding_of,
    parse_infer,
)
from bus.messages.envelope import OUTPUT_LIMIT_BYTES, encode
from bus.messages.requests import INPUTS_LIMIT, Encoding, Generation, Input, RequestAccepted, VectorForm, request_id
from bus.replies import Chunk, ChunkEnd, ErrorBody, Refusal, shown

REPLY_LIMIT_BYTES = 1_000_000
_NUMBER_BYTES = 4
"""No number of a vector is written with fewer, in any encoding."""
_TOKEN = _whole(0, 2**31 - 1)


class PromptCount(msgspec.Struct, frozen=True):
    prompt_tokens: int


class EmbeddingsAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The one answer of `embed` without `stream`: vectors from `position` on, as numbers or as bytes.

    `end` is left out where all went well; otherwise it says why there are fewer vectors than inputs.
    """

    request: str
    embeddings: tuple[Any, ...]
    usage: PromptCount | None = None
    position: int = 0
    end: ChunkEnd = ""
    error: ErrorBody | None = None


def numbers(vector: bytes) -> list[float]:
    """The numbers of a vector.

    >>> numbers(bytes.fromhex("0000803f000020c0"))
    [1.0, -2.5]
    """
    values = array("f")
    values.frombytes(vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _written(vector: bytes) -> list[float]:
    """The numbers with the nine digits that a float32 has: half as long as the double that is nearest to it."""
    return [float(f"{value:.9g}") for value in numbers(vector)]


def encode_answer(chunk: Chunk, form: VectorForm, encoding: Encoding) -> bytes:
    """The one answer that says what this chunk, the whole of an embedding, says; one that is too large says that."""
    usage = PromptCount(chunk.usage.prompt_tokens if chunk.usage is not None else 0)
    size = sum(map(len, chunk.vectors)) // 4 * _NUMBER_BYTES if form == "float" else 0
    if size <= REPLY_LIMIT_BYTES:
        embeddings = tuple(map(_written, chunk.vectors)) if form == "float" else chunk.vectors
        end: ChunkEnd = "" if chunk.end == "stop" else chunk.end
        payload = _encode(
            EmbeddingsAnswer(chunk.request, embeddings, usage, chunk.position, end, chunk.error), encoding
        )
        if len(payload) <= REPLY_LIMIT_BYTES:
            return payload
    better = "with encoding base64, " if form == "float" else ""
    reason = f"the answer takes more than {REPLY_LIMIT_BYTES} bytes: ask {better}with stream true, or for fewer at once"
    error = ErrorBody("too_large", reason)
    return _encode(EmbeddingsAnswer(chunk.request, (), usage, chunk.position, "failed", error), encoding)


def _encode(answer: EmbeddingsAnswer, encoding: Encoding) -> bytes:
    return msgspec.msgpack.encode(answer) if encoding == "msgpack" else msgspec.json.encode(answer)


# ---- requests -----------------------------------------------------------------------------------------------


def _texts(name: str, value: Any) -> tuple[Input, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not 1 <= len(items) <= INPUTS_LIMIT:
        raise bad(f"{name} must be a text or a list of 1 to {INPUTS_LIMIT} texts, got {shown(value)}")
    for number, item in enumerate(items):
        where = name if isinstance(value, str) else f"{name}[{number}]"
        if not isinstance(item, str):
            raise bad(f"{where} must be a text, got {shown(item)}")
        if not item:
            raise bad(f"{where} must not be empty")
        _bounded_text(where, item)
    return tuple(items)


def _token_lists(name: str, value: Any) -> tuple[Input, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= INPUTS_LIMIT:
        raise bad(f"{name} must be a list of 1 to {INPUTS_LIMIT} lists of token ids, got {shown(value)}")
    inputs = []
    for number, item in enumerate(value):
        if not isinstance(item, list) or not item:
            raise bad(f"{name}[{number}] must be a list of at least one token id, got {shown(item)}")
        inputs.append(tuple(_TOKEN(f"{name}[{number}][{place}]", token) for place, token in enumerate(item)))
    return tuple(inputs)


def _form(name: str, value: Any) -> str:
    if value in ("float", "base64"):
        return str(value)
    raise bad(f"{name} must be float or base64, got {shown(value)}")


_EMBED = {
    "input": _texts,
    "tokens": _token_lists,
    "encoding": _form,
    **{name: _INFER[name] for name in ("client", "key", "deadline_ms", "priority", "from", "stream")},
}


def parse_embed(payload: bytes, content_type: str | None, model: str, *, default_key: str = "") -> ParsedRequest:
    """A request for vectors of `model`. Raises `Refusal` and nothing else. Without a `key` as `parse_infer`."""
    encoding = encoding_of(content_type)
    if not 1 <= len(model) <= NAME_LIMIT:
        raise Refusal("unknown_model", f"a model's name has 1 to {NAME_LIMIT} characters, got {len(model)}")
    values = _fields(payload, encoding, _EMBED)
    given = [name for name in ("input", "tokens") if name in values]
    if len(given) != 1:
        raise bad(f"give exactly one of input and tokens, got {' and '.join(given) or 'none of them'}")
    inputs = values[given[0]]
    client = values.get("client", DEFAULT_CLIENT)
    key = values.get("key") or default_key or secrets.token_hex(16)
    request = request_id(client, key)
    generation = Generation(max_tokens=len(inputs), inputs=inputs)
    fact = RequestAccepted(
        request,
        client,
        key,
        model,
        generation,
        deadline_ms=values.get("deadline_ms", 0),
        **_changed(values, {"priority": 0}),
    )
    if len(payload) > _UNCHECKED_BYTES and (size := len(encode(fact)) + 1024) > OUTPUT_LIMIT_BYTES:
        raise Refusal("too_large", f"the request takes {size} bytes as JSON, at most {OUTPUT_LIMIT_BYTES} are taken")
    return ParsedRequest(
        fact, values.get("from", 0), values.get("stream", False), encoding, form=values.get("encoding", "float")
    )


def parse_submitted(payload: bytes, content_type: str | None, model: str, *, default_key: str = "") -> ParsedRequest:
    """A body of `submit`: one with `input`, or with lists of tokens, asks for vectors, any other for an answer."""
    body = _decode(payload, encoding_of(content_type))
    tokens = body.get("tokens") if isinstance(body, dict) else None
    listed = isinstance(tokens, list) and bool(tokens) and isinstance(tokens[0], list)
    vectors = listed or (isinstance(body, dict) and "input" in body)
    parse = parse_embed if vectors else parse_infer
    return parse(payload, content_type, model, default_key=default_key)
