"""A model that computes while it is on its way to DRAM: the same answers, and failures as if it had not been begun.

A worker, a store and a real cell on the bus in memory, with files and engines that are real; the store reads as many
chunks as a test lets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from range_server import Handler, range_server
from tiny_control import Listener, TinyControl

from actors.driver import DriverShell
from actors.local_ahead import AheadModel, threads_beside_a_load
from actors.local_runtime import LocalRuntime
from actors.local_storage import LocalStorage
from actors.rules import KNOWN_RULES
from actors.store_driver import StoreDriver
from actors.worker_driver import WorkerDriver
from bus.memory import MemoryServer
from bus.messages import (
    CancelRequested,
    Generation,
    LoadFailed,
    ModelAdded,
    ModelAttached,
    ModelFound,
    ModelLoaded,
    RequestEnded,
    RulesActivated,
    ServerReady,
    StartSequence,
    WorkerReady,
)
from loaders import pack_checkpoint, read_manifest
from loaders.arrival import Announcement
from loaders.packed import WEIGHTS_NAME, read_packed_header
from loaders.page_cache_tier import PageCacheTier
from loaders.shared_memory_tier import SharedMemoryTier
from models.contract import SequenceStart, TokenEvent
from models.sample import make_sample

PROMPT = "The harbour was quiet " * 4
ASKED = Generation(6, prompt=PROMPT, temperature=0.0)


class SlowTier(PageCacheTier):
    """Brings as many chunks as it was permitted to."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.permits = threading.Semaphore(0)

    def bring(
        self, directory: Path, *, before: Callable[[], None] | None = None, told: Announcement | None = None
    ) -> int:
        def permitted() -> None:
            while not self.permits.acquire(timeout=0.002):
                assert before is not None
                before()

        return super().bring(directory, before=permitted, told=told)


class World:
    """One server with one worker and its control."""

    def __init__(self, folder: Path, *, ahead: bool = True, shared: Path | None = None) -> None:
        server = MemoryServer("main")
        self.control = TinyControl(server.bus("control"))
        self.client = server.bus("client")
        arrivals = folder / "arriving"
        self.tier = SlowTier(folder / "state")
        tier = self.tier if shared is None else SharedMemoryTier(shared)
        self.runtime = LocalRuntime(folder / "models", dram=shared, arrivals=arrivals if ahead else None)
        storage = LocalStorage(folder / "models", context_limit=256, tier=tier, arrivals=arrivals)
        boots = (f"boot-{number}" for number in itertools.count())
        bus, store = server.bus("worker"), server.bus("store")
        self.shells = [
            DriverShell(store, store.subjects, driver, boot=lambda: next(boots))
            if isinstance(driver, StoreDriver)
            else DriverShell(bus, bus.subjects, driver, boot=lambda: next(boots))
            for driver in (
                StoreDriver("s1", dram_bytes=1 << 30, storage=storage),
                WorkerDriver(
                    bus, bus.subjects, "s1", 0, memory_bytes=1 << 30, max_slots=4, runtime=self.runtime, process=1
                ),
            )
        ]

    def permit(self, chunks: int) -> None:
        self.tier.permits.release(chunks)

    async def answer(self, name: str, generation: Generation = ASKED) -> tuple[Listener, asyncio.Task[list[int]]]:
        """Ask; the task has the tokens of the answer."""
        listener = await Listener(self.client).open()
        await self.control.request(name, "m", generation, listener.reply)

        async def tokens() -> list[int]:
            return [token for chunk in await listener.all() for token in chunk.tokens]

        return listener, asyncio.ensure_future(tokens())

    async def begun(self) -> None:
        """Until the worker computes with the first parts of the model, ahead of its attach."""
        await until(lambda: any(made.gate.closed < made.gate.parts for made in self.runtime._ahead.values()))

    async def let_go(self) -> None:
        """Until nothing is left of what was begun."""
        await until(lambda: not self.runtime._ahead)


