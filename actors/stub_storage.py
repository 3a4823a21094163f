"""A server's storage without files: models by name, for simulation."""

from __future__ import annotations

import asyncio

import msgspec

from actors.store_driver import Loaded, StorageFailed
from bus.messages import HeldModel, ModelCard, Tier


class StubStorage:
    """Obeys `actors.store_driver.Storage`.

    `cards` are the models on this server, `resident` those in DRAM, `origins` where those that were fetched came from;
    all outlive a restart of the driver. `corrupt` maps models to what is wrong with them. `remote` is what the sources
    have, by their addresses. Loading takes the bytes of a model at `bytes_per_second`, 0 for no time; from a source it
    takes `remote_times` as long.
    """

    def __init__(self, cards: tuple[ModelCard, ...] = (), *, bytes_per_second: int = 0, remote_times: int = 4) -> None:
        self.cards: dict[str, ModelCard] = {card.model: card for card in cards}
        self.resident: dict[str, bool] = {}
        self.origins: dict[str, str] = {}
        self.remote: dict[str, ModelCard] = {}
        self.corrupt: dict[str, str] = {}
        self.bytes_per_second = bytes_per_second
        self.remote_times = remote_times

    async def scan(self) -> tuple[HeldModel, ...]:
        return tuple(
            HeldModel(card, "dram" if name in self.resident else "ssd", self.origins.get(name, ""))
            for name, card in self.cards.items()
            if name not in self.corrupt
        )

    async def load(
        self, model: str, digest: str, sources: tuple[str, ...] = (), urgent: bool = True, streamed: bool = False
    ) -> Loaded:
        tier: Tier = "ssd" if model in self.cards or not sources else "remote"
        card = self._card(model) if tier == "ssd" else self._at_source(model, digest, sources)
        if self.bytes_per_second:
            times = self.remote_times if tier == "remote" else 1
            await asyncio.sleep(card.weight_bytes * times / self.bytes_per_second)
        if model in self.corrupt:
            raise StorageFailed(self.corrupt[model], gone=True)
        if card.digest != digest:
            raise StorageFailed(f"{model} was replaced by other weights", gone=True)
        if tier == "remote":
            self.cards[model], self.origins[model] = card, sources[-1]
        if not streamed:
            self.resident[model] = True
        return Loaded(card.weight_bytes, tier, sources[-1] if tier == "remote" else "")

    async def evict(self, model: str, tier: Tier = "dram") -> None:
        self.resident.pop(model, None)
        if tier == "ssd":
            self.cards.pop(model, None)
            self.origins.pop(model, None)

    async def find(self, model: str, source: str = "") -> HeldModel:
        if model not in self.cards and source in self.remote:
            return HeldModel(msgspec.structs.replace(self.remote[source], model=model), "remote", source)
        return HeldModel(self._card(model), "ssd", self.origins.get(model, ""))

    async def delete(self, model: str) -> None:
        self._card(model)
        del self.cards[model]
        self.resident.pop(model, None)
        self.origins.pop(model, None)

    async def forget_partial(self, model: str) -> None:
        """A load that breaks off leaves nothing here."""

    def _card(self, model: str) -> ModelCard:
        card = self.cards.get(model)
        if card is None:
            raise StorageFailed(f"{model} does not lie on this server", gone=True)
        return card

    def _at_source(self, model: str, digest: str, sources: tuple[str, ...]) -> ModelCard:
        for source in sources:
            card = self.remote.get(source)
            if card is not None and card.digest == digest:
                return msgspec.structs.replace(card, model=model)
        raise StorageFailed(f"{model} cannot be fetched from {' or '.join(sources)}")
