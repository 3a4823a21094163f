"""The store driver over a simulated storage and a real cell: models are found, loaded, evicted, deleted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tiny_control import TinyControl, card

from actors.driver import DriverShell
from actors.store_driver import StoreDriver
from actors.stub_storage import StubStorage
from bus.memory import MemoryServer
from bus.messages import (
    DriverLost,
    EvictModel,
    LoadFailed,
    LoadModel,
    ModelAdded,
    ModelDeleted,
    ModelEvicted,
    ModelFound,
    ModelLoaded,
    ModelMissing,
    ModelRemoved,
    ServerGone,
    ServerReady,
    StoreStarted,
    kind_of,
)


@contextlib.asynccontextmanager
async def store(
    storage: StubStorage, made: list[StoreDriver] | None = None, *, dram_bytes: int = 2500
) -> AsyncIterator[TinyControl]:
    driver = StoreDriver("s1", dram_bytes=dram_bytes, storage=storage, process=7)
    if made is not None:
        made.append(driver)
    server = MemoryServer("main")
    bus = server.bus("store")
    boots = iter(f"boot-{n}" for n in range(1000))
    shell = DriverShell(
        bus,
        bus.subjects,
        driver,
        boot=lambda: next(boots),
    )
    async with TinyControl(server.bus("control")) as control:
        running = asyncio.get_running_loop().create_task(shell.run())
        await control.wait(ServerReady)
        yield control
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_started_lists_what_lies_there_and_in_which_tier() -> None:
    storage = StubStorage((card("a"), card("b"), card("bad")))
    storage.resident["b"] = True
    storage.corrupt["bad"] = "damaged"
    async with store(storage) as control:
        (started,) = control.find(StoreStarted)
        assert isinstance(started, StoreStarted)
        assert [(held.card.model, held.tier) for held in started.models] == [("a", "ssd"), ("b", "dram")]
        assert (started.dram_bytes, started.process) == (2500, 7)


async def test_a_model_that_an_operator_added_is_found() -> None:
    storage = StubStorage()
    async with store(storage) as control:
        storage.cards["new"] = card("new")
        await control.state("placement", ModelAdded("new"))
        await control.state("placement", ModelAdded("absent"))
        assert await control.wait(ModelFound) == ModelFound(card("new"))
        missing = await control.wait(ModelMissing)
        assert missing == ModelMissing("absent", "absent does not lie on this server")


async def test_a_removed_model_is_deleted() -> None:
    storage = StubStorage((card("a"),))
    async with store(storage) as control:
        await control.state("placement", ModelRemoved("a"))
        await control.wait(ModelDeleted)
        assert storage.cards == {}


async def test_effects_are_obeyed_in_order() -> None:
    """Load, evict and load again through the driver's own table, without a cell in between."""
    storage = StubStorage((card("a"), card("c", digest="other")))
    storage.corrupt["broken"] = "chunk 3 of broken is damaged"
    storage.cards["broken"] = card("broken")
    driver = StoreDriver("s1", dram_bytes=1, storage=storage)
    answers = [
        await driver.obey(message)
        for message in (
            LoadModel("a", "d1"),
            EvictModel("a", "room"),
            LoadModel("c", "d1"),
            LoadModel("broken", "d1"),
            LoadModel("absent", "d1"),
        )
    ]
    assert [kind_of(answer) for answer in answers] == [
        "model.loaded",
        "model.evicted",
        "load.failed",
        "load.failed",
        "load.failed",
    ]
    assert isinstance(answers[0], ModelLoaded)
    assert answers[0].loaded_bytes == 1000
    assert answers[1] == ModelEvicted("a")
    assert answers[3] == LoadFailed("broken", "chunk 3 of broken is damaged", gone=True)
    assert storage.resident == {}


async def test_what_lies_there_no_more_is_said_with_a_new_epoch() -> None:
    storage = StubStorage((card("a"), card("b")))
    storage.resident.update(a=True, b=True)
    made: list[StoreDriver] = []
    async with store(storage, made) as control:
        (first,) = control.find(ServerReady)
        assert isinstance(first, ServerReady) and {held.tier for held in first.models} == {"dram"}
        del storage.resident["b"]
        made[0].begin_anew("not in DRAM any more: b")
        second = await control.wait(ServerReady, 2)
        assert isinstance(second, ServerReady)
        assert {held.card.model: held.tier for held in second.models} == {"a": "dram", "b": "ssd"}


async def test_a_lost_store_comes_back_with_what_it_holds() -> None:
    async with store(StubStorage((card("a"),))) as control:
        (started,) = control.find(StoreStarted)
        epoch = next(sequence for sequence, _, message in control.heard if message is started)
        await control.state("store/s1", DriverLost("store/s1", epoch, "silence"), "watch")
        await control.wait(ServerGone)
        await control.wait(ServerReady, 2)
