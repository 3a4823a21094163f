"""The models of the cell, asked for at most every few seconds, whoever wants to know."""

from __future__ import annotations

import asyncio
from typing import Any

from bus.client import Client

FRESH_SECONDS = 5.0


class Cards:
    """What the cell says of its models; shared by all requests of a gateway."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._cards: dict[str, dict[str, Any]] = {}
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    async def all(self) -> dict[str, dict[str, Any]]:
        """Cards by name, a few seconds old at most. Raises `RequestFailed` where the cell does not answer."""
        now = asyncio.get_running_loop().time
        if now() - self._asked_at > FRESH_SECONDS:
            async with self._asking:
                if now() - self._asked_at > FRESH_SECONDS:
                    cards = await self._client.models()
                    self._cards = {card["model"]: card for card in cards if not card.get("removed")}
                    self._asked_at = now()
        return self._cards

    async def context(self, model: str) -> int:
        """Tokens of prompt and answer together; 0 where the model is not known."""
        card = (await self.all()).get(model)
        return int(card["context"]) if card is not None else 0


def model_object(card: dict[str, Any]) -> dict[str, Any]:
    """A card as OpenAI lists models; `context` is ours. When a model was added is not recorded."""
    return {
        "id": card["model"],
        "object": "model",
        "created": 0,
        "owned_by": "longshore",
        "context": card.get("context"),
        "architecture": card.get("architecture"),
        "chat": card.get("chat"),
    }
