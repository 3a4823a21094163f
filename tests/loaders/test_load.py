"""Loads from disk into memory: equal to the files by any way, in order, and never half done when something fails."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders import CheckpointError, Manifest, open_checkpoint, verify_checkpoint
from loaders import direct as direct_module
from loaders.direct import Way
from loaders.hf import from_pretrained
from loaders.load import load_checkpoint, start_load
from loaders.memory import HUGE_PAGE_BYTES, MemoryPool
from loaders.plan import plan_load
from loaders.read_threads import PREFETCH, URGENT, ReadThreads
from loaders.room import Room

Packed = Callable[[str], tuple[Path, Manifest]]
WAYS: tuple[Way, ...] = ("direct", "buffered")
REAL_READ = direct_module.read_some


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
def test_a_packed_directory_by_either_way(name: str, way: Way, packed: Packed) -> None:
    directory, manifest = packed(name)
    loaded = load_checkpoint(directory, way=way)
    same(loaded.tensors, open_checkpoint(directory).tensors)
    report = loaded.report
    assert report.verified and report.bytes == manifest.bytes - plan_load(directory).pieces[0].offset
    assert set(report.stages) == {"read", "checksum"} and report.limit in report.stages


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_directory_of_several_shards(way: Way, sources: Callable[[str], Path]) -> None:
    directory = sources("llama")
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    expected = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    loaded = load_checkpoint(directory, way=way)
    same(loaded.tensors, expected)
    assert not loaded.report.verified, "nobody vouches for the bytes of a plain file"


def test_tensors_that_stand_badly_are_copied(tmp_path: Path, sources: Callable[[str], Path]) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(5, dtype=torch.float32)}
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((sources("llama") / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    # One space more in the header: every tensor moves by a byte, which the format allows.
    length = int.from_bytes(raw[:8], "little")
    moved = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(moved)
    same(load_checkpoint(tmp_path).tensors, tensors)


def test_tensors_may_be_written_and_the_file_stays(packed: Packed) -> None:
    directory, _ = packed("llama")
    before = (directory / "model.safetensors").read_bytes()
    loaded = load_checkpoint(directory)
    loaded.tensors["model.norm.weight"].add_(1)
    assert (directory / "model.safetensors").read_bytes() == before


def test_a_pool_is_used_again_once_nothing_views_its_memory(packed: Packed) -> None:
    directory, _ = packed("llama")
    needed = plan_load(directory).memory_bytes
    pool = MemoryPool(needed)
    loaded = load_checkpoint(directory, pool=pool)
    kept = loaded.tensors["model.norm.weight"]
    loaded.close()
    del loaded
    gc.collect()
    with pytest.raises(CheckpointError, match="no room"):
        load_checkpoint(directory, pool=pool)
    assert torch.equal(kept, torch.ones(64))
    del kept
    gc.collect()
    assert pool.free_bytes == pool.capacity_bytes
    load_checkpoint(directory, pool=pool).close()


def test_blocks_of_a_pool_do_not_overlap_and_free_pieces_join() -> None:
    pool = MemoryPool(4 * HUGE_PAGE_BYTES, populate=False)
    blocks = [pool.take(HUGE_PAGE_BYTES) for _ in range(4)]
    for value, block in enumerate(blocks):
        block.memory[:] = bytes([value]) * HUGE_PAGE_BYTES
        assert block.address % HUGE_PAGE_BYTES == 0
    assert [block.memory[7] for block in blocks] == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="no room"):
        pool.take(1)
    del blocks[2], blocks[1], block
    whole = pool.take(2 * HUGE_PAGE_BYTES)
    assert whole.bytes == 2 * HUGE_PAGE_BYTES


@pytest.mark.parametrize("capacity", [0, -1, 1 << 60])
def test_a_pool_that_cannot_be(capacity: int) -> None:
    with pytest.raises(CheckpointError, match=r"pool|memory"):
        MemoryPool(capacity)


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_disk_at_every_read_in_turn(way: Way, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = packed("qwen3")
    pieces = len(plan_load(directory).pieces)
    assert pieces > 2
    for failing in range(pieces):
        count = iter(range(10**6))

        def read(
            descriptor: int, memory: memoryview, offset: int, failing: int = failing, count: object = count
        ) -> int:
            if next(count) == failing:  # type: ignore[call-overload]
                raise OSError(errno.EIO, "broken")
            return REAL_READ(descriptor, memory, offset)

        monkeypatch.setattr(direct_module, "read_some", read)
        with pytest.raises(CheckpointError, match=r"model.safetensors: bytes .* cannot be read: Input/output error"):
            load_checkpoint(directory, way=way)


@pytest.mark.parametrize("way", WAYS)
def test_short_reads_are_continued(way: Way, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = packed("llama")

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        step = 4096 if way == "direct" else 4099
        return REAL_READ(descriptor, memory[:step], offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    loaded = load_checkpoint(directory, way=way)
    same(loaded.tensors, open_checkpoint(directory).tensors)


def test_a_file_system_without_direct_reads(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = packed("llama")
    refused = 0

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        nonlocal refused
        if os.get_blocking(descriptor):  # ours for buffered reads does not block
            refused += 1
            raise OSError(errno.EINVAL, "no direct reads here")
        return REAL_READ(descriptor, memory, offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    loaded = load_checkpoint(directory, way="direct")
    assert refused and loaded.report.way == "buffered"
    same(loaded.tensors, open_checkpoint(directory).tensors)


def test_a_file_that_shrinks_while_it_is_read(packed_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed_copy / "model.safetensors"
    size = path.stat().st_size

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        os.truncate(path, size // 2)
        return REAL_READ(descriptor, memory, offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    with pytest.raises(CheckpointError, match=r"ends at byte|damaged"):
        load_checkpoint(packed_copy, way="buffered")


def test_a_flipped_bit_is_named_with_chunk_and_tensors(packed_copy: Path) -> None:
    path = packed_copy / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-70_000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-70_000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=r"chunk \d+ of \d+ \(with .*damaged"):
        load_checkpoint(packed_copy)
    load_checkpoint(packed_copy, verify=False)


def test_the_first_tensors_are_there_before_the_last(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = packed("llama")
    plan = plan_load(directory)
    gate = threading.Event()

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        if offset >= plan.pieces[-1].offset:
            gate.wait(30)
        return REAL_READ(descriptor, memory, offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    load = start_load(directory, readers=ReadThreads(2))
    try:
        load.wait(["model.embed_tokens.weight"])
        expected = open_checkpoint(directory).tensors
        assert torch.equal(load.tensors["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
        assert not gate.is_set()
    finally:
        gate.set()
    load.wait(["lm_head.weight"])
    load.finish()
    same(load.tensors, expected)


def test_a_load_that_is_cancelled_ends_and_gives_nothing(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = packed("llama")
    entered, gate = threading.Event(), threading.Event()

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        entered.set()
        gate.wait(30)
        return REAL_READ(descriptor, memory, offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    pool = MemoryPool(plan_load(directory).memory_bytes, populate=False)
    load = start_load(directory, pool=pool, readers=ReadThreads(2))
    assert entered.wait(30)
    load.cancel()
    gate.set()
    with pytest.raises(CheckpointError, match="cancelled"):
        load.wait(["lm_head.weight"])
    with pytest.raises(CheckpointError, match="cancelled"):
        load.finish()
    assert not load.tensors
    del load
    gc.collect()
    assert pool.free_bytes == pool.capacity_bytes


def test_what_the_callers_progress_raises_ends_the_load(packed: Packed) -> None:
    directory, _ = packed("llama")

    def progress(done: int, total: int) -> None:
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        load_checkpoint(directory, progress=progress)


def test_waiting_for_a_tensor_that_is_not_there_names_it(packed: Packed) -> None:
    directory, _ = packed("llama")
    load = start_load(directory)
    with pytest.raises(CheckpointError, match="has no tensor 'nobody'"):
        load.wait(["nobody"])
    load.finish()


def test_what_somebody_waits_for_is_read_before_what_may_be_wanted(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = packed("llama")
    second, _ = packed("mixtral")
    order: list[str] = []
    gate = threading.Event()

    def note(name: str) -> Callable[[int, int], None]:
        return lambda done, total: order.append(name)

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        gate.wait(30)
        return REAL_READ(descriptor, memory, offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    readers = ReadThreads(1)
    prefetch = start_load(first, readers=readers, priority=PREFETCH, progress=note("prefetch"))
    urgent = start_load(second, readers=readers, priority=URGENT, progress=note("urgent"))
    gate.set()
    urgent.finish()
    prefetch.finish()
    assert order.index("urgent") <= 1, "at most what was begun already comes before"
    last = max(index for index, name in enumerate(order) if name == "urgent")
    assert order[: last + 1].count("prefetch") <= 1
    same(prefetch.tensors, open_checkpoint(first).tensors)
    same(urgent.tensors, open_checkpoint(second).tensors)
    readers.close()


def test_threads_that_are_closed_end_and_finish_what_they_were_given() -> None:
    readers = ReadThreads(3)
    done: list[int] = []
    for number in range(20):
        readers.submit(number % 3, lambda number=number: done.append(number))  # type: ignore[misc]
    readers.close()
    deadline = threading.Event()
    while len(done) < 20 and not deadline.wait(0.001):
        pass
    assert sorted(done) == list(range(20))


def test_an_index_that_lies_is_found_without_packing(llama_copy: Path) -> None:
    index = llama_copy / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first, *_, last = sorted(set(whole["weight_map"].values()))

    def refused(weight_map: dict[str, str], says: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=says):
            load_checkpoint(llama_copy)

    refused(whole["weight_map"] | {"ghost": last}, "lacks 'ghost', which the index says")
    refused(whole["weight_map"] | {"ghost": "model-00009-of-00003.safetensors"}, "lacks the shard")
    refused(whole["weight_map"] | {"ghost": "../outside.safetensors"}, "not a plain file name")
    shutil.copy(llama_copy / first, llama_copy / "again.safetensors")
    refused(whole["weight_map"] | {next(iter(load_file(llama_copy / first))): "again.safetensors"}, "in two shards")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "there is no directory"),
        ("http://host/model", "fetch it first"),
        ("n" * 300, "too long"),
        (__file__, "not a directory but a file"),
        ("/usr", "has no weights|not a packed"),
    ],
)
@pytest.mark.parametrize("use", [load_checkpoint, open_checkpoint, verify_checkpoint, from_pretrained])
def test_what_is_no_directory_of_a_model(
    use: Callable[[Path], object], place: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"{says}|no configuration" if place == "/usr" else says):
        use(Path(place))


def test_more_memory_than_there_is(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Room(0, 1 << 20, "the memory limit of the control group /g")
    monkeypatch.setattr("loaders.memory.memory_ceiling", lambda: few)
    with pytest.raises(CheckpointError, match=r"control group /g leaves 0\.00 GB: let other programs end"):
        load_checkpoint(packed("llama")[0])


def test_pickles_are_not_read_in_place(tmp_path: Path, sources: Callable[[str], Path]) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((sources("llama") / name).read_bytes())
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pack it first"):
        load_checkpoint(tmp_path)
