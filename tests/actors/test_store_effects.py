"""The store driver obeys side by side: what may overtake what, how a load is cancelled, what an ended epoch leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from tiny_control import card

from actors.driver_core import Effect, EpochOver
from actors.stopping import LATER
from actors.store_driver import Loaded, StorageFailed, StoreDriver
from actors.stub_storage import StubStorage
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
    Tier,
)

ELSEWHERE = "http://elsewhere/m"


class HeldBack(StubStorage):
    """Every call waits until the test lets it go; `begun` is the order in which they began."""

    def __init__(self, *models: str) -> None:
        super().__init__(tuple(card(model) for model in models))
        self.begun: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.left: list[str] = []
        self.later: list[str] = []

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def _held(self, name: str) -> None:
        self.begun.append(name)
        try:
            await self.gate(name).wait()
        except asyncio.CancelledError as cancelled:
            self.left.append(name)
            self.later += [name] if LATER in cancelled.args else []
            raise

    async def load(
        self, model: str, digest: str, sources: tuple[str, ...] = (), urgent: bool = True, streamed: bool = False
    ) -> Loaded:
        await self._held(f"load {model}")
        return await super().load(model, digest, sources, urgent)

    async def evict(self, model: str, tier: Tier = "dram") -> None:
        await self._held(f"evict {model}")
        await super().evict(model, tier)

    async def find(self, model: str, source: str = "") -> HeldModel:
        return await super().find(model, source)


class FakeEpoch:
    """An epoch of the test's own: effects in, answers out."""

    number = 7
    boot = "boot"
    backlog = 0

    def __init__(self) -> None:
        self._effects: asyncio.Queue[Effect] = asyncio.Queue()
        self._changed = asyncio.Event()
        self.answers: dict[int, Message] = {}
        self._count = 0

    def order(self, message: Message) -> int:
        self._count += 1
        self._effects.put_nowait(Effect(self._count, message))
        return self._count

    async def effect(self) -> Effect:
        return await self._effects.get()

    def state(self, message: Message, *, answers: int = 0) -> None:
        assert 1 <= answers <= self._count and answers not in self.answers, "exactly one answer"
        self.answers[answers] = message
        self._changed.set()

    async def answer(self, number: int) -> Message:
        async with asyncio.timeout(5):
            while number not in self.answers:
                self._changed.clear()
                await self._changed.wait()
        return self.answers[number]


