"""A model larger than the budget of DRAM: decided from rule version 3 on, leased without DRAM, read by its worker."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from cell_bench import SECOND, card
from packed_sample import pack_sample
from test_placement import Table, refusal, starts

from actors.gpu import Gpu
from actors.local_runtime import LocalRuntime
from actors.store import Store
from actors.worker_runtime import AttachRefused
from bus.messages import (
    AttachModel,
    DropModel,
    Generation,
    HeldModel,
    LeaseGranted,
    LeaseModel,
    LeaseRefused,
    LeaseReturned,
    LoadFailed,
    LoadModel,
    ModelHeld,
    ModelLoaded,
    ModelWarmed,
    PlacementDecided,
    ServerReady,
    StartInstance,
    StoreStarted,
    To,
    WarmModel,
    WorkerStarted,
)
from loaders import read_manifest
from loaders.mapping import cached_bytes, drop_from_memory
from loaders.packed import WEIGHTS_NAME
from loaders.shared_memory_tier import SharedMemoryTier
from models.contract import SequenceStart, TokenEvent

W, W1 = "gpu/s/0", "gpu/s/1"
AT = "/models/large"


def table(rules: int, dram: int) -> Table:
    made = Table()
    made.actor.rules = rules
    made.server("s", "a", HeldModel(card("large", weight=400)), dram=dram)
    return made


def test_it_starts_without_room_in_dram_and_takes_none_from_others() -> None:
    place = table(3, dram=40)
    place.worker(memory=600)
    assert starts(place.ask("r1", "large")) == [(W, "large", ())]
    assert starts(place.ask("r2", "a")) == [(W, "a", ())]
    server = place.actor.state.servers["s"]
    assert server.loading == {"a": 40} and server.leased["large"].weight_bytes == 0


def test_older_rules_refuse_it() -> None:
    place = table(2, dram=40)
    place.worker(memory=600)
    assert "400 bytes of DRAM" in refusal(place.ask("r1", "large")).reason


def far(rules: int, dram: int, *, ssd: int = 0) -> Table:
    """The large model lies at a source."""
    made = Table()
    made.actor.rules = rules
    held = (HeldModel(card("large", weight=400), "remote", AT), HeldModel(card("a")))
    made.tell(ServerReady("s", dram, held, ssd_bytes=ssd))
    made.worker(memory=600)
    return made


def test_from_elsewhere_it_starts_and_takes_room_on_the_ssd_alone() -> None:
    place = far(5, dram=40, ssd=440)
    (chosen,) = [to.message for to in place.ask("r1", "large") if isinstance(to.message, PlacementDecided)]
    server = place.actor.state.servers["s"]
    there, again = 400 * SECOND // server.remote_rate, 400 * SECOND // server.ssd_rate
    assert chosen.candidates[0].load_ns == there + again, "it comes to the SSD, and from there to the worker"
    assert starts(place.ask("r2", "a")) == [(W, "a", ())]
    assert server.loading == {"large": 400, "a": 40} and server.leased["large"].weight_bytes == 0
    place.tell(ModelHeld("s", card("large", weight=400), "ssd", 7, "remote", AT))
    assert server.loading == {"a": 40}, "it is there"


def test_from_elsewhere_older_rules_refuse_it() -> None:
    assert "400 bytes of DRAM" in refusal(far(4, dram=40).ask("r1", "large")).reason


def test_from_elsewhere_its_disk_must_still_be_large_enough() -> None:
    assert "on no SSD is room" in refusal(far(5, dram=40, ssd=420).ask("r1", "large")).reason


def test_its_worker_must_still_be_large_enough() -> None:
    place = table(3, dram=40)
    place.worker(memory=300)
    assert "bytes of device memory" in refusal(place.ask("r1", "large")).reason


def store(rules: int = 3) -> Store:
    made = Store("store/s")
    made.rules = rules
    made.handle(StoreStarted("s", 100, (HeldModel(card("a")), HeldModel(card("large", weight=400))), sequence=5), 0)
    return made


def test_its_lease_counts_nothing_and_keeps_its_files() -> None:
    here = store()
    granted = LeaseGranted("large", "d-large", "ssd", streamed=True)
    assert here.handle(LeaseModel(W, "large"), 1) == [To(W, granted)]
    assert here.state.dram_used() == 0
    loads = here.handle(LeaseModel(W, "a"), 2)
    assert [type(to.message) for to in loads] == [LoadModel]
    assert here.handle(DropModel("large"), 3) == [], "its files are in use"
    deleted = here.handle(LeaseReturned(W, "large"), 4)
    assert "DeleteModel" in str(deleted)


def test_from_elsewhere_it_is_fetched_to_the_ssd_and_leased_there() -> None:
    here = store(5)
    here.handle(StoreStarted("s", 100, (HeldModel(card("a"), "dram"),), sequence=9, ssd_bytes=500), 1)
    large = card("large", weight=400)
    asked = LeaseModel(W, "large", (AT,), card=large)
    driver, wish = "driver/store/s", WarmModel("large", 3, "remote", 1, 1, (AT,), large)
    (cold,) = [to.message for to in here.handle(wish, 2) if isinstance(to.message, ModelWarmed)]
    assert "400 bytes of DRAM" in cold.reason, "no operator has it in DRAM"
    assert here.handle(asked, 3) == [To(driver, LoadModel("large", "d-large", (AT,), streamed=True))]
    assert here.state.dram_used() == 40 and here.state.ssd_used() == 440
    again = here.handle(LoadFailed("large", "broken off", cancelled=True), 4)
    assert again == [To(driver, LoadModel("large", "d-large", (AT,), streamed=True))]
    said = here.handle(ModelLoaded("large", 400, 9, "remote", AT), 5)
    assert To(W, LeaseGranted("large", "d-large", "remote", streamed=True)) in said
    assert To("placement", ModelHeld("s", large, "ssd", 9, "remote", AT)) in said
    assert here.state.models["large"].leases == {W: False} and here.state.dram_used() == 40
    assert here.handle(LeaseModel(W1, "large"), 6) == [To(W1, LeaseGranted("large", "d-large", "ssd", streamed=True))]


def test_from_elsewhere_an_older_store_refuses_it() -> None:
    asked = LeaseModel(W, "far", (AT,), card=card("far", weight=400))
    (refused,) = [to.message for to in store(4).handle(asked, 1) if isinstance(to.message, LeaseRefused)]
    assert "400 bytes of DRAM" in refused.reason and not refused.retry


def test_a_restarted_store_does_not_take_it_for_dram() -> None:
    here = store()
    here.handle(LeaseModel(W, "large"), 1)
    here.handle(StoreStarted("s", 100, (HeldModel(card("large", weight=400)),), sequence=9), 2)
    assert here.state.models["large"].tier == "ssd" and here.state.dram_used() == 0
    assert here.state.models["large"].leases == {W: False}


def test_an_older_store_refuses_the_lease() -> None:
    ((refused),) = [to.message for to in store(2).handle(LeaseModel(W, "large"), 1)]
    assert isinstance(refused, LeaseRefused) and not refused.retry


def test_the_worker_is_told() -> None:
    gpu = Gpu(W)
    gpu.handle(WorkerStarted("s", 0, 600, 2, sequence=3), 0)
    gpu.handle(StartInstance("large", 2, 20, 10), 1)
    attach = gpu.handle(LeaseGranted("large", "d", "ssd", streamed=True), 2)
    assert attach == [To(f"driver/{W}", AttachModel("large", "d", 2, 20, 10, streamed=True))]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack_sample(tmp_path / "models", "tiny")


async def answer(runtime: LocalRuntime, packed: Path, *, streamed: bool) -> list[int]:
    digest = read_manifest(packed).digest
    engine = await runtime.attach("tiny", digest, slots=2, kv_bytes=1 << 24, context=64, streamed=streamed)
    prompt = await runtime.encode("tiny", Generation(8, prompt="The harbour", temperature=0.0))
    engine.admit(SequenceStart("r/1", prompt.prompt, (), prompt.sampling))
    tokens = []
    while engine.active():
        for result in await runtime.step([("tiny", engine)]):
            assert not result.error
            tokens += [event.token for event in result.events if isinstance(event, TokenEvent)]
    await runtime.detach("tiny")
    runtime.close()
    return tokens


async def test_the_worker_reads_it_past_the_page_cache(packed: Path) -> None:
    """The same answer as from DRAM, and its weights are not left in memory."""
    mapped = await answer(LocalRuntime(packed.parent), packed, streamed=False)
    drop_from_memory(packed / WEIGHTS_NAME)
    assert await answer(LocalRuntime(packed.parent), packed, streamed=True) == mapped
    assert cached_bytes(packed / WEIGHTS_NAME) < read_manifest(packed).bytes / 2


async def test_a_damaged_one_is_refused_by_the_worker(packed: Path) -> None:
    flip(packed / WEIGHTS_NAME)
    with pytest.raises(AttachRefused, match="damaged"):
        await answer(LocalRuntime(packed.parent), packed, streamed=True)


async def test_a_worker_maps_the_copy_in_shared_memory(packed: Path) -> None:
    """Shown by spoiling the file that it must not map."""
    root = Path("/dev/shm") / f"longshore-test-{uuid.uuid4().hex}"
    try:
        SharedMemoryTier(root).bring(packed)
        before = await answer(LocalRuntime(packed.parent, dram=root), packed, streamed=False)
        weights = packed / WEIGHTS_NAME
        weights.write_bytes(weights.read_bytes()[: -(1 << 20)] + bytes(1 << 20))
        assert await answer(LocalRuntime(packed.parent, dram=root), packed, streamed=False) == before
    finally:
        SharedMemoryTier.remove(root)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
