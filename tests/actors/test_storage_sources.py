"""Models that a server fetches: from the first source that gives them, whole or not at all, known again afterwards."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from range_server import Handler, range_server

from actors.driver_core import EpochOver
from actors.local_storage import LocalStorage
from actors.model_sources import SOURCE_NAME
from actors.stopping import LATER
from actors.store_driver import Loaded, StorageFailed, StoreDriver
from bus.messages import DeleteModel, EvictModel, HeldModel, ModelEvicted, ModelMissing
from loaders import direct, http_source, pack_checkpoint, resident_bytes, storage, verify_checkpoint
from loaders.mapping import drop_from_memory
from loaders.packed import read_packed_header
from loaders.shared_memory_tier import SharedMemoryTier, weights_directory
from models.sample import make_sample

WEIGHTS = "model.safetensors"
CHUNK_BYTES = 1 << 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_source, "PAUSE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of many small chunks."""
    folder = tmp_path_factory.mktemp("origin")
    make_sample(folder / "source", arch="llama", parameters=300_000, seed=1, dtype="float32", context=512)
    pack_checkpoint(folder / "source", folder / "packed", chunk_bytes=CHUNK_BYTES)
    return folder / "packed"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    directory = Path("/dev/shm") / f"longshore-test-{os.getpid()}-{tmp_path.name}"
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


async def digest_at(source: str, folder: Path) -> str:
    return (await LocalStorage(folder / "nowhere").find("m", source)).card.digest


def after(count: int, what: Callable[[Handler], None]) -> Callable[[Handler, str, int], bool]:
    """Misbehave from the count-th piece of the weights on."""
    seen = 0
    lock = threading.Lock()

    def misbehave(handler: Handler, name: str, number: int) -> bool:
        nonlocal seen
        if not name.endswith(WEIGHTS):
            return False
        with lock:
            seen += 1
            early = seen <= count
        if early:
            return False
        what(handler)
        return True

    return misbehave


async def test_what_a_source_has_is_found_without_fetching_it(origin: Path, models: Path) -> None:
    with range_server(origin) as server:
        found = await LocalStorage(models, context_limit=256).find("m", server.url)
        asked = [span for name, span in server.seen if name == WEIGHTS]
    local = await LocalStorage(origin.parent, context_limit=256).find("packed")
    assert found == HeldModel(found.card, "remote", server.url)
    assert (found.card.digest, found.card.context, found.card.chat) == (local.card.digest, 256, local.card.chat)
    assert all(asked) and len(asked) == 3, "its size, the length of its header, and its header"
    assert list(models.iterdir()) == []


async def test_a_fetched_model_lies_on_the_ssd_and_in_dram_and_its_source_is_known(origin: Path, models: Path) -> None:
    here = LocalStorage(models)
    with range_server(origin) as server:
        card = (await here.find("m", server.url)).card
        loaded = await here.load("m", card.digest, (server.url,))
        assert loaded == Loaded(card.weight_bytes, "remote", server.url, loaded.seconds)
    verify_checkpoint(models / "m")
    assert resident_bytes(models / "m") >= card.weight_bytes
    assert await here.scan() == (HeldModel(card, "dram", server.url),)
    assert (await here.load("m", card.digest, (server.url,))).tier == "ssd"
    await here.evict("m", "ssd")
    assert list(models.iterdir()) == [] and await here.scan() == ()


async def test_what_is_to_be_streamed_comes_to_the_ssd_alone(origin: Path, models: Path, tmp_path: Path) -> None:
    here = LocalStorage(models, arrivals=tmp_path / "arriving")
    with range_server(origin) as server:
        card = (await here.find("m", server.url)).card
        loaded = await here.load("m", card.digest, (server.url,), streamed=True)
        assert loaded == Loaded(card.weight_bytes, "remote", server.url, loaded.seconds)
    verify_checkpoint(models / "m")
    drop_from_memory(models / "m" / WEIGHTS)  # what the check has read
    again = await here.load("m", card.digest, (server.url,), streamed=True)
    assert again == Loaded(card.weight_bytes, "ssd", server.url, 0.0)
    assert resident_bytes(models / "m") < card.weight_bytes
    with pytest.raises(StorageFailed, match="not the ones that were placed"):
        await here.load("m", "other", streamed=True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"source": 3}', b'{"source": "relative"}', b"\xff" * 9, b"9" * 20000]
)
async def test_garbage_where_the_source_should_stand_is_passed_over(origin: Path, models: Path, content: bytes) -> None:
    shutil.copytree(origin, models / "m")
    (models / "m" / SOURCE_NAME).write_bytes(content)
    (held,) = await LocalStorage(models).scan()
    assert held.source == ""


