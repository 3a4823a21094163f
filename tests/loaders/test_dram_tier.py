"""What every DRAM tier promises, by one test for all: brought, shared, found by the next store, and gone when evicted.

Checkpoints are of some megabytes, so that pages in memory can be told from noise.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers

from loaders import CheckpointError, open_checkpoint, pack_checkpoint, read_manifest
from loaders.arrival import Announcement, Arrival
from loaders.doctor import examine_memory
from loaders.dram_tier import DramTier, choose_tier
from loaders.errors import NoRoom
from loaders.fetch import fetch_checkpoint
from loaders.mapping import FileMapping, drop_from_memory
from loaders.packed import WEIGHTS_NAME, checksum_of, read_packed_header
from loaders.page_cache_tier import PageCacheTier
from loaders.room import Room
from loaders.shared_memory_tier import SharedMemoryTier, huge_pages_in, weights_directory

SIZE = 24_000_000
Make = Callable[[], DramTier]


@pytest.fixture(scope="module")
def source(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dram")
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "source")
    for file in sources("llama").glob("tokenizer*"):
        shutil.copy(file, folder / "source")
    pack_checkpoint(folder / "source", folder / "packed")
    return folder / "packed"


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    """On a disk, cold: a copy whose pages were written and dropped."""
    copy = tmp_path / "models" / "m"
    copy.mkdir(parents=True)
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with (copy / WEIGHTS_NAME).open("rb") as opened:
        os.fsync(opened.fileno())
    drop_from_memory(copy / WEIGHTS_NAME)
    return copy


@pytest.fixture(params=["page cache", "shared memory", "shared memory, huge pages"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Every call is a store that starts again with what the ones before left."""
    if request.param == "page cache":
        yield lambda: PageCacheTier(tmp_path / "state")
        return
    with contextlib.ExitStack() as stack:
        if request.param == "shared memory":
            root = Path("/dev/shm") / f"longshore-test-{uuid.uuid4().hex}"
            stack.callback(SharedMemoryTier.remove, root)
        else:
            mount = tmp_path / "huge"
            mount.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "huge=advise,size=128m", "tmpfs", str(mount)]
            if subprocess.run(command, capture_output=True, check=False).returncode != 0:
                pytest.skip("only root may mount a tmpfs with huge pages")
            stack.callback(subprocess.run, ["umount", "-l", str(mount)], check=True)
            if not huge_pages_in(mount):
                pytest.skip("this kernel has no huge pages for a tmpfs")
            root = mount / "longshore"
        yield lambda: SharedMemoryTier(root)


def place(tier: DramTier, packed: Path) -> Path:
    return packed if tier.weights_root is None else weights_directory(tier.weights_root, packed)


def test_what_is_brought_is_held_and_equal(make: Make, packed: Path) -> None:
    tier = make()
    assert not tier.holds(packed)
    assert tier.held_bytes == 0
    assert tier.bring(packed) == tier.held_bytes == read_manifest(packed).bytes
    assert tier.holds(packed)
    where = place(tier, packed)
    assert FileMapping(where / WEIGHTS_NAME).resident_bytes() == read_manifest(packed).bytes
    assert (where / WEIGHTS_NAME).read_bytes() == (packed / WEIGHTS_NAME).read_bytes()
    assert {file.name for file in where.iterdir()} == {file.name for file in packed.iterdir()}
    with open_checkpoint(where, verify=True) as opened:
        assert opened.report.verified


def test_what_is_released_is_gone_from_memory(make: Make, packed: Path) -> None:
    tier = make()
    tier.bring(packed)
    where = place(tier, packed)
    before = free_bytes(where) if tier.weights_root else 0
    assert tier.release(packed) == 0
    assert not tier.holds(packed)
    if tier.weights_root is None:
        assert FileMapping(packed / WEIGHTS_NAME).resident_bytes() == 0
    else:
        assert not where.exists()
        assert free_bytes(tier.weights_root) - before >= SIZE
    assert tier.release(packed) == 0