def arrivals_open(folder: Path) -> list[str]:
    """What this process has open of what its store tells."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(path.readlink()))
    return [name for name in found if name.startswith(str(folder / "arriving"))]


async def until(reached: Callable[[], bool]) -> None:
    while not reached():  # noqa: ASYNC110 (threads get there)
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def world(folder: Path, *, ahead: bool = True, shared: Path | None = None) -> AsyncIterator[World]:
    here = World(folder, ahead=ahead, shared=shared)
    async with asyncio.timeout(60), here.control:
        tasks = [asyncio.ensure_future(shell.run()) for shell in here.shells]
        try:
            await here.control.state("cell", RulesActivated(KNOWN_RULES[-1]), "operator")
            await here.control.wait(ServerReady)
            await here.control.wait(WorkerReady)
            yield here
        finally:
            here.permit(10_000)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await here.runtime.reset()
            here.runtime.close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    make_sample(folder / "sample", arch="llama", parameters=1_500_000, seed=1, dtype="float32", context=512)
    pack_checkpoint(folder / "sample", folder / "packed", chunk_bytes=256 << 10)
    return folder / "packed"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "models" / "m")
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(packed, folder / "models" / "m")

    async def ask() -> list[int]:
        async with world(folder, ahead=False) as here:
            here.permit(10_000)
            return await (await here.answer("r0"))[1]

    return asyncio.run(ask())


async def test_the_first_layers_compute_while_the_last_are_on_their_way(folder: Path, undisturbed: list[int]) -> None:
    async with world(folder) as here:
        _, answer = await here.answer("r1")
        here.permit(8)
        await here.begun()
        assert not here.control.find(ModelLoaded) and not answer.done()
        made = here.runtime._ahead["m"]
        assert made.gate.closed, "what did not come yet is waited for"
        here.permit(10_000)
        assert await answer == undisturbed
        assert here.runtime._instances["m"] is made.instance, "what was begun is what answers"
        assert made.gate.passed
        again = await (await here.answer("r2"))[1]
        assert again == undisturbed
        kinds = [kind for _, _, kind in here.control.heard if isinstance(kind, ModelLoaded | ModelAttached)]
        assert [type(one) for one in kinds] == [ModelLoaded, ModelAttached], "nothing is stated ahead"
        assert not list((folder / "arriving").iterdir())
        await here.runtime.detach("m")
        assert not made.checkpoint.tensors, "an eviction frees what it holds"


async def test_a_load_that_fails_midway_fails_as_ever_and_no_token_leaves(folder: Path, undisturbed: list[int]) -> None:
    weights = folder / "models" / "m" / WEIGHTS_NAME
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-300] + bytes(byte ^ 255 for byte in whole[-300:-292]) + whole[-292:])
    ended = []
    for ahead in (True, False):
        async with world(folder, ahead=ahead) as here:
            listener, _ = await here.answer("r1")
            here.permit(8)
            if ahead:
                await here.begun()
            here.permit(10_000)
            ended.append(await here.control.wait(RequestEnded))
            assert here.control.find(LoadFailed) and not here.control.find(ModelAttached)
            assert not any(delivery.payload for delivery in listener.deliveries)
            await here.let_go()
    first, second = ended
    assert isinstance(first, RequestEnded) and isinstance(second, RequestEnded)
    assert "is damaged (its checksum differs)" in first.reason
    assert (first.code, first.reason, first.outcome) == (second.code, second.reason, second.outcome)
    weights.write_bytes(whole)
    async with world(folder) as here:
        here.permit(10_000)
        assert await (await here.answer("r1"))[1] == undisturbed


async def test_a_request_that_is_cancelled_takes_the_load_and_what_was_begun_with_it(
    folder: Path, undisturbed: list[int]
) -> None:
    async with world(folder) as here:
        _, answer = await here.answer("r1")
        here.permit(8)
        await here.begun()
        await here.control.state("requests", CancelRequested("r1"))
        failed = await here.control.wait(LoadFailed)
        assert isinstance(failed, LoadFailed) and failed.cancelled
        await here.control.wait(RequestEnded, outcome="cancelled")
        answer.cancel()
        await here.let_go()
        assert not here.control.find(StartSequence)
        here.permit(10_000)
        assert await (await here.answer("r2"))[1] == undisturbed


async def test_a_start_that_is_given_up_while_it_is_built_leaves_nothing(
    folder: Path, undisturbed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    building, go_on = threading.Event(), threading.Event()

    class SlowlyBuilt(AheadModel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            building.set()
            go_on.wait(20)
            super().__init__(*arguments, **options)

    monkeypatch.setattr("actors.local_runtime.AheadModel", SlowlyBuilt)
    async with world(folder) as here:
        _, answer = await here.answer("r1")
        here.permit(8)
        await until(building.is_set)
        await here.control.state("requests", CancelRequested("r1"))
        await here.control.wait(LoadFailed)
        answer.cancel()
        go_on.set()
        await here.runtime._in(here.runtime._attaching, lambda: None)
        await here.let_go()
        here.permit(10_000)
        assert await (await here.answer("r2"))[1] == undisturbed
        await until(lambda: not arrivals_open(folder))


async def test_a_worker_that_starts_anew_while_it_waits_leaves_nothing(folder: Path, undisturbed: list[int]) -> None:
    async with world(folder) as here:
        _, answer = await here.answer("r1")
        here.permit(8)
        await here.begun()
        epoch = here.shells[1].epoch
        await here.control.lose("gpu/s1/0", epoch)
        await here.control.wait(WorkerReady, 2)
        assert not here.runtime._ahead, "its thread came back, though the load stands still"
        here.permit(10_000)
        assert await answer == undisturbed


async def test_another_prompt_that_comes_first_is_answered_by_its_own(folder: Path, undisturbed: list[int]) -> None:
    """Two requests for a model that starts: what was prefilled is the first one's, whoever gets the first slot."""
    async with world(folder) as here:
        other = Generation(6, prompt="Ships", temperature=0.0)
        _, first = await here.answer("r1")
        _, second = await here.answer("r2", other)
        here.permit(8)
        await here.begun()
        here.permit(10_000)
        assert await first == undisturbed
        expected = await (await here.answer("r3", other))[1]
        assert await second == expected


