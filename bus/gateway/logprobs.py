"""Log-probabilities as OpenAI shows them: one form for chat, an older one for completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from bus.logprobs import TokenLogprobs
from bus.replies import Chunk


class _Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class _Token(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[_Alternative]


class ChatLogprobs(msgspec.Struct):
    """`logprobs` of a chat completion: one entry for each token. A token that is half a character has an empty text."""

    content: list[_Token]
    refusal: None = None

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> ChatLogprobs:
        return cls(
            [
                _Token(
                    text,
                    entry.logprob,
                    list(text.encode()),
                    [_Alternative(one.text, one.logprob, list(one.text.encode())) for one in entry.alternatives],
                )
                for text, entry in _tokens(chunks)
            ]
        )


class LegacyLogprobs(msgspec.Struct):
    """`logprobs` of the older form. `text_offset` counts characters of the answer; of alternatives with the same text
    the likeliest stays."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], offset: int = 0) -> LegacyLogprobs:
        made = cls([], [], [], [])
        tops: list[dict[str, float]] = []
        for text, entry in _tokens(chunks):
            made.tokens.append(text)
            made.token_logprobs.append(entry.logprob)
            tops.append({one.text: one.logprob for one in reversed(entry.alternatives)})
            made.text_offset.append(offset)
            offset += len(text)
        made.top_logprobs = tops if any(tops) else None
        return made


def _tokens(chunks: Sequence[Chunk]) -> Iterator[tuple[str, TokenLogprobs]]:
    for chunk in chunks:
        texts = chunk.texts or (chunk.text,)
        yield from zip(texts, chunk.logprobs, strict=False)
