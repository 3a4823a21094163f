"""What a cell answers its clients: the bytes on a reply subject, made and read in one place.

Three things travel there. A `Status` comes first (accepted, refused, unknown), `Chunk`s follow, and one empty
message ends a stream. A `Result` answers `result.<request>` alone. A chunk may overtake the `Status`: whoever sees one
knows that the request was accepted. Both encodings carry the same fields; absent ones have their default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bus.logprobs import TokenLogprobs
from bus.messages.requests import CHOICES_LIMIT, Encoding

MSGPACK_TYPE = "application/msgpack"
ERROR_HEADER = "Nats-Service-Error"
ERROR_CODE_HEADER = "Nats-Service-Error-Code"
REASON_LIMIT = 300
"""Longest sentence, in characters, that is copied into a header."""

ChunkEnd = Literal["", "stop", "length", "cancelled", "deadline", "failed", "quarantined"]
CODES = {
    "bad_request": 400,
    "unknown_model": 404,
    "unknown_request": 404,
    "unknown_parts": 404,
    "key_reused": 409,
    "too_large": 413,
    "queue_full": 429,
    "not_ready": 503,
    "ledger_full": 503,
}
"""Every name under which a request is refused, with the number in the header."""


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """`code` is a name of `CODES` or of a failure; `message` one sentence; `retry_ms` when to come again, if ever."""

    code: str
    message: str
    retry_ms: int = 0


class TokenCounts(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """Positions [position, position + len(tokens)) of one answer, and how it ended if these are the last ones.

    `texts` has the piece of each token wherever there is more than one token, so that readers can cut a chunk; the
    pieces make up `text`. `logprobs` has one entry for each token where the request asks for them. `choice`: which
    answer of a request that asks for several; where one of them ends, `n` says how many there are. Of an embedding,
    `vectors` has one for each position, and a token is the number of tokens of that input.
    """

    request: str
    position: int
    tokens: tuple[int, ...]
    text: str
    texts: tuple[str, ...] = ()
    end: ChunkEnd = ""
    usage: TokenCounts | None = None
    error: ErrorBody | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    choice: Annotated[int, Meta(ge=0, lt=CHOICES_LIMIT)] = 0
    n: Annotated[int, Meta(ge=1, le=CHOICES_LIMIT)] = 1
    vectors: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.vectors and len(self.vectors) != len(self.tokens):
            raise ValueError("vectors are not one for each input")
        if self.logprobs and len(self.logprobs) != len(self.tokens):
            raise ValueError("logprobs are not one entry for each token")
        if self.position < 0:
            raise ValueError(f"position {self.position} is below 0")
        if self.texts and (len(self.texts) != len(self.tokens) or "".join(self.texts) != self.text):
            raise ValueError("texts are not the pieces of text, one for each token")

    @property
    def next(self) -> int:
        """The position after the last one."""
        return self.position + len(self.tokens)


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first reply. `unknown`: whether it was accepted is open; repeat it with the same key."""

    status: Literal["accepted", "refused", "unknown"]
    request: str = ""
    error: ErrorBody | None = None


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a request: `running` with its durable positions, or `ended` with the whole answer.

    Of a request with several answers `positions` and `usage` count all of them, and `choices` has them, each as one
    chunk (while it runs: how far each is).
    """

    status: Literal["running", "ended"]
    request: str
    positions: int = 0
    end: ChunkEnd = ""
    text: str = ""
    tokens: tuple[int, ...] = ()
    usage: TokenCounts | None = None
    error: ErrorBody | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    choices: tuple[Chunk, ...] = ()
    vectors: tuple[bytes, ...] = ()


class WholeAnswers(msgspec.Struct, frozen=True, omit_defaults=True):
    """All answers of a request that asks for several, in one message, each as one chunk from `from` on."""

    request: str
    choices: tuple[Chunk, ...]
    usage: TokenCounts | None = None
    error: ErrorBody | None = None


Reply = Chunk | Status | Result | WholeAnswers


class Refusal(Exception):
    """A request that is not taken: `code` for machines (400 to 599), `name` of `CODES`, one sentence for people."""

    def __init__(self, name: str, message: str, *, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.name = name
        self.code = CODES[name]
        self.message = message
        self.retry_ms = retry_ms

    def status(self, request: str = "") -> Status:
        return Status("refused", request, ErrorBody(self.name, self.message, self.retry_ms))

    def headers(self) -> dict[str, str]:
        return error_headers(self.code, self.message)


def error_headers(code: int, message: str) -> dict[str, str]:
    """The headers of the NATS services convention, in printable characters only."""
    line = " ".join(message.split()).encode("ascii", "replace").decode()
    line = "".join(c if c.isprintable() else "?" for c in line)[:REASON_LIMIT]
    return {ERROR_HEADER: line, ERROR_CODE_HEADER: str(code)}


def accepted(request: str) -> Status:
    return Status("accepted", request)


def unknown(request: str, message: str, *, retry_ms: int = 0) -> Status:
    """The append was sent and stays unanswered: never `refused`, as it may be stored."""
    return Status("unknown", request, ErrorBody("unknown", message, retry_ms))


def chunk_of(
    request: str,
    position: int,
    tokens: Sequence[int],
    texts: Sequence[str],
    *,
    end: ChunkEnd = "",
    usage: TokenCounts | None = None,
    error: ErrorBody | None = None,
    logprobs: Sequence[TokenLogprobs] = (),
    choice: int = 0,
    n: int = 1,
    vectors: Sequence[bytes] = (),
) -> Chunk:
    """A chunk from the tokens and their pieces of text (equally many); an embedding's has vectors and no pieces."""
    pieces = tuple(texts) if len(tokens) > 1 and not vectors else ()
    whole, likely = "".join(texts), tuple(logprobs)
    return Chunk(request, position, tuple(tokens), whole, pieces, end, usage, error, likely, choice, n, tuple(vectors))