@pytest.mark.parametrize(("threads", "cores", "beside"), [(2, 2, 1), (1, 1, 1), (1, 2, 1), (2, 4, 2), (16, 16, 15)])
def test_a_core_is_left_to_the_store(monkeypatch: pytest.MonkeyPatch, threads: int, cores: int, beside: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert threads_beside_a_load(threads) == beside


@pytest.mark.parametrize("damaged", [False, True])
async def test_nothing_is_computed_with_before_it_was_told(
    folder: Path, undisturbed: list[int], monkeypatch: pytest.MonkeyPatch, *, damaged: bool
) -> None:
    """The file that bytes come to holds noise until a chunk is told; where the load fails, all of it is let go."""
    packed = folder / "models" / "m"
    header, whole = read_packed_header(packed / WEIGHTS_NAME), (packed / WEIGHTS_NAME).read_bytes()
    coming = folder / "coming"
    coming.write_bytes(b"\x41" * len(whole))
    told = Announcement(folder / "arriving" / "m", read_manifest(packed).digest)
    told.begin(coming, len(header.checksums))
    runtime = LocalRuntime(folder / "models", arrivals=folder / "arriving")
    threads: list[int] = []
    monkeypatch.setattr("actors.local_ahead.torch.set_num_threads", threads.append)
    monkeypatch.setattr("actors.local_ahead.threads_beside_a_load", lambda count: count + 1)
    sizes = {"slots": 2, "kv_bytes": 1 << 26, "context": 256}
    made = await runtime.begin_ahead("m", **sizes)
    assert made is not None and await made.foresee(ASKED) and made.wants_step
    begun, step = made.instance.engine, asyncio.ensure_future(made.step())
    chunks = list(range(len(header.checksums)))
    random.Random(3).shuffle(chunks)
    with coming.open("r+b") as file:
        for chunk in chunks[:-1] if damaged else chunks:
            begin, end = (header.header.data_start + place for place in header.chunk_span(chunk))
            file.seek(begin)
            file.write(whole[begin:end])
            file.flush()
            told.arrived(chunk)
            await asyncio.sleep(0.002)
    told.end(whole=not damaged)
    await step
    own = torch.get_num_threads()
    assert threads[0] == own + 1 and set(threads[1:]) == {own}, "fewer while the weights come, all of them afterwards"
    assert await made.arrived() is not damaged and made.wants_step is False
    engine = await runtime.attach("m", read_manifest(packed).digest, **sizes)
    assert (engine is begun) is not damaged
    encoded = await runtime.encode("m", ASKED)
    engine.admit(SequenceStart("r/1", encoded.prompt, (), encoded.sampling))
    tokens, steps = [], 0
    while engine.active():
        (result,) = await runtime.step([("m", engine)])
        assert not result.error
        steps += 1
        tokens += [event.token for event in result.events if isinstance(event, TokenEvent)]
    assert tokens == undisturbed and steps == len(tokens)
    await runtime.reset()
    runtime.close()


@pytest.mark.parametrize("ends", ["well", "damaged"])
@pytest.mark.parametrize("tier", ["page cache", "shared memory"])
async def test_a_model_that_lies_elsewhere_computes_while_it_is_fetched(
    tier: str, ends: str, packed: Path, tmp_path: Path, undisturbed: list[int]
) -> None:
    origin = Path(shutil.copytree(packed, tmp_path / "origin"))
    if ends == "damaged":
        weights = bytearray((origin / WEIGHTS_NAME).read_bytes())
        weights[-300] ^= 1
        (origin / WEIGHTS_NAME).write_bytes(weights)
    permits, asked = threading.Semaphore(0), itertools.count()

    def slow(handler: Handler, name: str, number: int) -> bool:
        if name == WEIGHTS_NAME and handler.headers.get("Range") != "bytes=0-0" and next(asked) >= 12:
            permits.acquire(timeout=20)
        return False

    shared = Path("/dev/shm") / f"longshore-test-{os.getpid()}-{tmp_path.name}" if tier == "shared memory" else None
    try:
        with range_server(origin, slow) as server:
            async with world(tmp_path, shared=shared) as here:
                await here.control.state("placement", ModelAdded("m", server.url))
                await here.control.wait(ModelFound)
                listener, answer = await here.answer("r1")
                await here.begun()
                assert not here.control.find(ModelLoaded) and not answer.done()
                made = here.runtime._ahead["m"]
                assert made.gate.closed, "what did not come yet is waited for"
                permits.release(10_000)
                if ends == "well":
                    assert await answer == undisturbed
                    assert here.runtime._instances["m"] is made.instance, "what was begun is what answers"
                    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]
                else:
                    await here.control.wait(LoadFailed)
                    await here.let_go()
                    assert not here.control.find(ModelAttached)
                    assert not any(delivery.payload for delivery in listener.deliveries)
                assert not list((tmp_path / "arriving").iterdir())
    finally:
        permits.release(10_000)
        if shared is not None:
            shutil.rmtree(shared, ignore_errors=True)