def test_what_a_process_has_mapped_goes_with_that_process(make: Make, packed: Path) -> None:
    tier = make()
    tier.bring(packed)
    before = free_bytes(tier.weights_root) if tier.weights_root else 0
    with mapping_process(place(tier, packed)) as child:
        stayed = tier.release(packed)
        assert not tier.holds(packed)
        if tier.weights_root is None:
            assert stayed >= SIZE
        else:
            assert free_bytes(tier.weights_root) - before < SIZE
        tier.look_after()
        assert tier.weights_root is not None or FileMapping(packed / WEIGHTS_NAME).resident_bytes() >= SIZE
        child.kill()
        child.wait()
        tier.look_after()
        if tier.weights_root is None:
            assert FileMapping(packed / WEIGHTS_NAME).resident_bytes() == 0
        else:
            assert free_bytes(tier.weights_root) - before >= SIZE


def test_a_store_that_starts_again_finds_what_is_there(make: Make, packed: Path) -> None:
    make().bring(packed)
    again = make()
    assert again.holds(packed)
    assert again.release(packed) == 0
    assert not make().holds(packed)


def test_a_store_that_starts_again_believes_no_other_file(make: Make, packed: Path) -> None:
    make().bring(packed)
    manifest = json.loads((packed / "longshore.json").read_text())
    assert make().holds(packed)
    copy = packed.with_name("copy")
    packed.rename(copy)
    packed.mkdir()
    for file in copy.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    tier = make()
    # The page cache is of the file, and this is another one; a copy in shared memory was checked itself.
    assert tier.holds(packed) is (tier.weights_root is not None)
    assert manifest["digest"] == read_manifest(packed).digest


def test_what_no_model_is_left_for_is_let_go(make: Make, packed: Path) -> None:
    make().bring(packed)
    again = make()
    again.forget_others([packed])
    assert again.holds(packed)
    make().forget_others([])
    assert not make().holds(packed)


