"""One contract for all places that a load may go to: this machine's memory, the processor as a device, CUDA devices.

CUDA is a runtime that copies as late, and in as strange an order, as the real one may; the real one is tested where
there is one. That the contract would notice a chunk used again too early is itself a test.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_cuda import SlowCuda

from loaders import CheckpointError, Manifest, load_checkpoint, open_checkpoint
from loaders import direct as direct_module
from loaders.device import CpuDevice, CudaDevice, Device, find_device
from loaders.device_target import TENSOR_ALIGNMENT, DeviceTarget, choose_devices, lay_out
from loaders.load import CheckpointLoad
from loaders.memory import MemoryPool
from loaders.plan import LoadPlan, PlacedTensor, plan_load
from loaders.read_threads import ReadThreads
from loaders.staging import Chunk, Mark, StagingRing
from loaders.targets import HostTarget, LoadTarget

Packed = Callable[[str], tuple[Path, Manifest]]
REAL_READ = direct_module.read_some
RING_CHUNK_BYTES = 8 << 20


@dataclass
class Place:
    """Somewhere to load to: `make` gives a target for a plan, `settle` says what must hold when no load is left."""

    make: Callable[[LoadPlan], LoadTarget]
    settle: Callable[[], None] = lambda: None
    devices: int = 1
    cuda: SlowCuda | None = None
    ring: StagingRing | None = field(default=None)


def host() -> Place:
    def make(plan: LoadPlan) -> LoadTarget:
        pool = MemoryPool(plan.memory_bytes, populate=False)
        return HostTarget(plan, pool.take(plan.memory_bytes), huge=pool.huge)

    return Place(make)


def processor() -> Place:
    return Place(lambda plan: DeviceTarget(plan, {"cpu": CpuDevice()}, choose_devices(plan, "cpu")))


def slow_cuda(seed: int, eager: float, devices: int = 1, chunks: int = 2) -> Place:
    """`devices` GPUs, tensors dealt out in turn; a ring of few chunks, so that each is used many times."""
    cuda = SlowCuda(seed, eager)
    ring = StagingRing(RING_CHUNK_BYTES, chunks, CudaDevice(0, cuda).lock_pages)

    def make(plan: LoadPlan) -> LoadTarget:
        names = {tensor.name: f"cuda:{number % devices}" for number, tensor in enumerate(plan.tensors)}
        there = {f"cuda:{number}": CudaDevice(number, cuda) for number in range(devices)}
        return DeviceTarget(plan, there, choose_devices(plan, names), ring)

    def settle() -> None:
        assert not cuda.under_way, "copies are under way after the load"
        ring.close()
        assert not cuda.registered and cuda.registrations == 1, "locked once, and given free"

    return Place(make, settle, devices, cuda, ring)


def real_cuda() -> Place:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return Place(lambda plan: DeviceTarget(plan, {"cuda:0": CudaDevice(0)}, choose_devices(plan, "cuda:0")))


PLACES: dict[str, Callable[[], Place]] = {
    "host": host,
    "processor as a device": processor,
    "cuda, copies as late as may be": lambda: slow_cuda(0, 0.0),
    "cuda, copies at any moment": lambda: slow_cuda(1, 0.6),
    "cuda, three devices": lambda: slow_cuda(2, 0.4, devices=3, chunks=3),
    "cuda, real": real_cuda,
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    made = PLACES[request.param]()
    yield made
    made.settle()


def begin(directory: Path, target: Callable[[LoadPlan], LoadTarget], **options: Any) -> CheckpointLoad:
    plan = plan_load(directory)
    return CheckpointLoad(plan, target(plan), ways=["buffered"] * len(plan.files), **options)


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name].cpu(), tensor), name


# ---- the contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_every_tensor_is_equal(name: str, place: Place, packed: Packed) -> None:
    directory, _ = packed(name)
    expected = open_checkpoint(directory).tensors
    for _ in range(3):  # over the same ring
        load = begin(directory, place.make)
        report = load.finish()
        same(load.tensors, expected)
        assert report.verified and report.limit in report.stages


def test_a_plain_directory_whose_tensors_stand_badly(
    place: Place, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(5, dtype=torch.float32), "c": torch.zeros(0)}
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((sources("llama") / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    # One space more in the header: every tensor moves by a byte, which the format allows.
    (tmp_path / "model.safetensors").write_bytes(
        (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    )
    load = begin(tmp_path, place.make)
    load.wait(["b"])
    assert torch.equal(load.tensors["b"].cpu(), tensors["b"])
    load.finish()
    same(load.tensors, tensors)


def test_several_shards(place: Place, sources: Callable[[str], Path]) -> None:
    directory = sources("llama")
    expected = {name: tensor for shard in directory.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    load = begin(directory, place.make)
    load.finish()
    same(load.tensors, expected)


def test_what_was_waited_for_is_there_before_the_end(
    place: Place, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = packed("llama")
    last = plan_load(directory).pieces[-1].offset
    gate = threading.Event()

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        if offset >= last:
            gate.wait(30)
        return REAL_READ(descriptor, memory, offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    load = begin(directory, place.make, readers=ReadThreads(2))
    name = "model.embed_tokens.weight"
    try:
        load.wait([name])
        assert torch.equal(load.tensors[name].cpu(), open_checkpoint(directory).tensors[name])
        assert not gate.is_set()
    finally:
        gate.set()
    load.finish()


def test_an_error_of_the_disk_leaves_nothing_under_way_and_the_place_usable(
    place: Place, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = packed("llama")
    pieces = len(plan_load(directory).pieces)
    for failing in range(0, pieces, 3):
        count = iter(range(10**6))

        def read(
            descriptor: int, memory: memoryview, offset: int, failing: int = failing, count: Iterator[int] = count
        ) -> int:
            if next(count) == failing:
                raise OSError(errno.EIO, "broken")
            return REAL_READ(descriptor, memory, offset)

        monkeypatch.setattr(direct_module, "read_some", read)
        load = begin(directory, place.make)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load.finish()
        assert not load.tensors
        assert place.cuda is None or not place.cuda.under_way
    monkeypatch.undo()
    load = begin(directory, place.make)
    load.finish()
    same(load.tensors, open_checkpoint(directory).tensors)


def test_two_loads_at_once(place: Place, packed: Packed) -> None:
    directories = [packed(name)[0] for name in ("llama", "mixtral")]
    readers = ReadThreads(4)
    loads = [begin(directory, place.make, readers=readers) for directory in directories]
    for load, directory in zip(loads, directories, strict=True):
        load.finish()
        same(load.tensors, open_checkpoint(directory).tensors)
    readers.close()


# ---- what devices have more -------------------------------------------------------------------------------------


class ForgetfulRing(StagingRing):
    """Chunks are used again without a look at their copies: what must never be."""

    def give_back(self, chunk: Chunk, marks: Sequence[Mark] = ()) -> None:
        super().give_back(chunk)


def test_the_contract_notices_a_chunk_that_is_used_again_too_early(packed: Packed) -> None:
    directory, _ = packed("llama")
    cuda = SlowCuda()
    ring = ForgetfulRing(RING_CHUNK_BYTES, 2, CudaDevice(0, cuda).lock_pages)
    load = begin(
        directory,
        lambda plan: DeviceTarget(plan, {"cuda:0": CudaDevice(0, cuda)}, choose_devices(plan, "cuda:0"), ring),
    )
    load.finish()
    with pytest.raises(AssertionError):
        same(load.tensors, open_checkpoint(directory).tensors)


def test_one_allocation_per_device_and_aligned_tensors(packed: Packed) -> None:
    directory, _ = packed("llama")
    place = slow_cuda(3, 0.2, devices=2)
    assert place.cuda is not None
    load = begin(directory, place.make)
    load.finish()
    assert [index for index, _ in place.cuda.allocations] == [0, 1]
    storages = {tensor.untyped_storage().data_ptr() for tensor in load.tensors.values()}
    assert len(storages) == 2
    for tensor in load.tensors.values():
        assert tensor.storage_offset() * tensor.element_size() % TENSOR_ALIGNMENT == 0
    assert place.cuda.latest > 1, "copies were in flight at once"
    place.settle()


def test_pieces_go_in_few_copies(packed: Packed) -> None:
    directory, _ = packed("llama")
    place = slow_cuda(4, 0.0)
    assert place.cuda is not None
    begin(directory, place.make).finish()
    assert place.cuda.copies <= 2 * len(plan_load(directory).pieces), "neighbours are copied together"
    place.settle()


@pytest.mark.parametrize(("lost", "words"), [(False, "takes no more weights"), (True, "does not answer any more")])
def test_a_device_that_fails_takes_no_other_load_with_it(lost: bool, words: str, packed: Packed) -> None:
    first, second = packed("llama")[0], packed("mixtral")[0]
    cuda = SlowCuda(failing={1: 3}, lost=lost)
    # Each of four threads may lose one chunk with the device.
    ring = StagingRing(RING_CHUNK_BYTES, 5, CudaDevice(0, cuda).lock_pages)
    readers = ReadThreads(4)

    def target(number: int) -> Callable[[LoadPlan], LoadTarget]:
        name = f"cuda:{number}"
        device: Device = CudaDevice(number, cuda)
        return lambda plan: DeviceTarget(plan, {name: device}, choose_devices(plan, name), ring)

    dying = begin(first, target(1), readers=readers)
    with pytest.raises(CheckpointError, match=f"cuda:1 {words}"):
        dying.finish()
    assert not dying.tensors
    living = begin(second, target(0), readers=readers)
    living.finish()
    same(living.tensors, open_checkpoint(second).tensors)
    readers.close()


def test_a_load_without_a_ring_locks_its_own_once_and_frees_it(packed: Packed) -> None:
    directory, _ = packed("llama")
    cuda = SlowCuda(5, 0.3)
    devices: dict[str, Device] = {"cpu": CpuDevice(), "cuda:0": CudaDevice(0, cuda), "cuda:1": CudaDevice(1, cuda)}
    names = {"": "cpu", "model.layers.0": "cuda:0", "model.layers.1": "cuda:1"}
    load = begin(directory, lambda plan: DeviceTarget(plan, devices, choose_devices(plan, names)))
    assert len(cuda.registered) == 1
    load.finish()
    assert cuda.registrations == 1 and not cuda.registered and not cuda.under_way
    same(load.tensors, open_checkpoint(directory).tensors)


def test_a_ring_that_lost_all_its_chunks_says_so() -> None:
    ring = StagingRing(4096, 1)
    ring.lose(ring.take())
    with pytest.raises(CheckpointError, match="all chunks"):
        ring.take()


def test_a_ring_with_chunks_too_small(packed: Packed) -> None:
    directory, _ = packed("llama")
    plan = plan_load(directory)
    with pytest.raises(CheckpointError, match="larger chunks"):
        DeviceTarget(plan, {"cpu": CpuDevice()}, choose_devices(plan, "cpu"), StagingRing(4096, 2))


def test_a_map_by_the_beginnings_of_names(packed: Packed) -> None:
    plan = plan_load(packed("qwen3")[0])
    chosen = choose_devices(plan, {"": "cuda:1", "model.layers.0": "cuda:0", "model.norm.weight": "cpu"})
    assert chosen["model.layers.0.mlp.up_proj.weight"] == "cuda:0"
    assert chosen["model.layers.1.mlp.up_proj.weight"] == "cuda:1"
    assert chosen["model.norm.weight"] == "cpu"
    with pytest.raises(CheckpointError, match=r"says nothing of tensor .*embed_tokens"):
        choose_devices(plan, {"model.layers": "cuda:0"})


def test_a_layout_with_empty_tensors_and_devices_in_turn() -> None:
    tensors = [
        PlacedTensor("a", "U8", (10,), 0, 10),
        PlacedTensor("empty", "U8", (0,), 10, 10),
        PlacedTensor("b", "U8", (300,), 10, 310),
        PlacedTensor("c", "U8", (5,), 310, 315),
    ]
    layout = lay_out(tensors, {"a": 0, "empty": 1, "b": 0, "c": 1}, 3)
    assert layout.offsets == {"a": 0, "b": 256, "empty": 0, "c": 0}
    assert layout.device_bytes == (556, 5, 0)
    assert [(span.begin, span.end) for span in layout.spans] == [(0, 10), (10, 10), (10, 310), (310, 315)]


def test_load_checkpoint_over_a_map_of_devices(packed: Packed) -> None:
    directory, _ = packed("qwen3")
    loaded = load_checkpoint(directory, device={"": "cpu"})
    same(loaded.tensors, open_checkpoint(directory).tensors)
    assert set(loaded.report.stages) == {"read", "checksum", "copy"}
    same(load_checkpoint(directory, device="cpu").tensors, open_checkpoint(directory).tensors)


@pytest.mark.parametrize(
    ("name", "words"),
    [("cuda:99", "is not here"), ("meta", "cannot be loaded to meta"), ("gpu", "names no device")],
)
def test_a_device_that_is_not_here(name: str, words: str, packed: Packed) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(packed("llama")[0], device=name)
    with pytest.raises(CheckpointError, match=words):
        find_device(name)
