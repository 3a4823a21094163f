"""The doing half of one server's storage tiers: it obeys `store/<server>`, one effect after the other, in order."""

from __future__ import annotations

import asyncio
from typing import Protocol

from actors.driver import Epoch
from actors.driver_core import EpochOver
from bus.messages import (
    CancelLoad,
    DeleteModel,
    EvictModel,
    FindModel,
    HeldModel,
    LoadCancelTaken,
    LoadFailed,
    LoadModel,
    Message,
    ModelCard,
    ModelDeleted,
    ModelEvicted,
    ModelFound,
    ModelLoaded,
    ModelMissing,
    StoreStarted,
    kind_of,
)


class StorageFailed(Exception):
    """A model cannot be brought, found or deleted; one sentence. `gone`: it is not usable on this server any more."""

    def __init__(self, reason: str, *, gone: bool = False) -> None:
        super().__init__(reason)
        self.gone = gone


class Storage(Protocol):
    """Where packed models lie, and the tier above it. Methods that can fail raise `StorageFailed`."""

    async def scan(self) -> tuple[HeldModel, ...]:
        """Every valid model on this server, and the tier it lies in."""
        ...

    async def load(self, model: str, digest: str) -> int:
        """Bring it to DRAM, every byte checked; how many bytes that were. The digest names the very weights meant."""
        ...

    async def evict(self, model: str) -> None:
        """Let its DRAM go, as far as nobody has it mapped."""
        ...

    async def find(self, model: str) -> ModelCard: ...

    async def delete(self, model: str) -> None:
        """Delete it from this server. What is mapped stays valid until it is let go."""
        ...


class StoreDriver:
    """Obeys `actors.driver.Driver`. Its name is that of its deciding half."""

    def __init__(self, server: str, *, dram_bytes: int, storage: Storage, process: int = 0) -> None:
        self.name = f"store/{server}"
        self._server = server
        self._dram_bytes = dram_bytes
        self._storage = storage
        self._process = process

    async def open(self) -> Message:
        models = await self._storage.scan()
        return StoreStarted(self._server, self._dram_bytes, models, process=self._process)

    async def run(self, epoch: Epoch) -> None:
        while True:
            effect = await epoch.effect()
            epoch.state(await self._obey(effect.message), answers=effect.number)

    async def _obey(self, message: Message) -> Message:
        if isinstance(message, LoadModel):
            return await self._load(message)
        if isinstance(message, CancelLoad):
            return LoadCancelTaken(message.model, found=False)  # what it cancels was obeyed before
        if isinstance(message, EvictModel):
            await self._storage.evict(message.model)
            return ModelEvicted(message.model)
        if not isinstance(message, FindModel | DeleteModel):
            raise EpochOver(f"a store does not know how to obey {kind_of(message)}")
        try:
            if isinstance(message, FindModel):
                return ModelFound(await self._storage.find(message.model))
            found = await self._storage.find(message.model)
            if message.digest and found.digest != message.digest:
                return ModelMissing(message.model, "other weights of this name lie there by now")
            await self._storage.delete(message.model)
            return ModelDeleted(message.model)
        except StorageFailed as failed:
            return ModelMissing(message.model, str(failed)[:4000])

    async def _load(self, message: LoadModel) -> Message:
        now = asyncio.get_running_loop().time
        began = now()
        try:
            loaded = await self._storage.load(message.model, message.digest)
        except StorageFailed as failed:
            return LoadFailed(message.model, str(failed)[:4000], failed.gone)
        return ModelLoaded(message.model, loaded, int((now() - began) * 1e9))