async def test_a_source_that_dies_midway_is_followed_by_the_next(origin: Path, models: Path, tmp_path: Path) -> None:
    def gone(handler: Handler) -> None:
        handler.answer(503, b"")

    with range_server(origin, after(6, gone)) as dying, range_server(origin) as well:
        digest = await digest_at(well.url, tmp_path)
        loaded = await LocalStorage(models).load("m", digest, (dying.url, well.url))
        assert len(dying.seen) > 6
        asked = [span for name, span in well.seen if name == WEIGHTS]
        assert len(asked) < 6 + len(read_packed_header(origin / WEIGHTS).checksums), "what had come is not asked for"
    assert loaded.tier == "remote" and loaded.source == well.url
    verify_checkpoint(models / "m")
    assert [path.name for path in models.iterdir()] == ["m"]


async def test_what_changes_beneath_the_store_is_said_once(origin: Path, models: Path, tmp_path: Path) -> None:
    for name in ("m", "n"):
        shutil.copytree(origin, models / name)
    here = LocalStorage(models)
    before = {held.card.model: held.card.digest for held in await here.scan()}
    assert await here.look_after() == ""
    make_sample(tmp_path / "source", arch="llama", parameters=300_000, seed=2, dtype="float32", context=512)
    other = pack_checkpoint(tmp_path / "source", models / "m").digest
    assert await here.look_after() == "", "who packs it anew may tell of it yet"
    assert await here.look_after() == "not on the SSD as this server said, and nobody told it: m"
    assert [held.card.digest for held in await here.scan()] == [other, before["n"]]
    models.rename(tmp_path / "unmounted")
    assert [await here.look_after(), (await here.look_after())[-4:]] == ["", "m, n"]
    assert await here.scan() == () and await here.look_after() == await here.look_after() == ""
    (tmp_path / "unmounted").rename(models)
    assert [await here.look_after(), (await here.look_after())[-4:]] == ["", "m, n"]
    assert len(await here.scan()) == 2
    await here.delete("m")
    await here.evict("n", "ssd")
    assert await here.look_after() == await here.look_after() == "", "it was told"
    models.rmdir()
    models.write_text("")
    with pytest.raises(EpochOver, match=r"cannot be told: .*/models cannot be read: Not a directory"):
        await StoreDriver("s1", dram_bytes=1, storage=here).open()


