"""The body of `/v1/completions` (the older form: a prompt instead of messages) in the words of the contract."""

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

DEFAULT_MAX_TOKENS = 16
"""As OpenAI's."""
PROMPTS_LIMIT = 64

VOCABULARY = Vocabulary(
    own=frozenset({"model", "prompt", "stream", "stream_options", "best_of"}),
    taken=SAMPLING | {"max_tokens": "max_tokens", "logprobs": "logprobs"},
    refused={
        "suffix": Refused("models here do not fill in"),
        "echo": Refused("the prompt is not repeated in the answer", (False,)),
    },
)


def parse_completion(body: dict[str, Any]) -> Asked:
    """Raises `HttpError` for whatever cannot be taken."""
    own, fields = sort_fields(body, VOCABULARY)
    model = model_of(own)
    if "prompt" not in own:
        raise bad_field("prompt", "prompt is missing: send a text")
    names = VOCABULARY.back() | {"prompt": "prompt", "tokens": "prompt"}
    fields.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    unsigned_seed(fields)
    if own.get("best_of", fields.get("n", 1)) != fields.get("n", 1):
        raise bad_field(
            "best_of", "best_of is not supported: ask for several answers with n", code="unsupported_parameter"
        )
    stream = flag(own, "stream")
    inputs = _prompts(own["prompt"])
    asked = Asked(model, inputs, fields, stream, include_usage(own, stream), "logprobs" in fields, names)
    check(asked)
    return asked


def _prompts(value: Any) -> list[dict[str, Any]]:
    """A text, a list of texts, a list of token ids, or a list of such lists: one request for each prompt."""
    if isinstance(value, str):
        return [{"prompt": value}]
    if not isinstance(value, list) or not value:
        raise bad_field("prompt", f"prompt must be a text, token ids, or a list of either, got {shown(value)}")
    if all(isinstance(one, int) for one in value):
        return [{"tokens": value}]
    if len(value) > PROMPTS_LIMIT:
        raise bad_field("prompt", f"prompt is a list of {len(value)}, at most {PROMPTS_LIMIT} are taken")
    if all(isinstance(one, str) for one in value):
        return [{"prompt": one} for one in value]
    if all(isinstance(one, list) for one in value):
        return [{"tokens": one} for one in value]
    raise bad_field("prompt", f"prompt must be a text, token ids, or a list of either, got {shown(value)}")
