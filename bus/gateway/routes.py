"""The routes of the gateway."""

from __future__ import annotations

import re
import secrets
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from bus.api import NAME_LIMIT
from bus.client import Client
from bus.contract import Bus
from bus.gateway.answering import Completion
from bus.gateway.bodies import Bodies
from bus.gateway.cancelling import Canceller
from bus.gateway.cards import Cards, model_object
from bus.gateway.chat import parse_chat
from bus.gateway.completions import parse_completion
from bus.gateway.connected import Exchanges
from bus.gateway.embedding import EmbeddingCall, parse_embedding
from bus.gateway.errors import HttpError, bad_field
from bus.gateway.fields import Asked, decode_object
from bus.gateway.guard import Guard
from bus.gateway.readiness import Readiness
from bus.gateway.settings import GatewaySettings
from bus.gateway.shapes import ChatShape, CompletionShape

KEY_LIMIT = NAME_LIMIT - 10
"""Characters of an idempotency key; the rest is for the number of the prompt."""
_PLAIN_KEY = re.compile(r"[\x20-\x7e]+\Z")


class Gateway:
    """Answers OpenAI's API as a client of one cell. `app` is the ASGI application."""

    def __init__(self, bus: Bus, settings: GatewaySettings) -> None:
        self.settings = settings
        self.exchanges = Exchanges()
        self.client = Client(bus, settings.cell)
        self._bus = bus
        self._clients: dict[str, Client] = {}
        self.canceller = Canceller(self.client)
        self.readiness = Readiness(bus, self.client)
        self.cards = Cards(self.client)
        self._bodies = Bodies(settings.body_limit_bytes, settings.bodies_limit_bytes, settings.body_seconds)
        router = Router(
            [
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completion, methods=["POST"]),
                Route("/v1/embeddings", self._embedding, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{model:path}", self._model, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/health/live", self._live, methods=["GET"]),
                Route("/health/ready", self._health, methods=["GET"]),
            ],
            redirect_slashes=False,
        )
        self.app: ASGIApp = Guard(router, settings.keys, settings.requests)

    # completions
    async def _chat(self, request: Request) -> ASGIApp:
        async with self._bodies.read(request) as payload:
            asked = parse_chat(decode_object(payload))
            context = 0 if "max_tokens" in asked.fields else await self.cards.context(asked.model)
            if context:
                asked.fields["max_tokens"] = context  # what the prompt leaves of it, as the worker will see
            return self._ask(request, asked, ChatShape)

    async def _completion(self, request: Request) -> ASGIApp:
        async with self._bodies.read(request) as payload:
            return self._ask(request, parse_completion(decode_object(payload)), CompletionShape)

    def _ask(self, request: Request, asked: Asked, shape: type[ChatShape] | type[CompletionShape]) -> Completion:
        key = _key(request)
        client = self._client_of(request)
        first = key or secrets.token_hex(16)
        answers = [
            client.infer(asked.model, key=_numbered(first, i), **(asked.fields | one))
            for i, one in enumerate(asked.inputs)
        ]
        name = request.state.request_id = answers[0].request_id
        return Completion(
            asked,
            answers,
            shape(name, asked.model, with_usage=asked.include_usage, logprobs=asked.logprobs),
            self.exchanges,
            self.canceller,
            silence_seconds=self.settings.silence_seconds,
            lasting=bool(key),
        )

    async def _embedding(self, request: Request) -> ASGIApp:
        async with self._bodies.read(request) as payload:
            asked = parse_embedding(decode_object(payload))
            key = _key(request)
            client = self._client_of(request)
            first = key or secrets.token_hex(16)
            answers = [
                client.embedding(asked.model, part, key=_numbered(first, i), deadline_ms=asked.deadline_ms)
                for i, part in enumerate(asked.inputs)
            ]
            request.state.request_id = answers[0].request_id
            return EmbeddingCall(
                asked,
                answers,
                self.exchanges,
                self.canceller,
                silence_seconds=self.settings.silence_seconds,
                lasting=bool(key),
            )

    def _client_of(self, request: Request) -> Client:
        """The library under the name of whoever asks: idempotency keys are unique within it."""
        name = request.state.client
        if name not in self._clients:
            self._clients[name] = Client(self._bus, self.settings.cell, name=name)
        return self._clients[name]

    # models
    async def _models(self, request: Request) -> Response:
        cards = await self.cards.all()
        return _json({"object": "list", "data": [model_object(card) for card in cards.values()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        card = (await self.cards.all()).get(name)
        if card is None:
            raise HttpError(404, f"no model {name[:200]!r} here", code="model_not_found", param="model")
        return _json(model_object(card))

    # health
    async def _live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def _health(self, request: Request) -> Response:
        reason = "this gateway is stopping" if self.readiness.stopping else await self.readiness.why_not()
        body: dict[str, Any] = {"status": "not ready" if reason else "ready", "cell": self.settings.cell}
        if reason:
            body["reason"] = reason
        return _json(body, status=503 if reason else 200)


def _key(request: Request) -> str:
    """The idempotency key; empty where there is none."""
    key: str = request.headers.get("idempotency-key", "")
    if key and (len(key) > KEY_LIMIT or not _PLAIN_KEY.match(key)):
        raise bad_field("Idempotency-Key", f"Idempotency-Key must have at most {KEY_LIMIT} printable ASCII characters")
    return key


def _numbered(key: str, number: int) -> str:
    """The key of one of several requests that answer one body."""
    return f"{key}/{number}" if number else key


def _json(body: Any, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
