"""The body of `/v1/chat/completions` in the words of the contract."""

from __future__ import annotations

from typing import Any

from bus.gateway.errors import bad_field
from bus.gateway.fields import (
    SAMPLING,
    Asked,
    Refused,
    Vocabulary,
    check,
    flag,
    include_usage,
    model_of,
    sort_fields,
    unsigned_seed,
)
from bus.replies import shown

_NO_TOOLS = "the model is not asked to call tools"
_TEXT_ONLY = "answers are text"

VOCABULARY = Vocabulary(
    own=frozenset(
        {"model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options"}
        | {"logprobs", "top_logprobs"}
    ),
    taken=SAMPLING,
    refused={
        "tools": Refused(_NO_TOOLS, ([],)),
        "tool_choice": Refused(_NO_TOOLS, ("none", "auto")),
        "functions": Refused(_NO_TOOLS, ([],)),
        "function_call": Refused(_NO_TOOLS, ("none", "auto")),
        "response_format": Refused('only {"type": "text"} is', ({"type": "text"},)),
        "modalities": Refused(_TEXT_ONLY, (["text"],)),
        "audio": Refused(_TEXT_ONLY),
        "prediction": Refused("leave it out"),
        "reasoning_effort": Refused("leave it out", ("none",)),
        "verbosity": Refused("leave it out", ("medium",)),
        "web_search_options": Refused("the model has no access to the web"),
        "moderation": Refused("leave it out"),
    },
)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Roles as clients write them, and as chat templates know them."""

_IGNORED_OF_MESSAGE = frozenset({"name", "tool_call_id"})
_REFUSED_OF_MESSAGE = {"tool_calls": _NO_TOOLS, "function_call": _NO_TOOLS, "audio": _TEXT_ONLY, "refusal": _TEXT_ONLY}


def parse_chat(body: dict[str, Any]) -> Asked:
    """Raises `HttpError` for whatever cannot be taken. Without a limit, `fields` has no `max_tokens`."""
    own, fields = sort_fields(body, VOCABULARY)
    model = model_of(own)
    if "messages" not in own:
        raise bad_field("messages", "messages is missing: send a list of {role, content}")
    names = VOCABULARY.back() | {"messages": "messages", "logprobs": "top_logprobs"}
    fields |= _limit(own, names) | _logprobs(own)
    unsigned_seed(fields)
    stream = flag(own, "stream")
    inputs = [{"messages": _messages(own["messages"])}]
    asked = Asked(model, inputs, fields, stream, include_usage(own, stream), "logprobs" in fields, names)
    check(asked)
    return asked


def _limit(own: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """`max_completion_tokens`, or `max_tokens` as it was called before."""
    given = [name for name in ("max_completion_tokens", "max_tokens") if name in own]
    if len(given) == 2 and own[given[0]] != own[given[1]]:
        raise bad_field("max_tokens", "max_tokens and max_completion_tokens differ: give one of them")
    names["max_tokens"] = given[0] if given else "max_completion_tokens"
    return {"max_tokens": own[given[0]]} if given else {}


def _logprobs(own: dict[str, Any]) -> dict[str, Any]:
    """`logprobs` asks for them, `top_logprobs` for so many alternatives beside."""
    wanted = flag(own, "logprobs")
    if "top_logprobs" in own and not wanted:
        raise bad_field("top_logprobs", "top_logprobs may be given with logprobs true only")
    return {"logprobs": own.get("top_logprobs", 0)} if wanted else {}


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise bad_field("messages", f"messages must be a list of at least one {{role, content}}, got {shown(value)}")
    return [_message(f"messages[{i}]", item) for i, item in enumerate(value)]


def _message(where: str, item: Any) -> dict[str, str]:
    if not isinstance(item, dict):
        raise bad_field(where, f"{where} must be an object with role and content, got {shown(item)}")
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_field(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}, got {shown(role)}")
    for name, value in item.items():
        if name in ("role", "content") or value is None or value == [] or name in _IGNORED_OF_MESSAGE:
            continue
        reason = _REFUSED_OF_MESSAGE.get(name)
        if reason is None:
            raise bad_field(where, f"unknown field {shown(name)} in {where}: known are role, content and name")
        raise bad_field(f"{where}.{name}", f"{where}.{name} is not supported: {reason}", code="unsupported_parameter")
    return {"role": _ROLES[role], "content": _content(f"{where}.content", item.get("content"))}


def _content(where: str, value: Any) -> str:
    """A text, or its parts with a line break between them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise bad_field(where, f"{where} must be a text or a list of text parts, got {shown(value)}")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise bad_field(
                f"{where}[{i}]",
                f'{where}[{i}] must be {{"type": "text", "text": ...}}, got {shown(kind or part)}: '
                "images, audio and files are not supported",
                code="unsupported_parameter" if isinstance(kind, str) else "bad_request",
            )
        if not isinstance(part.get("text"), str):
            raise bad_field(f"{where}[{i}].text", f"{where}[{i}].text must be a text, got {shown(part.get('text'))}")
        texts.append(part["text"])
    return "\n".join(texts)
