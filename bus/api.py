"""The client contract, inward: from the bytes of a request to a fact, or to one sentence that says why not.

Any bytes give a `ParsedRequest` or a `Refusal`, never another exception, and nothing that was not asked for: unknown
fields are refused. `docs/subjects.md` states the same contract for any language.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from bus.logprobs import ALTERNATIVES_LIMIT
from bus.messages.envelope import OUTPUT_LIMIT_BYTES, encode
from bus.messages.requests import (
    CHOICES_LIMIT,
    PRIORITY_LIMIT,
    PROMPT_LIMIT_BYTES,
    TOKENS_LIMIT,
    ChatMessage,
    Encoding,
    Generation,
    PromptParts,
    ReplyTo,
    RequestAccepted,
    VectorForm,
    request_id,
)
from bus.part_limits import PARTS_LIMIT
from bus.replies import (
    MSGPACK_TYPE,
    Chunk,
    ErrorBody,
    Refusal,
    Result,
    Status,
    TokenCounts,
    accepted,
    chunk_of,
    decode_reply,
    encode_chunk,
    encode_reply,
    reply_headers,
    shown,
    unknown,
)

DEFAULT_MAX_TOKENS = 256
DEFAULT_CLIENT = "anonymous"
NAME_LIMIT = 200
ADDRESS_LIMIT = 1024
_ADDRESS = re.compile(r"(/|https?://[^/\s])")
STOP_LIMIT = 8
STOP_LENGTH_LIMIT = 256
STOP_TOKENS_LIMIT = 32
BIAS_ENTRIES_LIMIT = 300
BIAS_LIMIT = 100
REPETITION_LIMIT = 10
PENALTY_LIMIT = 2
TOKEN_LIMIT = 2**31 - 1
SEED_LIMIT = 2**63 - 1
POSITION_LIMIT = 2**53
DEADLINE_LIMIT_MS = 31 * 24 * 3600 * 1000
TEMPERATURE_LIMIT = 100
_UNCHECKED_BYTES = OUTPUT_LIMIT_BYTES // 8
"""A body up to this size makes a fact below the limit however it is written: no byte grows to more than six."""
_REQUEST_ID = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A valid request. `start`, `stream`, `encoding` and `form` say what its reader wants to see."""

    accepted: RequestAccepted
    start: int
    stream: bool
    encoding: Encoding
    form: VectorForm = ""

    @property
    def request(self) -> str:
        return self.accepted.request

    def fact(self, reply_subject: str) -> RequestAccepted:
        """The fact to append; an empty subject stands for a request without a reader."""
        if not reply_subject:
            return self.accepted
        form: VectorForm = "" if self.stream else self.form
        reply = ReplyTo(reply_subject, self.start, self.encoding, not self.stream, form)
        return msgspec.structs.replace(self.accepted, reply=reply)


@dataclass(frozen=True, slots=True)
class ParsedResume:
    """From which position a reader wants to see a request, and how."""

    start: int
    stream: bool
    encoding: Encoding

    def reply_to(self, reply_subject: str) -> ReplyTo:
        return ReplyTo(reply_subject, self.start, self.encoding, not self.stream)


def bad(message: str) -> Refusal:
    return Refusal("bad_request", message)