def merged(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one answer that follow each other, as one."""
    last = chunks[-1]
    return msgspec.structs.replace(
        chunk_of(
            last.request,
            chunks[0].position,
            [token for chunk in chunks for token in chunk.tokens],
            [text for chunk in chunks for text in (chunk.texts or (chunk.text,) * len(chunk.tokens))],
            logprobs=[one for chunk in chunks for one in chunk.logprobs],
            vectors=[one for chunk in chunks for one in chunk.vectors],
        ),
        end=last.end,
        usage=last.usage,
        error=last.error,
        choice=last.choice,
        n=last.n,
    )


def counted(choices: Sequence[Chunk]) -> TokenCounts:
    """The usage of all answers of one request: its prompt counts once."""
    usages = [chunk.usage for chunk in choices if chunk.usage is not None]
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    return TokenCounts(prompt, sum(usage.completion_tokens for usage in usages))


def end_of_all(ends: Sequence[ChunkEnd]) -> ChunkEnd:
    """How a request with several answers ended: as the first of them that was broken off, else as the first one."""
    return next((end for end in ends if end not in ("stop", "length")), ends[0] if ends else "")


def too_large(chunk: Chunk, size: int) -> Chunk:
    """What stands for a whole answer of `size` bytes that no message can carry."""
    error = ErrorBody("too_large", f"the answer takes {size} bytes: read it as a stream with resume")
    return Chunk(
        chunk.request,
        chunk.position,
        (),
        "",
        end="failed",
        usage=chunk.usage,
        error=error,
        choice=chunk.choice,
        n=chunk.n,
    )


_encode_json = msgspec.json.Encoder().encode
_encode_msgpack = msgspec.msgpack.Encoder().encode


def encode_reply(reply: Reply | dict[str, Any] | list[Any], encoding: Encoding = "json") -> bytes:
    return _encode_msgpack(reply) if encoding == "msgpack" else _encode_json(reply)


def encode_chunk(chunk: Chunk, encoding: Encoding = "json") -> bytes:
    return _encode_msgpack(chunk) if encoding == "msgpack" else _encode_json(chunk)


def reply_headers(encoding: Encoding) -> dict[str, str]:
    """Headers of a reply in this encoding; JSON needs none."""
    return {"Content-Type": MSGPACK_TYPE} if encoding == "msgpack" else {}


class _Probe(msgspec.Struct, frozen=True):
    """Only what tells the kinds of reply apart."""

    status: str = ""
    choices: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Decoders:
    """One decoder for each kind of reply, in one encoding. `chunk_start` are the first bytes of our own chunks."""

    def __init__(self, encoding: Encoding) -> None:
        make: Any = msgspec.msgpack.Decoder if encoding == "msgpack" else msgspec.json.Decoder
        self.probe = make(_Probe)
        self.chunk = make(Chunk)
        self.status = make(Status)
        self.result = make(Result)
        self.whole = make(WholeAnswers)

    def of(self, payload: bytes) -> Any:
        """The decoder for what the payload is. Chunks come by the thousand: they are told by their beginning."""
        if payload.startswith(b'{"request":') and b'"choices":' not in payload[:80]:
            return self.chunk
        probe = self.probe.decode(payload)
        if probe.status:
            return self.status if probe.status in ("accepted", "refused", "unknown") else self.result
        return self.chunk if probe.choices is msgspec.UNSET else self.whole


_decoders = {"json": _Decoders("json"), "msgpack": _Decoders("msgpack")}


def decode_reply(payload: bytes, encoding: Encoding = "json") -> Reply:
    """Raises ValueError, in one sentence, for anything that no cell says. An empty payload is the caller's affair."""
    decoders = _decoders[encoding]
    try:
        reply: Reply = decoders.of(payload).decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a reply of a cell: {error}") from None
    return reply


def shown(value: object, limit: int = 40) -> str:
    """A value from a request as it may stand in a sentence: one short line of printable ASCII."""
    try:
        line = json.dumps(value, default=lambda other: type(other).__name__)
    except (TypeError, ValueError, RecursionError):
        line = type(value).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."