def test_damage_is_found_and_leaves_nothing_behind(make: Make, packed: Path) -> None:
    weights = packed / WEIGHTS_NAME
    with weights.open("r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)
        file.seek(SIZE // 2)
        file.write(bytes([byte[0] ^ 1]))
    tier = make()
    with pytest.raises(CheckpointError, match="damaged"):
        tier.bring(packed)
    assert not tier.holds(packed)
    assert tier.weights_root is None or list(tier.weights_root.iterdir()) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_every_chunk_is_told_once_it_is_there_and_checked(
    make: Make, packed: Path, tmp_path: Path, damaged: bool
) -> None:
    if damaged:
        with (packed / WEIGHTS_NAME).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
    tier, told = make(), Announcement(tmp_path / "told", "d")
    seen: list[Arrival] = []

    def before() -> None:
        found = seen[0] if seen else Arrival.find(tmp_path / "told")
        assert found is not None
        seen[:] = [found]
        with found.weights.open("rb") as weights:
            header = read_packed_header(packed / WEIGHTS_NAME)
            for chunk in range(found.chunks):
                if found.has(chunk, chunk + 1):
                    begin, end = header.chunk_span(chunk)
                    weights.seek(header.header.data_start + begin)
                    assert checksum_of(weights.read(end - begin)) == header.checksums[chunk]

    try:
        tier.bring(packed, before=before, told=told)
    except CheckpointError:
        assert damaged
    (found,) = seen
    chunks = found.chunks
    assert chunks >= 3
    assert found.has(0, chunks - 1) or damaged
    assert found.has(chunks - 1, chunks) is not damaged
    told.end(whole=not damaged)
    assert found.here is not damaged
    if not damaged:
        opened = (place(tier, packed) / WEIGHTS_NAME).stat().st_ino
        again = Announcement(tmp_path / "told", "d")
        tier.bring(packed, told=again)
        assert (place(tier, packed) / WEIGHTS_NAME).stat().st_ino == opened


def test_workers_share_the_pages(make: Make, packed: Path) -> None:
    tier = make()
    tier.bring(packed)
    where = place(tier, packed)
    with mapping_process(where) as one, mapping_process(where) as other:
        for child in (one, other):
            resident, proportional = memory_of(child.pid, where / WEIGHTS_NAME)
            assert resident >= SIZE
            assert proportional <= resident * 0.6


def test_huge_pages_are_had_where_they_are_said(make: Make, packed: Path) -> None:
    tier = make()
    tier.bring(packed)
    mapping = FileMapping(place(tier, packed) / WEIGHTS_NAME)
    mapping.want_huge_pages()
    mapping.populate(0, mapping.bytes)
    kind = mapping.page_kind()
    assert kind is not None
    if tier.weights_root is not None:
        assert (kind.huge_share > 0.5) == (", huge pages" in tier.description), tier.description


def huge_share(directory: Path) -> float:
    mapping = FileMapping(directory / WEIGHTS_NAME)
    mapping.want_huge_pages()
    mapping.populate(0, mapping.bytes)
    kind = mapping.page_kind()
    assert kind is not None
    return kind.huge_share


def test_what_was_fetched_has_the_huge_pages_that_there_are(source: Path, tmp_path: Path) -> None:
    fetch_checkpoint(source, tmp_path / "models" / "fetched")
    best = tmp_path / "best" / WEIGHTS_NAME
    best.parent.mkdir()
    with best.open("wb", buffering=0) as file:
        for _ in range(12):
            file.write(bytes(2 << 20))
    fetched, there_are = huge_share(tmp_path / "models" / "fetched"), huge_share(best.parent)
    assert fetched > there_are - 0.1, "chunks do not end where pages do"


# ---- the page cache alone ---------------------------------------------------------------------------------------


def test_locked_pages_stay_and_lost_ones_come_back(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = PageCacheTier(tmp_path / "state")
    tier.bring(packed)
    drop_from_memory(packed / WEIGHTS_NAME)
    assert tier.holds(packed)
    assert tier.look_after() == ((), ())
    tier.release(packed)
    assert tier.held_bytes == 0
    monkeypatch.setattr("loaders.page_cache_tier.memory_room", lambda: Room(0, 10**9, "a test"))
    tier.bring(packed)
    assert "not locked" in tier.description
    # It stays mapped by nobody's page tables, so the kernel may take it.
    drop_from_memory(packed / WEIGHTS_NAME)
    assert not tier.holds(packed)
    (said,), lost = tier.look_after()
    assert "are there again" in said and not lost
    assert tier.holds(packed)


@pytest.mark.parametrize("reason", ["damaged", "memory does not keep them"])
def test_what_cannot_be_brought_back_does_not_count_any_more(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr("loaders.page_cache_tier.memory_room", lambda: Room(0, 10**9, "a test"))
    tier = PageCacheTier(tmp_path / "state")
    tier.bring(packed)
    drop_from_memory(packed / WEIGHTS_NAME)
    if reason == "damaged":
        changed = (packed / WEIGHTS_NAME).stat().st_mtime_ns
        with (packed / WEIGHTS_NAME).open("r+b") as file:
            file.seek(SIZE // 2)
            byte = file.read(1)
            file.seek(SIZE // 2)
            file.write(bytes([byte[0] ^ 1]))
            os.fsync(file.fileno())
        os.utime(packed / WEIGHTS_NAME, ns=(changed, changed))
        drop_from_memory(packed / WEIGHTS_NAME)
    else:

        def in_vain(directory: Path, **_: object) -> None:
            """The pages come, and go at once."""

        monkeypatch.setattr("loaders.page_cache_tier.populate_checkpoint", in_vain)
    (said,), lost = tier.look_after()
    assert "cannot be brought back" in said and reason in said
    assert lost == (packed,) and tier.held_bytes == 0
    assert tier.look_after() == ((), ()), "it is said once"
    monkeypatch.undo()
    assert not tier.holds(packed) and not PageCacheTier(tmp_path / "state").holds(packed)


# ---- shared memory alone ----------------------------------------------------------------------------------------


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path("/dev/shm") / f"longshore-test-{uuid.uuid4().hex}"
    yield path
    SharedMemoryTier.remove(path)


def test_what_was_not_finished_is_removed_by_the_next_store(root: Path, packed: Path) -> None:
    tier = SharedMemoryTier(root)
    (root / ".half.0.loading").mkdir()
    (root / ".half.0.loading" / WEIGHTS_NAME).write_bytes(b"x" * mmap.PAGESIZE)
    SharedMemoryTier(root)
    assert list(root.iterdir()) == []
    tier.bring(packed)


@pytest.mark.parametrize("what", ["all", "weights", "config"])
def test_what_somebody_removed_is_noticed_and_comes_again(root: Path, packed: Path, what: str) -> None:
    tier = SharedMemoryTier(root)
    tier.bring(packed)
    copy = weights_directory(root, packed)
    assert tier.look_after() == ((), ())
    if what == "all":
        shutil.rmtree(copy)
    else:
        (copy / {"weights": WEIGHTS_NAME, "config": "config.json"}[what]).unlink()
    said, lost = tier.look_after()
    if what != "config":
        assert lost == (packed,) and "somebody has removed it from" in said[0]
        assert tier.held_bytes == 0 and tier.look_after() == ((), ())
    assert not tier.holds(packed)
    tier.bring(packed)
    assert tier.holds(packed) and {file.name for file in copy.iterdir()} == {file.name for file in packed.iterdir()}


def test_no_room_is_one_sentence_and_nothing_is_taken(
    root: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = SharedMemoryTier(root)
    monkeypatch.setattr("loaders.shared_memory_tier.ROOM_SECONDS", 0.0)
    monkeypatch.setattr("loaders.shared_memory_tier.room_in", lambda _: Room(1_000_000, 2_000_000, "a small machine"))
    with pytest.raises(NoRoom, match=r"m needs 0\.0\d GB of shared memory, and a small machine leaves 0\.00 GB"):
        tier.bring(packed)
    assert list(root.iterdir()) == []


def test_a_tmpfs_that_is_too_small_is_a_refusal(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True, check=False
    ).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        monkeypatch.setattr("loaders.shared_memory_tier.ROOM_SECONDS", 0.0)
        tier = SharedMemoryTier(mount / "longshore")
        with pytest.raises(NoRoom, match="the tmpfs at"):
            tier.bring(packed)
        # Also where the room goes away only while it is being filled: an error, no SIGBUS.
        monkeypatch.setattr("loaders.shared_memory_tier.room_in", lambda _: Room(1 << 40, 1 << 40, "nothing"))
        with pytest.raises(NoRoom, match="gives no"):
            tier.bring(packed)
        assert list((mount / "longshore").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_two_names_of_the_same_weights_lie_there_once(root: Path, packed: Path) -> None:
    other = packed.with_name("other")
    other.mkdir()
    for file in packed.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tier = SharedMemoryTier(root)
    tier.bring(packed)
    tier.bring(other)
    assert len(list(root.iterdir())) == 1
    tier.release(packed)
    assert tier.holds(other)
    tier.release(other)
    assert list(root.iterdir()) == []


def test_a_full_disk_keeps_no_tier_from_being_chosen(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loaders.doctor.os.pwrite", full)
    assert examine_memory(packed.parent).direct_reads in (True, False), "the model that lies there is tried"
    assert [path.name for path in packed.parent.iterdir() if "doctor" in path.name] == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty cannot be tried: No space left on device; name the directory"):
        examine_memory(tmp_path / "empty")


def test_the_kinds_that_can_be_chosen(packed: Path, tmp_path: Path) -> None:
    models = packed.parent
    auto = choose_tier("auto", models, server="s1")
    assert auto.description
    tier = choose_tier("shared-memory", models, server="s1")
    assert tier.weights_root is not None
    try:
        tier.bring(packed)
        assert "shared memory below /dev/shm/longshore-" in tier.description
        # Another kind gives back what this one left.
        assert "page cache" in choose_tier("page-cache", models, server="s1").description
        assert not tier.weights_root.exists()
    finally:
        SharedMemoryTier.remove(tier.weights_root)
    with pytest.raises(CheckpointError, match="is on a disk"):
        choose_tier(str(tmp_path), models, server="s1")
    with pytest.raises(CheckpointError, match="no kind of DRAM tier"):
        choose_tier("hbm", models, server="s1")


# ---- helpers ----------------------------------------------------------------------------------------------------


def free_bytes(directory: Path) -> int:
    told = os.statvfs(directory)
    return told.f_bfree * told.f_frsize


_MAP = """
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
for offset in range(0, len(mapped), 4096):
    mapped[offset]
print("mapped", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def mapping_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has every page of the weights mapped."""
    command = [sys.executable, "-c", _MAP, str(directory / WEIGHTS_NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "mapped\n"
        try:
            yield child
        finally:
            child.kill()


def memory_of(process: int, path: Path) -> tuple[int, int]:
    """Resident and proportional bytes of the mapping of `path`."""
    found = {"Rss:": 0, "Pss:": 0}
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and word in found:
            found[word] += int(rest[0]) * 1024
    return found["Rss:"], found["Pss:"]


def test_what_has_just_died_is_waited_for(root: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of a worker that is ending go with it, a moment after its lease."""
    rooms = iter([Room(0, 0, "a test"), Room(0, 0, "a test"), Room(1 << 40, 1 << 40, "a test")])
    monkeypatch.setattr("loaders.shared_memory_tier.room_in", lambda _: next(rooms))
    began = time.monotonic()
    SharedMemoryTier(root).bring(packed)
    assert time.monotonic() - began < 5