def encoding_of(content_type: str | None) -> Encoding:
    """The encoding that a Content-Type header names; JSON where there is none."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind in ("", "application/json", "text/json"):
        return "json"
    if kind in (MSGPACK_TYPE, "application/x-msgpack", "application/vnd.msgpack"):
        return "msgpack"
    raise bad(f"Content-Type must be application/json or {MSGPACK_TYPE}, got {shown(kind)}")


# ---- fields -------------------------------------------------------------------------------------------------

Check = Callable[[str, Any], Any]


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise bad(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")

    return check


def _real(low: float, high: float, *, above: bool = False) -> Check:
    span = f"above {low} and at most {high}" if above else f"from {low} to {high}"

    def check(name: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and low <= value <= high and (value > low or not above):
            return float(value)
        raise bad(f"{name} must be a number {span}, got {shown(value)}")

    return check


def _name(name: str, value: Any) -> str:
    if isinstance(value, str) and 1 <= len(value) <= NAME_LIMIT and "\0" not in value:
        return value
    raise bad(f"{name} must be a text of 1 to {NAME_LIMIT} characters without a zero byte, got {shown(value)}")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise bad(f"{name} must be true or false, got {shown(value)}")


def _bounded_text(name: str, value: str) -> str:
    size = len(value.encode())
    if size > PROMPT_LIMIT_BYTES:
        raise Refusal("too_large", f"{name} has {size} bytes, at most {PROMPT_LIMIT_BYTES} are taken")
    return value


def _prompt(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad(f"{name} must be a text, got {shown(value)}")
    if not value:
        raise bad(f"{name} must not be empty")
    return _bounded_text(name, value)


def _messages(name: str, value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise bad(f"{name} must be a list of at least one {{role, content}}, got {shown(value)}")
    messages = []
    for i, item in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise bad(f"{where} must have exactly the fields role and content, got {shown(item)}")
        role, content = item["role"], item["content"]
        if not isinstance(role, str) or not 1 <= len(role) <= 64:
            raise bad(f"{where}.role must be a text of 1 to 64 characters, got {shown(role)}")
        if not isinstance(content, str):
            raise bad(f"{where}.content must be a text, got {shown(content)}")
        messages.append(ChatMessage(role, _bounded_text(f"{where}.content", content)))
    return tuple(messages)


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise bad(f"{name} must be a list of at least one token id, got {shown(value)}")
    check = _whole(0, TOKEN_LIMIT)
    return tuple(check(f"{name}[{i}]", token) for i, token in enumerate(value))


def _stop_item(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= STOP_LENGTH_LIMIT


def _stop(name: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list) and len(items) <= STOP_LIMIT and all(map(_stop_item, items)):
        return tuple(items)
    raise bad(
        f"{name} must be a text or a list of at most {STOP_LIMIT} texts, each of 1 to {STOP_LENGTH_LIMIT} "
        f"characters, got {shown(value)}"
    )


def _stop_tokens(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > STOP_TOKENS_LIMIT:
        raise bad(f"{name} must be a list of at most {STOP_TOKENS_LIMIT} token ids, got {shown(value)}")
    check = _whole(0, TOKEN_LIMIT)
    return tuple(sorted({check(f"{name}[{i}]", token) for i, token in enumerate(value)}))


def _bias_token(name: str, key: Any) -> int:
    """A token id as a key: MessagePack has whole numbers there, JSON decimal text."""
    if isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdigit() and str(int(key)) == key:
        key = int(key)
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key <= TOKEN_LIMIT:
        return key
    raise bad(f"{name} must have token ids from 0 to {TOKEN_LIMIT} as keys, got {shown(key)}")


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > BIAS_ENTRIES_LIMIT:
        what = f"an object of at most {BIAS_ENTRIES_LIMIT} token ids with numbers"
        raise bad(f"{name} must be {what}, got {shown(value)}")
    check = _real(-BIAS_LIMIT, BIAS_LIMIT)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token = _bias_token(name, key)
        if token in biases:
            raise bad(f"{name} has token id {token} twice")
        biases[token] = check(f"{name}[{token}]", bias)
    return tuple(sorted(biases.items()))


def _prompt_parts(name: str, value: Any) -> PromptParts:
    try:
        return msgspec.convert(value, PromptParts)
    except msgspec.ValidationError as error:
        raise bad(
            f"{name} must be {{upload, count, digest, form?}}, with a count of 1 to {PARTS_LIMIT} and a digest of 64 "
            f"hexadecimal digits: {error}"
        ) from None


_INFER: dict[str, Check] = {
    "prompt": _prompt,
    "messages": _messages,
    "tokens": _tokens,
    "max_tokens": _whole(1, TOKENS_LIMIT),
    "temperature": _real(0, TEMPERATURE_LIMIT),
    "top_p": _real(0, 1, above=True),
    "top_k": _whole(0, TOKEN_LIMIT),
    "seed": _whole(0, SEED_LIMIT),
    "stop": _stop,
    "stop_tokens": _stop_tokens,
    "min_tokens": _whole(0, TOKENS_LIMIT),
    "repetition_penalty": _real(0, REPETITION_LIMIT, above=True),
    "presence_penalty": _real(-PENALTY_LIMIT, PENALTY_LIMIT),
    "frequency_penalty": _real(-PENALTY_LIMIT, PENALTY_LIMIT),
    "logit_bias": _logit_bias,
    "logprobs": _whole(0, ALTERNATIVES_LIMIT),
    "n": _whole(1, CHOICES_LIMIT),
    "priority": _whole(-PRIORITY_LIMIT, PRIORITY_LIMIT),
    "client": _name,
    "key": _name,
    "deadline_ms": _whole(0, DEADLINE_LIMIT_MS),
    "from": _whole(0, POSITION_LIMIT),
    "stream": _flag,
    "prompt_parts": _prompt_parts,
}
_RESUME: dict[str, Check] = {"from": _INFER["from"], "stream": _flag}


def _address(name: str, value: Any) -> str:
    if isinstance(value, str) and 1 <= len(value) <= ADDRESS_LIMIT and value.isprintable() and _ADDRESS.match(value):
        return value
    raise bad(f"{name} must be an absolute directory or an http(s) address, got {shown(value)}")


_MODEL: dict[str, Check] = {"model": _name}
_ADDED_MODEL: dict[str, Check] = {"model": _name, "source": _address}
_WARMED_MODEL: dict[str, Check] = {"model": _name, "server": _name}


def _decode(payload: bytes, encoding: Encoding) -> Any:
    if len(payload) > OUTPUT_LIMIT_BYTES:
        raise Refusal("too_large", f"the body has {len(payload)} bytes, at most {OUTPUT_LIMIT_BYTES} are taken")
    name = "MessagePack" if encoding == "msgpack" else "JSON"
    if not payload:
        raise bad(f"the body is empty: send {name} with a prompt")
    try:
        return msgspec.msgpack.decode(payload) if encoding == "msgpack" else msgspec.json.decode(payload)
    except UnicodeDecodeError:
        raise bad(f"the body is not {name}: a text in it is not UTF-8") from None
    except RecursionError:
        raise bad("the body is nested too deeply") from None
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
        raise bad(f"the body is not {name}: {error}") from None


def _fields(payload: bytes, encoding: Encoding, checks: dict[str, Check]) -> dict[str, Any]:
    """The checked fields of a body; a field that is null counts as absent."""
    body = _decode(payload, encoding)
    if not isinstance(body, dict):
        raise bad(f"the body must be an object with fields, got {shown(body)}")
    values: dict[str, Any] = {}
    for name, value in body.items():
        check = checks.get(name) if isinstance(name, str) else None
        if check is None:
            raise bad(_unknown_field(name, checks))
        if value is not None:
            values[name] = check(name, value)
    return values


def _unknown_field(name: object, checks: dict[str, Check]) -> str:
    near = difflib.get_close_matches(name[:64], checks, 1) if isinstance(name, str) else []
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(checks)}"
    return f"unknown field {shown(name)}: {hint}"


# ---- requests -----------------------------------------------------------------------------------------------


def parse_infer(payload: bytes, content_type: str | None, model: str, *, default_key: str = "") -> ParsedRequest:
    """A request for `model` (its name, not escaped). Raises `Refusal` and nothing else.

    Without a `key` it gets `default_key`, or a random one. Without a `seed` it gets one that follows from the request
    id: a repeat gets the same, another request another.
    """
    encoding = encoding_of(content_type)
    if not 1 <= len(model) <= NAME_LIMIT:
        raise Refusal("unknown_model", f"a model's name has 1 to {NAME_LIMIT} characters, got {len(model)}")
    values = _fields(payload, encoding, _INFER)
    inputs = [name for name in ("prompt", "messages", "tokens", "prompt_parts") if name in values]
    if len(inputs) != 1:
        got = " and ".join(inputs) or "none of them"
        raise bad(f"give exactly one of prompt, messages, tokens and prompt_parts, got {got}")
    client = values.get("client", DEFAULT_CLIENT)
    key = values.get("key") or default_key or secrets.token_hex(16)
    request = request_id(client, key)
    generation = Generation(
        max_tokens=values.get("max_tokens", DEFAULT_MAX_TOKENS),
        prompt=values.get("prompt"),
        messages=values.get("messages"),
        tokens=values.get("tokens"),
        parts=values.get("prompt_parts"),
        temperature=values.get("temperature", -1.0),
        top_p=values.get("top_p", -1.0),
        top_k=values.get("top_k", -1),
        seed=values.get("seed", int(request[:12], 16)),
        stop=values.get("stop", ()),
        **_changed(values, _LATER_FIELDS),
    )
    if generation.min_tokens > generation.max_tokens:
        raise bad(f"min_tokens must be at most max_tokens, {generation.max_tokens}, got {generation.min_tokens}")
    fact = RequestAccepted(
        request, client, key, model, generation, deadline_ms=values.get("deadline_ms", 0), **_changed(values, _PRIORITY)
    )
    if len(payload) > _UNCHECKED_BYTES and (size := len(encode(fact)) + 1024) > OUTPUT_LIMIT_BYTES:
        raise Refusal("too_large", f"the request takes {size} bytes as JSON, at most {OUTPUT_LIMIT_BYTES} are taken")
    return ParsedRequest(fact, values.get("from", 0), values.get("stream", True), encoding)


_LATER_FIELDS = {
    "min_tokens": 0,
    "stop_tokens": (),
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": (),
    "logprobs": -1,
    "n": 1,
}
_PRIORITY = {"priority": 0}


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields that say something other than their default: whoever states a default says nothing, to the byte."""
    return {name: values[name] for name, default in defaults.items() if values.get(name, default) != default}


