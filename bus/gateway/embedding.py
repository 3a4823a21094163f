"""`/v1/embeddings`: its body in the words of the contract, and vectors as OpenAI's clients read them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from bus.answer import Answer, RequestFailed
from bus.embeddings import numbers, parse_embed
from bus.gateway.cancelling import Canceller
from bus.gateway.connected import Exchanges, Stopping
from bus.gateway.errors import HttpError, bad_field, from_cell, stopping
from bus.gateway.fields import Refused, Vocabulary, model_of, sort_fields
from bus.gateway.reading import Reading
from bus.messages.requests import INPUTS_LIMIT
from bus.replies import Refusal, shown

ALL_INPUTS_LIMIT = 2048
"""As OpenAI's; the cell takes them in requests of `INPUTS_LIMIT`."""

VOCABULARY = Vocabulary(
    own=frozenset({"model", "input", "encoding_format"}),
    taken={"deadline_ms": "deadline_ms"},
    refused={"dimensions": Refused("vectors are as long as the model makes them")},
)
_NAMES = {"input": "input", "tokens": "input", "deadline_ms": "deadline_ms"}


@dataclass(frozen=True, slots=True)
class AskedVectors:
    """One body: `inputs` in as many requests."""

    model: str
    inputs: list[list[Any]]
    deadline_ms: int | None
    as_base64: bool


def parse_embedding(body: dict[str, Any]) -> AskedVectors:
    """Raises `HttpError` for whatever cannot be taken."""
    own, fields = sort_fields(body, VOCABULARY)
    model = model_of(own)
    form = own.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise bad_field("encoding_format", f"encoding_format must be float or base64, got {shown(form)}")
    inputs = _inputs(own)
    parts = [inputs[at : at + INPUTS_LIMIT] for at in range(0, len(inputs), INPUTS_LIMIT)]
    for part in parts:
        name = "input" if isinstance(part[0], str) else "tokens"
        try:
            parse_embed(msgspec.json.encode(fields | {name: part}), None, model)
        except Refusal as refusal:
            raise from_cell(RequestFailed(refusal.name, refusal.message), _NAMES) from None
        except (UnicodeEncodeError, OverflowError):
            raise bad_field("input", "input has a text that is not valid Unicode") from None
    return AskedVectors(model, parts, fields.get("deadline_ms"), form == "base64")


def _inputs(own: dict[str, Any]) -> list[Any]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    value = own.get("input")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise bad_field("input", f"input must be a text, token ids, or a list of either, got {shown(value)}")
    if all(isinstance(one, int) for one in value):
        return [value]
    if len(value) > ALL_INPUTS_LIMIT:
        raise bad_field("input", f"input is a list of {len(value)}, at most {ALL_INPUTS_LIMIT} are taken")
    if all(isinstance(one, str) for one in value) or all(isinstance(one, list) for one in value):
        return value
    raise bad_field("input", f"input must be a text, token ids, or a list of either, got {shown(value)}")


class EmbeddingCall:
    """Answers one request as an ASGI application. With `lasting` the cell's requests go on when the client goes."""

    def __init__(
        self,
        asked: AskedVectors,
        answers: Sequence[Answer],
        exchanges: Exchanges,
        canceller: Canceller,
        *,
        silence_seconds: float,
        lasting: bool,
    ) -> None:
        self._asked = asked
        self._answers = answers
        self._exchanges = exchanges
        self._canceller = canceller
        self._silence_seconds = silence_seconds
        self._lasting = lasting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `HttpError`, or `ClientGone`."""
        reading = Reading(self._answers)
        vectors: list[list[bytes]] = [[] for _ in self._answers]
        try:
            async with self._exchanges.connected(receive) as exchange, reading:
                while not reading.ended:
                    for index, chunk in await reading.batch(self._silence_seconds):
                        vectors[index] += chunk.vectors
                exchange.finished = True
        except Stopping:
            raise stopping() from None
        except RequestFailed as failure:
            raise from_cell(failure, _NAMES) from None
        finally:
            if not self._lasting:
                for request in reading.unfinished:
                    self._canceller.cancel(request)
        every = [vector for part in vectors for vector in part]
        if len(every) != sum(map(len, self._asked.inputs)):
            raise HttpError(500, "the cell gave fewer vectors than inputs", kind="server_error", code="failed")
        body = self._body(every, reading.usage.prompt_tokens)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _body(self, vectors: list[bytes], tokens: int) -> bytes:
        def written(vector: bytes) -> str | list[float]:
            return base64.b64encode(vector).decode() if self._asked.as_base64 else numbers(vector)

        return msgspec.json.encode(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": written(vector)}
                    for index, vector in enumerate(vectors)
                ],
                "model": self._asked.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )
