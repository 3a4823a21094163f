"""The doing half of one server's storage tiers: it obeys `store/<server>`.

Loads take long, so effects are obeyed side by side, under these rules:
* Effects about one model are obeyed one after the other, in order.
* A load begins when every eviction and deletion that was ordered before it is done: they make room for it.
* `load.cancel` overtakes: it stops the load of its model that is under way or waits. The load is answered all the same.
* Each effect is answered once, when it is done; so answers may come in another order than their effects.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, Protocol

from actors.driver import Epoch
from actors.driver_core import Effect, EpochOver
from actors.stopping import LATER
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
    ModelDeleted,
    ModelEvicted,
    ModelFound,
    ModelLoaded,
    ModelMissing,
    StoreStarted,
    Tier,
    kind_of,
)
from bus.tasks import Tasks


class StorageFailed(Exception):
    """A model cannot be brought, found or deleted; one sentence. `gone`: it is not usable on this server any more."""

    def __init__(self, reason: str, *, gone: bool = False) -> None:
        super().__init__(reason)
        self.gone = gone


class Loaded(NamedTuple):
    """What a load brought to DRAM, in bytes, the tier it came from, and from `remote`: where it can be had again.

    `seconds`: what it took without waiting for other loads, which estimates count by themselves; 0 where nothing had to
    be moved; None: all the time since it was asked for.
    """

    bytes: int
    tier: Tier
    source: str = ""
    seconds: float | None = None


class Storage(Protocol):
    """Where packed models lie, and the tiers around that. Methods that can fail raise `StorageFailed`.

    Each may be cancelled: then it ends soon, and either it is done, or nothing of it is left, but for what a load that
    is cancelled with `stopping.LATER` may go on with.
    """

    async def scan(self) -> tuple[HeldModel, ...]:
        """Every valid model on this server, the tier it lies in, and where it came from."""
        ...

    async def load(
        self, model: str, digest: str, sources: tuple[str, ...] = (), urgent: bool = True, streamed: bool = False
    ) -> Loaded:
        """Bring it to DRAM, every byte checked; `streamed`: to the SSD alone. The digest names the very weights meant.

        Where it does not lie on this server, it comes from the first of the `sources` that gives it, and lies on the
        SSD, too. `urgent` loads go before others.
        """
        ...

    async def evict(self, model: str, tier: Tier = "dram") -> None:
        """Let its DRAM go, as far as nobody has it mapped; with tier `ssd` its files, too."""
        ...

    async def find(self, model: str, source: str = "") -> HeldModel:
        """What lies here under this name or, with tier `remote`, what the source has."""
        ...

    async def delete(self, model: str) -> None:
        """Delete it from this server. What is mapped stays valid until it is let go."""
        ...

    async def forget_partial(self, model: str) -> None:
        """Delete what a load of it that broke off has left to be gone on with."""
        ...


class StoreDriver:
    """Obeys `actors.driver.Driver`. Its name is that of its deciding half.

    `ssd_bytes`: what packed models may take of the disk, 0 for no bound; `address`: where other servers fetch them;
    `dram_tier`: what its DRAM is, for people.
    """

    def __init__(
        self,
        server: str,
        *,
        dram_bytes: int,
        storage: Storage,
        process: int = 0,
        ssd_bytes: int = 0,
        address: str = "",
        dram_tier: str = "",
    ) -> None:
        self.name = f"store/{server}"
        self._server = server
        self._dram_bytes = dram_bytes
        self._ssd_bytes = ssd_bytes
        self._address = address
        self._storage = storage
        self._process = process
        self._dram_tier = dram_tier
        self._work: _Work | None = None

    def begin_anew(self, reason: str) -> None:
        """What lies here is not what was said at the beginning of the epoch: end it, the next one says what is so."""
        if self._work is not None:
            self._work.end(reason)

    async def open(self) -> Message:
        try:
            models = await self._storage.scan()
        except StorageFailed as failed:
            raise EpochOver(f"what lies on this server cannot be told: {failed}") from failed
        return StoreStarted(
            self._server,
            self._dram_bytes,
            models,
            process=self._process,
            ssd_bytes=self._ssd_bytes,
            address=self._address,
            dram_tier=self._dram_tier[:200],
        )

    async def run(self, epoch: Epoch) -> None:
        work = self._work = _Work(self, epoch)
        try:
            await work.run()
        finally:
            self._work = None
            await work.stop()

    async def obey(self, message: Message) -> Message:
        """Do what one effect says; its answer. `load.cancel` is none of these: it is about another one."""
        if isinstance(message, LoadModel):
            return await self._load(message)
        if isinstance(message, EvictModel):
            if message.tier == "remote":
                await self._storage.forget_partial(message.model)
            else:
                await self._storage.evict(message.model, message.tier)
            return ModelEvicted(message.model)
        if not isinstance(message, FindModel | DeleteModel):
            raise EpochOver(f"a store does not know how to obey {kind_of(message)}")
        try:
            if isinstance(message, FindModel):
                held = await self._storage.find(message.model, message.source)
                return ModelFound(held.card, held.tier, held.source)
            try:
                held = await self._storage.find(message.model)
            except StorageFailed:
                await self._storage.forget_partial(message.model)
                raise
            if message.digest and held.card.digest != message.digest:
                return ModelMissing(message.model, "other weights of this name lie there by now")
            await self._storage.delete(message.model)
            return ModelDeleted(message.model)
        except StorageFailed as failed:
            return ModelMissing(message.model, str(failed)[:4000])

    async def _load(self, message: LoadModel) -> Message:
        now = asyncio.get_running_loop().time
        began = now()
        try:
            loaded = await self._storage.load(
                message.model, message.digest, message.sources, message.urgent, message.streamed
            )
        except StorageFailed as failed:
            return LoadFailed(message.model, str(failed)[:4000], failed.gone)
        seconds = now() - began if loaded.seconds is None else loaded.seconds
        return ModelLoaded(message.model, loaded.bytes, int(seconds * 1e9), loaded.tier, loaded.source)


class _Errand:
    """An effect that is being obeyed, or waits for earlier ones. `cancelled`: why, where somebody wants it no more."""

    def __init__(self, effect: Effect, earlier: list[_Errand]) -> None:
        self.effect = effect
        self.earlier = earlier
        self.begun = False
        self.cancelled = ""
        self.task: asyncio.Task[None]

    @property
    def makes_room(self) -> bool:
        return isinstance(self.effect.message, EvictModel | DeleteModel)


class _Work:
    """The effects of one epoch at work; see the head of this file."""

    def __init__(self, driver: StoreDriver, epoch: Epoch) -> None:
        self._driver = driver
        self._epoch = epoch
        self._tasks = Tasks()
        self._under_way: dict[int, _Errand] = {}
        self._ended = False

    async def run(self) -> None:
        """Until the epoch is over; raises what ended it."""
        self._tasks.start(self._take(), "takes effects")
        await self._tasks.wait()

    def end(self, reason: str) -> None:
        async def over() -> None:
            raise EpochOver(reason)

        self._tasks.spawn(over(), "ends")

    async def stop(self) -> None:
        self._ended = True
        # The next epoch, also that of another process, goes on with what this one has fetched.
        await self._tasks.stop(LATER)

    async def _take(self) -> None:
        while True:
            effect = await self._epoch.effect()
            message = effect.message
            if isinstance(message, CancelLoad):
                found = self._cancel(message)
                self._epoch.state(LoadCancelTaken(message.model, found), answers=effect.number)
                continue
            errand = _Errand(effect, self._before(message))
            self._under_way[effect.number] = errand
            errand.task = self._tasks.spawn(self._do(errand), f"effect {effect.number}")

    def _before(self, message: Message) -> list[_Errand]:
        """What must be done before this may begin."""
        model, load = _model(message), isinstance(message, LoadModel)
        return [
            errand
            for errand in self._under_way.values()
            if _model(errand.effect.message) == model or (load and errand.makes_room)
        ]

    def _cancel(self, message: CancelLoad) -> bool:
        for errand in self._under_way.values():
            if isinstance(errand.effect.message, LoadModel) and errand.effect.message.model == message.model:
                if errand.begun and not errand.cancelled:
                    errand.task.cancel()
                errand.cancelled = message.reason or "nobody wants it any more"
                return True
        return False

    async def _do(self, errand: _Errand) -> None:
        number, message = errand.effect
        for earlier in errand.earlier:
            await asyncio.wait([earlier.task])
        errand.earlier = []
        errand.begun = True
        try:
            answer = _cancelled(errand) if errand.cancelled else await self._driver.obey(message)
        except asyncio.CancelledError:
            if self._ended or not errand.cancelled:
                raise
            answer = _cancelled(errand)
        finally:
            del self._under_way[number]
        if not self._ended:
            self._epoch.state(answer, answers=number)


def _cancelled(errand: _Errand) -> Message:
    return LoadFailed(_model(errand.effect.message), f"cancelled: {errand.cancelled}", cancelled=True)


def _model(message: Message) -> str:
    model = getattr(message, "model", "")
    assert isinstance(model, str)
    return model