def parse_resume(payload: bytes, content_type: str | None) -> ParsedResume:
    """The body of `resume.<request>`; an empty one asks for everything. Raises `Refusal` and nothing else."""
    encoding = encoding_of(content_type)
    values = _fields(payload, encoding, _RESUME) if payload else {}
    return ParsedResume(values.get("from", 0), values.get("stream", True), encoding)


def parse_request_id(token: str) -> str:
    """The request that the last token of a subject names."""
    if _REQUEST_ID.match(token):
        return token
    raise Refusal("unknown_request", f"a request id has 32 hexadecimal digits, got {shown(token)}")


def parse_model(payload: bytes, content_type: str | None, *, source: bool) -> tuple[str, str]:
    """The model that the body of `admin.model.add` or `admin.model.remove` names, and where it can be fetched: only
    where a `source` may be given, and empty where none is."""
    fields = _fields(payload, encoding_of(content_type), _ADDED_MODEL if source else _MODEL) if payload else {}
    model = fields.get("model")
    if model is None:
        raise bad("model is missing: name the model")
    return str(model), str(fields.get("source", ""))


def parse_warm(payload: bytes, content_type: str | None) -> tuple[str, str]:
    """The model that the body of `admin.model.warm` names, and the server; empty where it names none."""
    fields = _fields(payload, encoding_of(content_type), _WARMED_MODEL) if payload else {}
    if "model" not in fields:
        raise bad("model is missing: name the model")
    return str(fields["model"]), str(fields.get("server", ""))


def parse_key(payload: bytes, content_type: str | None) -> str:
    """The key that a body names, whatever else is wrong with it; empty where it has none that is valid."""
    try:
        body = _decode(payload, encoding_of(content_type))
        return _name("key", body["key"])
    except (Refusal, LookupError, TypeError):
        return ""


__all__ = [
    "Chunk",
    "ErrorBody",
    "ParsedRequest",
    "ParsedResume",
    "Refusal",
    "Result",
    "Status",
    "TokenCounts",
    "accepted",
    "chunk_of",
    "decode_reply",
    "encode_chunk",
    "encode_reply",
    "encoding_of",
    "parse_infer",
    "parse_key",
    "parse_model",
    "parse_request_id",
    "parse_resume",
    "reply_headers",
    "unknown",
]
