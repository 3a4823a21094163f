"""A fetch that broke off is gone on with: what had come and is right is not fetched again, whatever happened to it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from range_server import Handler, RangeServer, range_server

from loaders import CheckpointError, Manifest, open_checkpoint, read_manifest, storage, verify_checkpoint
from loaders import direct as direct_reads
from loaders import http_source as http_module
from loaders.arrival import Announcement, Arrival
from loaders.fetch import Fetch, FetchReport, fetch_checkpoint
from loaders.packed import checksum_of, read_packed_header
from loaders.remote import open_source
from loaders.shared_memory_tier import SharedMemoryTier, key_of

Packed = Callable[[str], tuple[Path, Manifest]]
WEIGHTS = "model.safetensors"
AFTER = 9
"""Requests until the source is gone: with three for the header, some chunks have come by then."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "PAUSE_SECONDS", 0.001)


@pytest.fixture
def origin(packed: Packed) -> Path:
    return packed("llama")[0]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    directory = Path("/dev/shm") / f"longshore-test-{os.getpid()}-{tmp_path.name}"
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def break_off(origin: Path, destination: Path) -> Path:
    """A fetch whose source goes away in the middle; the file that it leaves."""
    seen = 0

    def gone(handler: Handler, name: str, number: int) -> bool:
        nonlocal seen
        seen += name == WEIGHTS
        if seen <= AFTER:
            return False
        handler.answer(404, b"gone")
        return True

    with range_server(origin, gone) as server, pytest.raises(CheckpointError, match="no such file"):
        fetch_checkpoint(server.url, destination)
    assert not destination.exists()
    return destination.with_name(f".{destination.name}.fetching") / WEIGHTS


def whole(destination: Path, origin: Path) -> None:
    verify_checkpoint(destination)
    assert sorted(path.name for path in destination.iterdir()) == sorted(path.name for path in origin.iterdir())
    assert (destination / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()
    assert not list(destination.parent.glob(f".{destination.name}*"))


def chunks_asked(server: RangeServer) -> int:
    return len([asked for name, asked in server.seen if name == WEIGHTS]) - 3


@pytest.mark.parametrize("keep", [True, False])
def test_the_next_source_goes_on_where_the_first_one_stopped(keep: bool, origin: Path, tmp_path: Path) -> None:
    break_off(origin, tmp_path / "copy")
    chunks = len(read_packed_header(origin / WEIGHTS).checksums)
    with range_server(origin) as server:
        report = fetch_checkpoint(server.url, tmp_path / "copy", keep_in_memory=keep)
        assert chunks_asked(server) < chunks
        assert report.kept_bytes == (chunks - chunks_asked(server)) * 65_536
    whole(tmp_path / "copy", origin)


def test_a_source_that_ignores_ranges_goes_on_too(origin: Path, tmp_path: Path) -> None:
    break_off(origin, tmp_path / "copy")

    def ignore(handler: Handler, name: str, number: int) -> bool:
        handler.give(origin / name, ranges=False)
        return True

    with range_server(origin, ignore) as server:
        assert fetch_checkpoint(server.url, tmp_path / "copy").kept_bytes > 0
    whole(tmp_path / "copy", origin)


def spoil_data(path: Path) -> None:
    """One bit of every chunk."""
    with path.open("r+b") as file:
        for place in range(read_packed_header(path).header.data_start + 100, path.stat().st_size, 65_536):
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))


def spoil_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"?")


def cut_short(path: Path) -> None:
    os.truncate(path, read_packed_header(path).header.data_start + 100)


def make_longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x" * 100_000)


def point_elsewhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def put_a_directory_there(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        (spoil_data, False),
        (spoil_header, False),
        (cut_short, False),
        (make_longer, True),
        (point_elsewhere, False),
        (put_a_directory_there, False),
    ],
)
def test_what_was_done_to_it_in_between_is_not_taken_for_data(
    spoil: Callable[[Path], None], kept: bool, origin: Path, tmp_path: Path
) -> None:
    spoil(break_off(origin, tmp_path / "copy"))
    assert (fetch_checkpoint(origin, tmp_path / "copy").kept_bytes > 0) is kept
    whole(tmp_path / "copy", origin)


def test_a_partial_directory_that_is_a_link_is_not_followed(origin: Path, tmp_path: Path) -> None:
    partial = break_off(origin, tmp_path / "copy").parent
    partial.rename(tmp_path / "elsewhere")
    partial.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere" / WEIGHTS).read_bytes()
    assert fetch_checkpoint(origin, tmp_path / "copy").kept_bytes == 0
    whole(tmp_path / "copy", origin)
    assert (tmp_path / "elsewhere" / WEIGHTS).read_bytes() == before