@contextlib.asynccontextmanager
async def at_work(storage: StubStorage) -> AsyncIterator[FakeEpoch]:
    epoch = FakeEpoch()
    driver = StoreDriver("s1", dram_bytes=1 << 20, storage=storage)
    running = asyncio.get_running_loop().create_task(driver.run(epoch))
    yield epoch
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def turns() -> None:
    """As many turns of the loop as anything here takes that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_long_load_holds_up_nobody_else() -> None:
    storage = HeldBack("a", "b")
    async with at_work(storage) as epoch:
        slow, found, quick = (epoch.order(m) for m in (LoadModel("a", "d1"), FindModel("b"), LoadModel("b", "d1")))
        assert await epoch.answer(found) == ModelFound(card("b"))
        storage.gate("load b").set()
        assert isinstance(await epoch.answer(quick), ModelLoaded)
        assert slow not in epoch.answers
        storage.gate("load a").set()
        assert isinstance(await epoch.answer(slow), ModelLoaded)


async def test_effects_about_one_model_keep_their_order() -> None:
    storage = HeldBack("a")
    async with at_work(storage) as epoch:
        orders = [LoadModel("a", "d1"), EvictModel("a", "room"), LoadModel("a", "d1"), DeleteModel("a", "d1")]
        numbers = [epoch.order(message) for message in orders]
        await turns()
        assert storage.begun == ["load a"]
        storage.gate("load a").set()
        await turns()
        assert storage.begun == ["load a", "evict a"]
        storage.gate("evict a").set()
        assert await epoch.answer(numbers[3]) == ModelDeleted("a")
        assert storage.begun == ["load a", "evict a", "load a"]
        assert list(epoch.answers) == numbers


async def test_a_load_waits_for_the_evictions_that_make_room_for_it() -> None:
    storage = HeldBack("a", "b", "c")
    async with at_work(storage) as epoch:
        evicted = epoch.order(EvictModel("a", "room for b"))
        loaded = epoch.order(LoadModel("b", "d1"))
        await turns()
        assert storage.begun == ["evict a"]
        storage.gate("evict a").set()
        storage.gate("load b").set()
        assert isinstance(await epoch.answer(loaded), ModelLoaded)
        assert await epoch.answer(evicted) == ModelEvicted("a")


async def test_a_load_under_way_is_cancelled_and_both_are_answered() -> None:
    storage = HeldBack("a")
    async with at_work(storage) as epoch:
        load = epoch.order(LoadModel("a", "d1"))
        await turns()
        cancel = epoch.order(CancelLoad("a", "the client left"))
        assert await epoch.answer(cancel) == LoadCancelTaken("a", True)
        assert await epoch.answer(load) == LoadFailed("a", "cancelled: the client left", cancelled=True)
        assert storage.left == ["load a"] and storage.later == [] and storage.resident == {}
        again = epoch.order(LoadModel("a", "d1"))
        storage.gate("load a").set()
        assert isinstance(await epoch.answer(again), ModelLoaded)


async def test_a_load_that_waits_is_cancelled_before_it_begins() -> None:
    storage = HeldBack("a", "b")
    async with at_work(storage) as epoch:
        evict = epoch.order(EvictModel("b", "room"))
        load = epoch.order(LoadModel("a", "d1"))
        cancel = epoch.order(CancelLoad("a", "nobody waits"))
        assert await epoch.answer(cancel) == LoadCancelTaken("a", True)
        storage.gate("evict b").set()
        failed = await epoch.answer(load)
        assert isinstance(failed, LoadFailed) and failed.cancelled
        assert await epoch.answer(evict) == ModelEvicted("b")
        assert storage.begun == ["evict b"]


async def test_cancelling_what_is_not_loaded_finds_nothing() -> None:
    async with at_work(HeldBack("a")) as epoch:
        assert await epoch.answer(epoch.order(CancelLoad("a", "x"))) == LoadCancelTaken("a", False)


async def test_a_load_that_ends_while_it_is_cancelled_counts() -> None:
    """Storage may say that it was done all the same; then that is the answer."""

    class Stubborn(HeldBack):
        async def _held(self, name: str) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await super()._held(name)

    async with at_work(Stubborn("a")) as epoch:
        load = epoch.order(LoadModel("a", "d1"))
        await turns()
        await epoch.answer(epoch.order(CancelLoad("a", "late")))
        assert isinstance(await epoch.answer(load), ModelLoaded)


async def test_the_end_of_an_epoch_stops_everything_and_states_nothing() -> None:
    storage = HeldBack("a", "b", "c")
    async with at_work(storage) as epoch:
        for message in (LoadModel("a", "d1"), LoadModel("b", "d1"), EvictModel("c", "x"), LoadModel("c", "d1")):
            epoch.order(message)
        await turns()
    assert epoch.answers == {}
    assert storage.left == ["load a", "load b", "evict c"]
    assert storage.later == storage.left, "the next epoch goes on with what was fetched"
    assert len(asyncio.all_tasks()) == 1


async def test_what_nobody_expects_ends_the_epoch() -> None:
    class Broken(StubStorage):
        async def evict(self, model: str, tier: Tier = "dram") -> None:
            raise RuntimeError("the kernel says no")

    epoch = FakeEpoch()
    epoch.order(EvictModel("a", "room"))
    with pytest.raises(RuntimeError, match="the kernel says no"):
        await StoreDriver("s1", dram_bytes=1, storage=Broken()).run(epoch)
    epoch = FakeEpoch()
    epoch.order(ModelEvicted("a"))
    with pytest.raises(EpochOver, match="does not know how to obey"):
        await StoreDriver("s1", dram_bytes=1, storage=StubStorage()).run(epoch)


async def test_a_model_from_a_source_lies_on_the_ssd_afterwards_and_goes_with_it() -> None:
    storage = StubStorage()
    storage.remote[ELSEWHERE] = card("m")
    driver = StoreDriver("s1", dram_bytes=1 << 20, storage=storage)
    assert await driver.obey(FindModel("m", ELSEWHERE)) == ModelFound(card("m"), "remote", ELSEWHERE)
    loaded = await driver.obey(LoadModel("m", "d1", (ELSEWHERE,)))
    assert isinstance(loaded, ModelLoaded) and loaded.tier == "remote"
    assert await storage.scan() == (HeldModel(card("m"), "dram", ELSEWHERE),)
    assert await driver.obey(EvictModel("m", "room on the disk", "ssd")) == ModelEvicted("m")
    assert await storage.scan() == ()
    failed = await driver.obey(LoadModel("m", "other", (ELSEWHERE,)))
    assert isinstance(failed, LoadFailed) and not failed.gone
    with pytest.raises(StorageFailed):
        await storage.find("m", "http://nowhere")
