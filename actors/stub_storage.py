"""A server's storage without files: models by name, for simulation."""

from __future__ import annotations

import asyncio

from actors.store_driver import StorageFailed
from bus.messages import HeldModel, ModelCard


class StubStorage:
    """Obeys `actors.store_driver.Storage`.

    `cards` are the models on this server, `resident` those in DRAM; both outlive a restart of the driver. `corrupt`
    maps models to what is wrong with them. Loading takes the bytes of a model at `bytes_per_second`, 0 for no time.
    """

    def __init__(self, cards: tuple[ModelCard, ...] = (), *, bytes_per_second: int = 0) -> None:
        self.cards: dict[str, ModelCard] = {card.model: card for card in cards}
        self.resident: dict[str, bool] = {}
        self.corrupt: dict[str, str] = {}
        self.bytes_per_second = bytes_per_second

    async def scan(self) -> tuple[HeldModel, ...]:
        return tuple(
            HeldModel(card, "dram" if name in self.resident else "ssd")
            for name, card in self.cards.items()
            if name not in self.corrupt
        )

    async def load(self, model: str, digest: str) -> int:
        card = self._card(model)
        if self.bytes_per_second:
            await asyncio.sleep(card.weight_bytes / self.bytes_per_second)
        if model in self.corrupt:
            raise StorageFailed(self.corrupt[model], gone=True)
        if card.digest != digest:
            raise StorageFailed(f"{model} was replaced by other weights", gone=True)
        self.resident[model] = True
        return card.weight_bytes

    async def evict(self, model: str) -> None:
        self.resident.pop(model, None)

    async def find(self, model: str) -> ModelCard:
        return self._card(model)

    async def delete(self, model: str) -> None:
        self._card(model)
        del self.cards[model]
        self.resident.pop(model, None)

    def _card(self, model: str) -> ModelCard:
        card = self.cards.get(model)
        if card is None:
            raise StorageFailed(f"{model} does not lie on this server", gone=True)
        return card
