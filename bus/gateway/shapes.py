"""What OpenAI's clients read: whole answers, and the events of streams.

What repeats in every event of a stream is encoded once; an event costs the encoding of its text and one join.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from bus.gateway.logprobs import ChatLogprobs, LegacyLogprobs
from bus.replies import Chunk, TokenCounts

DONE = b"data: [DONE]\n\n"
ALIVE = b": the answer goes on\n\n"
_encode = msgspec.json.Encoder().encode


class Choice:
    """One answer as far as it has come. `reason` is empty while it goes on; `offset` counts characters so far."""

    __slots__ = ("chunks", "index", "offset", "opened", "reason")

    def __init__(self, index: int) -> None:
        self.index = index
        self.offset = 0
        self.opened = False
        self.reason = ""
        self.chunks: list[Chunk] = []


class Shape(Protocol):
    """One form of completion."""

    def opening(self, choice: Choice) -> bytes:
        """The event that begins a choice; empty where the form has none."""
        ...

    def piece(self, choice: Choice, chunk: Chunk) -> bytes:
        """The event of more text."""
        ...

    def ending(self, choice: Choice, reason: str) -> bytes:
        """The event that ends a choice."""
        ...

    def usage(self, counts: TokenCounts) -> bytes:
        """The event with the usage, the last one before `DONE`."""
        ...

    def whole(self, choices: Sequence[Choice], counts: TokenCounts) -> bytes:
        """The whole answer."""
        ...


def usage_object(counts: TokenCounts) -> dict[str, int]:
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }


class _Events:
    """The envelope that all events of one stream share."""

    def __init__(self, prefix: str, kind: str, stream_kind: str, request: str, model: str, *, with_usage: bool) -> None:
        self.head = {"id": f"{prefix}-{request}", "object": kind, "created": int(time.time()), "model": model}
        self._before = b"data: " + _encode(self.head | {"object": stream_kind})[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def event(self, *parts: bytes) -> bytes:
        return b"".join((self._before, *parts, self._after))

    def with_usage(self, counts: TokenCounts) -> bytes:
        return self._before + b'],"usage":' + _encode(usage_object(counts)) + b"}\n\n"

    def whole(self, choices: list[dict[str, Any]], counts: TokenCounts) -> bytes:
        return _encode(self.head | {"choices": choices, "usage": usage_object(counts)})


class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, request: str, model: str, *, with_usage: bool = False, logprobs: bool = False) -> None:
        self._events = _Events(
            "chatcmpl", "chat.completion", "chat.completion.chunk", request, model, with_usage=with_usage
        )
        self._logprobs = logprobs

    def opening(self, choice: Choice) -> bytes:
        return self._events.event(
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            % choice.index
        )

    def piece(self, choice: Choice, chunk: Chunk) -> bytes:
        return self._events.event(
            b'{"index":%d,"delta":{"content":' % choice.index,
            _encode(chunk.text),
            b'},"logprobs":',
            _encode(ChatLogprobs.of([chunk])) if self._logprobs else b"null",
            b',"finish_reason":null}',
        )

    def ending(self, choice: Choice, reason: str) -> bytes:
        return self._events.event(
            b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":' % choice.index, _encode(reason), b"}"
        )

    def usage(self, counts: TokenCounts) -> bytes:
        return self._events.with_usage(counts)

    def whole(self, choices: Sequence[Choice], counts: TokenCounts) -> bytes:
        return self._events.whole(
            [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": _text(choice), "refusal": None},
                    "logprobs": ChatLogprobs.of(choice.chunks) if self._logprobs else None,
                    "finish_reason": choice.reason,
                }
                for choice in choices
            ],
            counts,
        )


class CompletionShape:
    """`text_completion`, whole and in events."""

    def __init__(self, request: str, model: str, *, with_usage: bool = False, logprobs: bool = False) -> None:
        self._events = _Events("cmpl", "text_completion", "text_completion", request, model, with_usage=with_usage)
        self._logprobs = logprobs

    def opening(self, choice: Choice) -> bytes:
        return b""

    def piece(self, choice: Choice, chunk: Chunk) -> bytes:
        offset, choice.offset = choice.offset, choice.offset + len(chunk.text)
        return self._events.event(
            b'{"index":%d,"text":' % choice.index,
            _encode(chunk.text),
            b',"logprobs":',
            _encode(LegacyLogprobs.of([chunk], offset)) if self._logprobs else b"null",
            b',"finish_reason":null}',
        )

    def ending(self, choice: Choice, reason: str) -> bytes:
        return self._events.event(
            b'{"index":%d,"text":"","logprobs":null,"finish_reason":' % choice.index, _encode(reason), b"}"
        )

    def usage(self, counts: TokenCounts) -> bytes:
        return self._events.with_usage(counts)

    def whole(self, choices: Sequence[Choice], counts: TokenCounts) -> bytes:
        return self._events.whole(
            [
                {
                    "index": choice.index,
                    "text": _text(choice),
                    "logprobs": LegacyLogprobs.of(choice.chunks) if self._logprobs else None,
                    "finish_reason": choice.reason,
                }
                for choice in choices
            ],
            counts,
        )


def _text(choice: Choice) -> str:
    return "".join(chunk.text for chunk in choice.chunks)