async def test_a_failure_names_what_was_wrong_with_each_source(origin: Path, models: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_sample(tmp_path / "source", arch="llama", parameters=300_000, seed=2, dtype="float32", context=512)
    pack_checkpoint(tmp_path / "source", other)
    digest = await digest_at(str(origin), tmp_path)
    with range_server(tmp_path) as server, pytest.raises(StorageFailed) as failed:
        await LocalStorage(models).load("m", digest, ("/absent", f"{server.url}/none", str(other)))
    said = str(failed.value)
    assert not failed.value.gone
    assert said.startswith("m cannot be fetched from /absent: there is no directory /absent; from http://127.0.0.1:")
    assert "no such file (status 404)" in said and f"from {other}: {other} holds other weights" in said
    assert list(models.iterdir()) == []


async def test_a_damaged_model_is_fetched_again_where_its_source_is_known(origin: Path, models: Path) -> None:
    here = LocalStorage(models)
    card = (await here.find("m", str(origin))).card
    await here.load("m", card.digest, (str(origin),))
    data = bytearray((models / "m" / WEIGHTS).read_bytes())
    data[-1000] ^= 1
    (models / "m" / WEIGHTS).write_bytes(data)
    assert (await here.load("m", card.digest)).tier == "remote"
    verify_checkpoint(models / "m")


async def test_a_full_disk_is_said_once_and_leaves_nothing(
    origin: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await digest_at(str(origin), tmp_path)

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(StorageFailed, match=r"^m cannot be fetched: .*the disk is full; free some space") as failed:
        await LocalStorage(models).load("m", digest, (str(origin), str(origin) + "/"))
    assert not failed.value.gone and str(failed.value).count("the disk is full") == 1
    assert list(models.iterdir()) == []


def hanging() -> tuple[threading.Event, threading.Event, Callable[[Handler], None]]:
    """(it hangs, let it go on, what a server does then): a reply that does not come, and then breaks off."""
    hangs, over = threading.Event(), threading.Event()

    def hang(handler: Handler) -> None:
        hangs.set()
        over.wait(20)
        handler.close_connection = True

    return hangs, over, hang


@pytest.mark.parametrize("hangs_at", [0, 1, 5])
async def test_a_cancelled_load_ends_and_leaves_nothing(
    origin: Path, models: Path, tmp_path: Path, hangs_at: int
) -> None:
    hangs, over, hang = hanging()
    digest = await digest_at(str(origin), tmp_path)
    threads = threading.active_count()
    with range_server(origin, after(hangs_at, hang)) as server:
        here = LocalStorage(models)
        loading = asyncio.get_running_loop().create_task(here.load("m", digest, (server.url,)))
        await asyncio.to_thread(hangs.wait, 10)
        loading.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await loading
        assert list(models.iterdir()) == []
        over.set()
        assert (await here.load("m", digest, (str(origin),))).tier == "remote"
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch")], threads


async def test_a_load_that_is_cancelled_for_later_is_gone_on_with(origin: Path, models: Path, tmp_path: Path) -> None:
    hangs, over, hang = hanging()
    digest = await digest_at(str(origin), tmp_path)
    here = LocalStorage(models)
    with range_server(origin, after(6, hang)) as server:
        loading = asyncio.get_running_loop().create_task(here.load("m", digest, (server.url,)))
        await asyncio.to_thread(hangs.wait, 10)
        loading.cancel(LATER)
        with pytest.raises(asyncio.CancelledError):
            await loading
        over.set()
    assert await LocalStorage(models).scan() == (), "what is not whole is no model"
    with range_server(origin) as server:
        await LocalStorage(models).load("m", digest, (server.url,))
        asked = [span for name, span in server.seen if name == WEIGHTS]
    assert len(asked) < 3 + len(read_packed_header(origin / WEIGHTS).checksums)
    assert [path.name for path in models.iterdir()] == ["m"]


@pytest.mark.parametrize("how", ["another comes", "deleted", "evicted", "removed"])
async def test_what_broke_off_takes_no_room_from_others(how: str, origin: Path, models: Path, tmp_path: Path) -> None:
    digest = await digest_at(str(origin), tmp_path)
    here = LocalStorage(models)
    gone = after(6, lambda handler: handler.answer(404, b""))
    with range_server(origin, gone) as server, pytest.raises(StorageFailed):
        await here.load("m", digest, (server.url,))
    assert [path.name for path in models.iterdir()] == [".m.fetching"]
    if how == "another comes":
        await here.load("n", digest, (str(origin),))
    elif how == "deleted":
        answer = await StoreDriver("s1", dram_bytes=1, storage=here).obey(DeleteModel("m", digest))
        assert isinstance(answer, ModelMissing) and "does not lie on this server" in answer.reason
    elif how == "evicted":
        await here.evict("m", "ssd")
    else:
        removed = EvictModel("m", "the model is being removed", "remote")
        assert await StoreDriver("s1", dram_bytes=1, storage=here).obey(removed) == ModelEvicted("m")
    assert not (models / ".m.fetching").exists()


async def test_a_remote_load_into_shared_memory_reads_nothing_from_the_ssd(
    origin: Path, models: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = direct.read_some

    def count(descriptor: int, memory: memoryview, offset: int) -> int:
        read.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        return real(descriptor, memory, offset)

    here = LocalStorage(models, tier=SharedMemoryTier(root))
    with range_server(origin) as server:
        card = (await here.find("m", server.url)).card
        monkeypatch.setattr(direct, "read_some", count)
        assert (await here.load("m", card.digest, (server.url,))).tier == "remote"
    assert [path for path in read if models in path.parents] == []
    assert await here.scan() == (HeldModel(card, "dram", server.url),)
    verify_checkpoint(models / "m")
    verify_checkpoint(weights_directory(root, models / "m"))


async def test_a_prefetch_that_stands_still_holds_up_nobody_in_shared_memory(
    origin: Path, models: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(origin, models / "later")
    make_sample(tmp_path / "source", arch="llama", parameters=300_000, seed=2, dtype="float32", context=512)
    pack_checkpoint(tmp_path / "source", models / "now")
    here = LocalStorage(models, tier=SharedMemoryTier(root))
    later, now = [(await here.find(name)).card.digest for name in ("later", "now")]
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        asked_at = time.monotonic()
        with here._precedence.turn("network", urgent=True):
            prefetch = loop.create_task(here.load("later", later, urgent=False))
            while True:
                await asyncio.sleep(0.001)
                if list(root.glob(".*.loading")):
                    break
            stands_still_since = time.monotonic()
            assert (await here.load("now", now)).seconds
            assert not prefetch.done()
            stood_still = time.monotonic() - stands_still_since
        seconds = (await prefetch).seconds
        assert seconds is not None and 0 < seconds <= time.monotonic() - asked_at - stood_still
        assert (await here.load("now", now)).seconds == 0, "nothing was moved, and nothing is learned from that"


async def test_an_urgent_load_goes_before_a_prefetch(origin: Path, models: Path, tmp_path: Path) -> None:
    """The prefetch stands still between two chunks until the urgent load is done."""
    digest = await digest_at(str(origin), tmp_path)
    let_go, begun = threading.Event(), threading.Event()

    def slow(handler: Handler) -> None:
        begun.set()
        let_go.wait(20)
        handler.give(origin / WEIGHTS)

    with range_server(origin, after(3, slow)) as server:
        here = LocalStorage(models)
        with here._precedence.turn("network", urgent=True):
            prefetch = asyncio.get_running_loop().create_task(here.load("later", digest, (server.url,), urgent=False))
            urgent = asyncio.get_running_loop().create_task(here.load("now", digest, (str(origin),)))
            await urgent
            assert not prefetch.done() and not begun.is_set()
        let_go.set()
        await prefetch
    assert sorted(path.name for path in models.iterdir()) == ["later", "now"]


async def test_servers_that_share_a_directory_fetch_once(origin: Path, models: Path, tmp_path: Path) -> None:
    digest = await digest_at(str(origin), tmp_path)
    let_go, begun = threading.Event(), threading.Event()

    def slow(handler: Handler) -> None:
        begun.set()
        let_go.wait(20)
        handler.give(origin / WEIGHTS)

    with range_server(origin, after(4, slow)) as server:
        first = asyncio.get_running_loop().create_task(LocalStorage(models).load("m", digest, (server.url,)))
        await asyncio.to_thread(begun.wait, 10)
        second = asyncio.get_running_loop().create_task(LocalStorage(models).load("m", digest, (server.url,)))
        await asyncio.sleep(0)
        let_go.set()
        assert [(await one).tier for one in (first, second)] == ["remote", "ssd"]


async def test_what_a_killed_fetch_left_is_removed_at_the_next_start(origin: Path, models: Path) -> None:
    (models / ".m.packing-abc").mkdir()
    (models / ".m.packing-abc" / WEIGHTS).write_bytes(b"half")
    (models / ".m.packing").write_bytes(b"")
    (models / ".n.deleted").mkdir()
    with storage.replacing_directory(models / "busy") as at_work:
        assert await LocalStorage(models).scan() == ()
        assert at_work.is_dir(), "somebody is at work on it"
    assert [path.name for path in models.iterdir()] == ["busy"]
