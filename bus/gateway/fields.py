"""Bodies of OpenAI's API: decoded, sorted into what is taken, what does not matter and what is refused by name.

Ranges are checked by `bus.api`, the contract's own check, and told in the words of the body.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bus.answer import RequestFailed
from bus.api import Refusal, parse_infer
from bus.client import PARTS_FROM_BYTES
from bus.gateway.errors import HttpError, bad_field, from_cell
from bus.replies import shown
from bus.subjects import MODEL_NAME_LIMIT

SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop": "stop",
    "stop_token_ids": "stop_tokens",
    "min_tokens": "min_tokens",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "logit_bias": "logit_bias",
    "n": "n",
    "priority": "priority",
    "deadline_ms": "deadline_ms",
}
"""Fields of both forms of completion, and how the contract names them."""

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Fields that change nothing of an answer."""

_SEED_BITS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is not supported: why, and the values under which it asks for nothing."""

    reason: str
    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The fields of one form of body. `own` are read by the form itself, `taken` go to the cell under another name."""

    own: frozenset[str]
    taken: Mapping[str, str]
    refused: Mapping[str, Refused]
    harmless: frozenset[str] = HARMLESS

    def names(self) -> list[str]:
        return [*self.own, *self.taken]

    def back(self) -> dict[str, str]:
        """How the body names the contract's fields."""
        return {contract: name for name, contract in self.taken.items()}


@dataclass(slots=True)
class Asked:
    """One body in the words of the contract: `inputs` are as many requests, each with all of `fields`.

    `logprobs`: an answer shows them. `names` tells how the body names the contract's fields, for sentences.
    """

    model: str
    inputs: list[dict[str, Any]]
    fields: dict[str, Any]
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    names: dict[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> int:
        """How many answers each of the requests has."""
        n = self.fields.get("n", 1)
        return n if isinstance(n, int) else 1


def decode_object(payload: bytes) -> dict[str, Any]:
    """The body as an object. Raises `HttpError`."""
    if not payload:
        raise HttpError(400, "the body is empty: send a JSON object", code="bad_request")
    try:
        body = msgspec.json.decode(payload)
    except UnicodeDecodeError:
        raise HttpError(400, "the body is not JSON: a text in it is not UTF-8", code="bad_request") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply", code="bad_request") from None
    except (msgspec.DecodeError, ValueError, OverflowError) as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="bad_request") from None
    if not isinstance(body, dict):
        raise HttpError(400, f"the body must be a JSON object, got {shown(body)}", code="bad_request")
    return body


def sort_fields(body: dict[str, Any], vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """The form's own fields, and those for the cell under the contract's names. Null counts as absent."""
    own: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in vocabulary.harmless:
            continue
        if name in vocabulary.own:
            own[name] = value
        elif name in vocabulary.taken:
            fields[vocabulary.taken[name]] = value
        elif name in vocabulary.refused:
            refused = vocabulary.refused[name]
            if not any(value == one and type(value) is type(one) for one in refused.neutral):
                raise bad_field(name[:64], f"{name} is not supported: {refused.reason}", code="unsupported_parameter")
        else:
            near = difflib.get_close_matches(name[:64], vocabulary.names(), 1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise bad_field(name[:64], f"unknown field {shown(name)}: {hint}", code="unknown_parameter")
    return own, fields


def model_of(own: Mapping[str, Any]) -> str:
    model = own.get("model")
    if model is None:
        raise bad_field("model", "model is missing: name one of those that GET /v1/models lists")
    if not isinstance(model, str) or not 1 <= len(model) <= MODEL_NAME_LIMIT:
        raise bad_field("model", f"model must be a text of 1 to {MODEL_NAME_LIMIT} characters, got {shown(model)}")
    return model


def flag(own: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = own.get(name, default)
    if not isinstance(value, bool):
        raise bad_field(name, f"{name} must be true or false, got {shown(value)}")
    return value


def whole(own: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = own.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise bad_field(name, f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return value


def include_usage(own: Mapping[str, Any], stream: bool) -> bool:
    """What `stream_options` asks for."""
    options = own.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_field("stream_options", "stream_options may be given with stream true only")
    if not isinstance(options, dict):
        raise bad_field("stream_options", f"stream_options must be an object, got {shown(options)}")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise bad_field("stream_options", f"unknown field stream_options.{shown(name)}: use include_usage")
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise bad_field("stream_options", f"stream_options.include_usage must be true or false, got {shown(value)}")
    return bool(value)


def unsigned_seed(fields: dict[str, Any]) -> None:
    """OpenAI's seeds have a sign, the contract's have none."""
    seed = fields.get("seed")
    if isinstance(seed, int) and not isinstance(seed, bool) and -(1 << 63) <= seed < 0:
        fields["seed"] = seed & _SEED_BITS


def check(asked: Asked) -> None:
    """Check every request as the cell will, so that a refusal names the field. Raises `HttpError`."""
    for one in asked.inputs:
        try:
            # What is large goes to the cell in parts, and its size is no reason to refuse it.
            small = len(msgspec.json.encode(one)) <= PARTS_FROM_BYTES
            parse_infer(msgspec.json.encode(asked.fields | (one if small else {"prompt": "x"})), None, asked.model)
        except Refusal as refusal:
            raise from_cell(RequestFailed(refusal.name, refusal.message), asked.names) from None
        except (UnicodeEncodeError, OverflowError):
            raise HttpError(400, "the body has a text that is not valid Unicode", code="bad_request") from None