def test_nothing_of_other_weights_is_taken_over(packed: Packed, origin: Path, tmp_path: Path) -> None:
    break_off(origin, tmp_path / "copy")
    other = packed("qwen3")[0]
    assert fetch_checkpoint(other, tmp_path / "copy").kept_bytes == 0
    whole(tmp_path / "copy", other)


def test_a_part_that_the_disk_does_not_give_back_comes_from_the_source(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = break_off(origin, tmp_path / "copy")
    real = direct_reads.read_some

    def broken(descriptor: int, memory: memoryview, offset: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").resolve() == left:
            raise OSError(errno.EIO, "broken")
        return real(descriptor, memory, offset)

    monkeypatch.setattr(direct_reads, "read_some", broken)
    assert fetch_checkpoint(origin, tmp_path / "copy").kept_bytes == 0
    whole(tmp_path / "copy", origin)


def test_what_has_come_stays_when_the_next_one_fails_before_the_weights(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = break_off(origin, tmp_path / "m")

    def broken(path: Path, content: bytes) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_file", broken)
        with pytest.raises(CheckpointError, match="cannot be written"):
            fetch_checkpoint(origin, tmp_path / "m")
    assert weights.exists()
    assert fetch_checkpoint(origin, tmp_path / "m").kept_bytes > 0


def test_a_full_disk_keeps_nothing(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(origin, tmp_path / "copy")
    with monkeypatch.context() as patched:

        def full(descriptor: int, data: memoryview, offset: int) -> int:
            raise OSError(errno.ENOSPC, "full")

        patched.setattr(storage, "write", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            fetch_checkpoint(origin, tmp_path / "copy")
    assert list(tmp_path.glob(".copy*")) == []
    assert fetch_checkpoint(origin, tmp_path / "copy").kept_bytes == 0


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_cancelled_is_gone_unless_it_is_to_be_gone_on_with(keep: bool, origin: Path, tmp_path: Path) -> None:
    hangs, over = threading.Event(), threading.Event()

    def hang(handler: Handler, name: str, number: int) -> bool:
        if name != WEIGHTS or number < 12:
            return False
        hangs.set()
        over.wait(20)
        return True

    with range_server(origin, hang) as server:
        fetch = Fetch(open_source(server.url), tmp_path / "copy")
        ended: list[str] = []

        def run() -> None:
            with pytest.raises(CheckpointError) as failed:
                fetch.run()
            ended.append(str(failed.value))

        thread = threading.Thread(target=run)
        thread.start()
        assert hangs.wait(20)
        fetch.cancel(keep=keep)
        thread.join(10)
        over.set()
    assert ended and bool(list(tmp_path.glob(".copy.fetching"))) is keep
    assert (fetch_checkpoint(origin, tmp_path / "copy").kept_bytes > 0) is keep


def count_reads(monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[int]:
    """The bytes of each read of a file below `directory`, from now on."""
    real, counted = direct_reads.read_some, list[int]()

    def count(descriptor: int, memory: memoryview, offset: int) -> int:
        got = real(descriptor, memory, offset)
        if directory in Path(f"/proc/self/fd/{descriptor}").resolve().parents:
            counted.append(got)
        return got

    monkeypatch.setattr(direct_reads, "read_some", count)
    return counted


def into_shared_memory(tier: SharedMemoryTier, url: str, destination: Path) -> FetchReport:
    return Fetch(open_source(url), destination, filling=tier.filling).run()


def test_one_pass_fills_the_ssd_and_shared_memory(
    origin: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = SharedMemoryTier(root)
    models = tmp_path / "models"
    read = count_reads(monkeypatch, models)
    with range_server(origin) as server:
        into_shared_memory(tier, server.url, models / "m")
        assert chunks_asked(server) == len(read_packed_header(origin / WEIGHTS).checksums)
    assert tier.holds(models / "m") and tier.adopt(models / "m") and tier.bring(models / "m")
    assert read == []
    whole(models / "m", origin)
    copy = root / key_of(read_manifest(origin))
    verify_checkpoint(copy)
    assert (copy / WEIGHTS).read_bytes() == (origin / WEIGHTS).read_bytes()
    assert sorted(open_checkpoint(copy).tensors) == sorted(open_checkpoint(origin).tensors)


def test_what_had_come_is_read_once_into_shared_memory(
    origin: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    break_off(origin, models / "m")
    read = count_reads(monkeypatch, models)
    tier = SharedMemoryTier(root)
    report = into_shared_memory(tier, str(origin), models / "m")
    assert report.kept_bytes and tier.holds(models / "m") and tier.bring(models / "m")
    assert report.kept_bytes <= sum(read) <= (origin / WEIGHTS).stat().st_size, "no byte twice"
    verify_checkpoint(root / key_of(read_manifest(origin)))


def test_a_fetch_that_fails_leaves_nothing_in_shared_memory(origin: Path, root: Path, tmp_path: Path) -> None:
    tier = SharedMemoryTier(root)
    spoiled = Path(shutil.copytree(origin, tmp_path / "spoiled"))
    spoil_data(spoiled / WEIGHTS)
    with pytest.raises(CheckpointError, match="came damaged"):
        into_shared_memory(tier, str(spoiled), tmp_path / "m")
    assert list(root.iterdir()) == []


def test_without_room_in_shared_memory_it_comes_as_far_as_the_ssd(
    origin: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = SharedMemoryTier(root)
    monkeypatch.setattr("loaders.shared_memory_tier.ROOM_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(tier, "_promised", {0: 1 << 60})
        into_shared_memory(tier, str(origin), tmp_path / "m")
    whole(tmp_path / "m", origin)
    assert list(root.iterdir()) == [] and not tier.holds(tmp_path / "m")


def test_shared_memory_where_direct_writes_are_refused(
    origin: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storage.write

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        if os.O_DIRECT & _flags(descriptor):
            raise OSError(errno.EINVAL, "no")
        return real(descriptor, data, offset)

    monkeypatch.setattr(storage, "write", refuse)
    into_shared_memory(SharedMemoryTier(root), str(origin), tmp_path / "m")
    whole(tmp_path / "m", origin)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_every_chunk_is_told_once_it_is_in_memory_and_checked(
    shared: bool, resumed: bool, damaged: bool, origin: Path, root: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    if resumed:
        spoil_last(break_off(origin, models / "m"))
    source = Path(shutil.copytree(origin, tmp_path / "source"))
    if damaged:
        spoil_last(source / WEIGHTS)
    header = read_packed_header(origin / WEIGHTS)
    told = Announcement(tmp_path / "told", "d")
    seen: list[Arrival] = []
    most = 0

    def before() -> None:
        nonlocal most
        found = seen[0] if seen else Arrival.find(tmp_path / "told")
        assert found is not None and found.directory is not None
        seen[:] = [found]
        assert read_manifest(found.directory) == read_manifest(origin)
        assert read_packed_header(found.directory / WEIGHTS).checksums == header.checksums
        assert (found.directory / "config.json").read_bytes() == (origin / "config.json").read_bytes()
        found.check_in_place()
        there = [chunk for chunk in range(found.chunks) if found.has(chunk, chunk + 1)]
        most = max(most, len(there))
        with found.weights.open("rb") as weights:
            for chunk in there:
                begin, end = header.chunk_span(chunk)
                weights.seek(header.header.data_start + begin)
                assert checksum_of(weights.read(end - begin)) == header.checksums[chunk]

    filling = SharedMemoryTier(root).filling if shared else None
    fetch = Fetch(open_source(source), models / "m", before=before, filling=filling, told=told, told_of_file=not shared)
    if damaged:
        with pytest.raises(CheckpointError, match="came damaged"):
            fetch.run()
    else:
        assert (fetch.run().kept_bytes > 0) is resumed
    told.end(whole=not damaged)
    (found,) = seen
    last = found.chunks - 1
    assert most > 2 and found.here is not damaged and found.has(last, last + 1) is not damaged
    with pytest.raises(CheckpointError, match="was moved"):
        if damaged:
            assert found.directory is not None
            shutil.rmtree(found.directory)
        found.check_in_place()


def spoil_last(path: Path) -> None:
    """One byte of the last chunk."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("fetched", [False, True])
def test_memory_that_nobody_opens_afterwards_is_not_told_as_whole(
    fetched: bool, origin: Path, root: Path, tmp_path: Path
) -> None:
    """The same weights came to shared memory under another name meanwhile."""
    tier, told, seen = SharedMemoryTier(root), Announcement(tmp_path / "told", "d"), list[Arrival]()

    def before() -> None:
        if not seen and (found := Arrival.find(tmp_path / "told")):
            seen.append(found)
            tier.bring(origin)

    if fetched:
        Fetch(open_source(origin), tmp_path / "m", before=before, filling=tier.filling, told=told).run()
    else:
        tier.bring(Path(shutil.copytree(origin, tmp_path / "m")), before=before, told=told)
    told.end(whole=True)
    assert tier.holds(tmp_path / "m") and not (seen[0].here or seen[0].coming)


def test_without_room_in_shared_memory_nothing_is_told(
    origin: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of the file on the SSD are not this tier."""
    tier, told = SharedMemoryTier(root), Announcement(tmp_path / "told", "d")
    monkeypatch.setattr("loaders.shared_memory_tier.ROOM_SECONDS", 0.0)
    monkeypatch.setattr(tier, "_promised", {0: 1 << 60})

    def before() -> None:
        assert Arrival.find(tmp_path / "told") is None

    Fetch(open_source(origin), tmp_path / "m", before=before, filling=tier.filling, told=told).run()


def _flags(descriptor: int) -> int:
    text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("flags:")), 8)
