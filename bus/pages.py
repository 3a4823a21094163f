"""The wire format of TOKENS: what one worker appends to the subject of its epoch, one page per decode step.

The seal that recovery appends to the same subject is the last record there: the old writer is refused from then on.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bus.logprobs import TokenLogprobs
from bus.messages.envelope import Count, Name, Positive

PageEnd = Literal["", "stop", "length", "cancelled", "deadline", "handed-over", "failed"]
"""How a sequence ended with this page; empty while it goes on."""


class PageSequence(msgspec.Struct, frozen=True, omit_defaults=True):
    """The positions [position, position + len(tokens)) of one attempt of one request.

    `texts` holds the piece of text of each token (possibly empty), `logprobs` one entry for each where the request asks
    for them; `prompt_tokens` stands where `end` does.
    Of an embedding, position i is input i: its token is the number of tokens of the input, its text is empty, and
    `vectors` has its vector (float32, little endian).
    """

    request: Name
    attempt: Positive
    position: Count
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    end: PageEnd = ""
    prompt_tokens: Count = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    vectors: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.texts):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.texts)} texts")
        if self.logprobs and len(self.logprobs) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.logprobs)} logprobs")
        if self.vectors and len(self.vectors) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.vectors)} vectors")


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One decode step of one worker. Pages of an epoch count without holes."""

    page: Count
    sequences: tuple[PageSequence, ...]


class Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of an epoch's subject, appended by whoever recovers it; `by` names that process."""

    seal: Literal[True]
    by: Annotated[str, Meta(max_length=200)]


class _Record(msgspec.Struct, frozen=True):
    """Only the field that tells a seal from a page."""

    seal: bool = False


_encoder = msgspec.json.Encoder()
_record = msgspec.json.Decoder(_Record)
_page = msgspec.json.Decoder(Page)
_seal = msgspec.json.Decoder(Seal)


def encode_page(page: Page | Seal) -> bytes:
    return _encoder.encode(page)


def decode_page(payload: bytes) -> Page | Seal:
    """Raises ValueError, in one sentence, where the payload is neither a page nor a seal."""
    try:
        if payload.startswith(b'{"page":'):
            return _page.decode(payload)
        return _seal.decode(payload) if _record.decode(payload).seal else _page.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a page of tokens: {error}") from None
