"""Fetching a packed checkpoint from elsewhere: every chunk is checked before it is written, and the whole is committed.

    remote ─▶ chunk in a ring ─▶ checksum ─▶ file (page cache ─▶ disk)             the page cache is the DRAM tier
    remote ─▶ chunk in shared memory ─▶ checksum ─▶ disk, past the page cache      shared memory is
    remote ─▶ chunk in a ring ─▶ checksum ─▶ disk, past the page cache             `keep_in_memory=False`

All stages are at work at once, in as many threads as the source takes: one pass fills the SSD and DRAM. The last is for
a model larger than the memory that it may have.

What a fetch that broke off has written is kept (`loaders.partial_file`): the next one, from the same source or another
that has the very same weights, goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from loaders import storage
from loaders.arrival import Announcement
from loaders.destination import check_replaceable, check_space, resolve_destination
from loaders.errors import CheckpointError, DestinationBusy
from loaders.header import HEADER_LIMIT_BYTES
from loaders.load import StageReport
from loaders.manifest import (
    COMPANION_LIMIT_BYTES,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    Manifest,
    check_agreement,
    parse_manifest,
    read_manifest,
)
from loaders.memory import MemoryPool
from loaders.model_copy import ModelCopy
from loaders.packed import WEIGHTS_NAME, PackedHeader, checksum_of, describe_chunk, parse_packed_region
from loaders.partial_file import PartialFile
from loaders.plan import DIRECT_BYTES
from loaders.remote import RemoteFile, RemoteSource, open_source

Progress = Callable[[int, int], None]
Filling = Callable[[Manifest, str], AbstractContextManager[ModelCopy | None]]
Where = Callable[[int, int], memoryview]
"""Of a chunk's offset and count: memory for it, with room for the count rounded up to DIRECT_BYTES."""


class FetchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a fetch did. Stages: read (the source), checksum, write (page cache or disk), sync (disk, at the end).

    `kept_bytes` of the weights an earlier fetch that broke off had left; they were read from the disk and checked.
    """

    source: str
    destination: str
    bytes: int
    seconds: float
    gigabytes_per_second: float
    stages: dict[str, StageReport]
    limit: str
    advice: str = ""
    kept_bytes: int = 0


def look_at_source(source: RemoteSource) -> Manifest:
    """The manifest of the packed checkpoint there, which agrees with the header of its weights.

    Nothing else is read. Raises CheckpointError.
    """
    manifest, _ = _manifest_of(source)
    file = source.open_large(WEIGHTS_NAME)
    try:
        _header_of(source, file, manifest)
    finally:
        file.close()
    return manifest


def read_companion(source: RemoteSource, manifest: Manifest, name: str) -> bytes:
    """A file beside the weights, as it was packed. Raises CheckpointError where it is another one."""
    stated = manifest.files[name]
    if stated.bytes > COMPANION_LIMIT_BYTES:
        raise CheckpointError(f"{source.name}/{name} would have {stated.bytes} bytes, more than is taken")
    content = source.read_small(name, stated.bytes)
    if len(content) != stated.bytes or f"{checksum_of(content):016x}" != stated.checksum:
        raise CheckpointError(f"{source.name}/{name} is not the file that was packed; pack it there again")
    return content


def _manifest_of(source: RemoteSource) -> tuple[Manifest, bytes]:
    """What it says, and as it stands there."""
    text = source.read_small(MANIFEST_NAME, MANIFEST_LIMIT_BYTES)
    return parse_manifest(text, f"{source.name}/{MANIFEST_NAME}"), text


def _header_of(source: RemoteSource, file: RemoteFile, manifest: Manifest) -> tuple[bytes, PackedHeader]:
    """Everything in front of the data, checked against the manifest."""
    where = Path(f"{source.name}/{WEIGHTS_NAME}")
    if file.bytes != manifest.bytes or file.bytes < 8:
        raise CheckpointError(f"{where} has {file.bytes} bytes, its manifest says {manifest.bytes}; pack it again")
    length = bytearray(8)
    file.read(memoryview(length), 0, 8)
    region_bytes = 8 + int.from_bytes(length, "little")
    if region_bytes > min(file.bytes, 8 + HEADER_LIMIT_BYTES):
        raise CheckpointError(f"{where}: its header claims {region_bytes} bytes, which cannot be; pack it again")
    region = length + bytearray(region_bytes - 8)
    file.read(memoryview(region)[8:], 8, region_bytes - 8)
    packed = parse_packed_region(bytes(region), file.bytes, where)
    check_agreement(manifest, packed, where.parent)
    return bytes(region), packed


def _digest_at(directory: Path) -> str:
    """Of the packed checkpoint there; empty where there is none that can be read."""
    try:
        return read_manifest(directory).digest
    except CheckpointError:
        return ""


class Fetch:
    """A fetch that another thread may cancel. `run` may be called once."""

    def __init__(
        self,
        source: RemoteSource,
        destination: Path,
        *,
        keep_in_memory: bool = True,
        digest: str = "",
        progress: Progress | None = None,
        before: Callable[[], None] | None = None,
        beside: Mapping[str, bytes] | None = None,
        filling: Filling | None = None,
        told: Announcement | None = None,
        told_of_file: bool = False,
    ) -> None:
        """`digest`, if given, is that of the very weights wanted: others are refused.

        `before()` is called by each thread before its next chunk: it may wait, and what it raises ends all. `beside`
        are small files of the fetcher's own, committed with the rest. `filling` gives memory of a DRAM tier to put the
        weights into on their way, if there is any to spare. `told` hears of every chunk that is in that memory and was
        checked or, with `told_of_file`, in the page cache. It hears the end from here where that memory is not kept,
        else from the caller, after `run`.
        """
        self._source, self._destination = source, Path(destination)
        self._keep, self._digest, self._progress = keep_in_memory, digest, progress
        self._before, self._beside = before, dict(beside or {})
        self._filling = filling
        self._told, self._told_of_file = told, told_of_file
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._unwanted = self._resumed = False
        self._seconds = {"read": 0.0, "checksum": 0.0, "write": 0.0}
        self._done_bytes = self._kept_bytes = 0

    def cancel(self, *, keep: bool = False) -> None:
        """`run` ends soon with a CheckpointError, and leaves nothing; with `keep`, what the next goes on with."""
        self._unwanted = self._unwanted or not keep
        self._stop.set()
        self._source.cancel()

    def _worth_keeping(self) -> bool:
        return (self._resumed or self._done_bytes > 0) and not self._unwanted

    def run(self) -> FetchReport:
        """Fetch, check, commit. Raises CheckpointError: then the destination is as it was before.

        What came until then stays beside it for the next attempt, but for a full disk or where this was cancelled.
        """
        began = time.perf_counter()
        source = self._source
        manifest, text = _manifest_of(source)
        if self._digest and manifest.digest != self._digest:
            raise CheckpointError(
                f"{source.name} holds other weights (digest {manifest.digest[:12]}) than those wanted "
                f"({self._digest[:12]}); fetch the version that is served there"
            )
        check_replaceable(self._destination)
        before = _digest_at(self._destination)
        needed = manifest.bytes + sum(stated.bytes for stated in manifest.files.values())
        check_space(self._destination.parent, needed - storage.partial_bytes(self._destination))
        companions = {name: read_companion(source, manifest, name) for name in manifest.files}
        small = companions | {MANIFEST_NAME: text} | self._beside
        file = source.open_large(WEIGHTS_NAME)
        try:
            region, packed = _header_of(source, file, manifest)
            with self._dram(manifest) as copy:
                synced = self._to_destination(manifest, file, region, packed, small, before, copy)
                if copy is not None and not self._finish(copy) and self._told is not None:
                    self._told.end(whole=False)
        finally:
            file.close()
        return self._report(manifest, file, time.perf_counter() - began, synced)

    def _to_destination(
        self,
        manifest: Manifest,
        file: RemoteFile,
        region: bytes,
        packed: PackedHeader,
        small: dict[str, bytes],
        before: str,
        copy: ModelCopy | None,
    ) -> float:
        """Everything, committed; the seconds that the weights' last sync took."""
        with storage.resuming_directory(self._destination, self._worth_keeping) as temporary:
            if before != manifest.digest == _digest_at(self._destination):
                raise DestinationBusy(f"another process has just fetched {self._destination}; look at it again")
            _clear(temporary)
            # Until their headers are compared, what an earlier one has left may be what is wanted.
            self._resumed = (temporary / WEIGHTS_NAME).exists()
            # Whoever begins before the end reads these while the weights come.
            for name, content in small.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                storage.write_file(temporary / name, content)
            synced = self._weights(file, packed, region, temporary / WEIGHTS_NAME, copy)
            if _manifest_of(self._source)[0] != manifest:
                raise CheckpointError(f"{self._source.name} changed while it was fetched; fetch it again")
        return synced

    def _finish(self, copy: ModelCopy) -> bool:
        """Whether the memory that was filled is what workers open from now on."""
        try:
            return copy.finish(self._destination)
        except CheckpointError:  # the SSD has it all the same
            return False

    @contextlib.contextmanager
    def _dram(self, manifest: Manifest) -> Iterator[ModelCopy | None]:
        """Memory of the DRAM tier; None where it has none now: then the weights come as far as the SSD."""
        with contextlib.ExitStack() as stack:
            copy = None
            if self._filling is not None:
                with contextlib.suppress(CheckpointError):
                    copy = stack.enter_context(self._filling(manifest, self._destination.name))
            yield copy

    # ---- the weights ------------------------------------------------------------------------------------------

    def _weights(
        self, file: RemoteFile, packed: PackedHeader, region: bytes, path: Path, copy: ModelCopy | None
    ) -> float:
        """Every chunk in its place in the file at `path`, and in `copy`; the seconds that the last sync took."""
        partial = PartialFile(path, region, file.bytes, cached=self._keep and copy is None)
        self._resumed = partial.resumed
        try:
            threads = max(1, min(file.threads, len(packed.checksums)))
            if copy is not None:
                copy.memory(0, len(region))[: len(region)] = region
            where = _ring(threads, packed) if copy is None else copy.memory
            if self._told is not None and (copy is not None or (self._told_of_file and self._keep)):
                weights = path if copy is None else copy.path
                self._told.begin(weights, len(packed.checksums), directory=path.parent)

            def handle(chunk: int) -> None:
                self._chunk(file, packed, chunk, where, partial)

            with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
                try:
                    for _ in pool.map(handle, range(len(packed.checksums))):
                        pass
                except BaseException:
                    self._stop.set()
                    self._source.cancel()
                    raise
            began = time.perf_counter()
            partial.sync()
            return time.perf_counter() - began
        finally:
            partial.close()

    def _chunk(self, file: RemoteFile, packed: PackedHeader, chunk: int, where: Where, partial: PartialFile) -> None:
        if self._before is not None:
            self._before()
        if self._stop.is_set():
            raise CheckpointError(f"fetching {self._source.name} was cancelled")
        begin, end = packed.chunk_span(chunk)
        offset, count = packed.header.data_start + begin, end - begin
        memory = where(offset, count)
        began = time.perf_counter()
        kept = partial.read_left(memory, offset, count) and checksum_of(memory[:count]) == packed.checksums[chunk]
        if not kept:
            file.read(memory, offset, count)
        read = time.perf_counter()
        if not kept and checksum_of(memory[:count]) != packed.checksums[chunk]:
            raise CheckpointError(
                f"{self._source.name}/{WEIGHTS_NAME}: {describe_chunk(packed, chunk)} came damaged (its checksum "
                "differs); verify the source, then fetch it again"
            )
        checked = time.perf_counter()
        if not kept:
            partial.write(memory, offset, count)
        written = time.perf_counter()
        if self._told is not None:
            self._told.arrived(chunk)
        with self._lock:
            self._seconds["read"] += read - began
            self._seconds["checksum"] += checked - read
            self._seconds["write"] += written - checked
            self._done_bytes += count
            self._kept_bytes += count if kept else 0
            if self._progress is not None:
                self._progress(self._done_bytes, packed.header.data_bytes)

    def _report(self, manifest: Manifest, file: RemoteFile, seconds: float, synced: float) -> FetchReport:
        stages = {name: StageReport(spent, file.threads, manifest.bytes) for name, spent in self._seconds.items()}
        stages["sync"] = StageReport(synced, 1, manifest.bytes)
        limit = max(stages, key=lambda name: stages[name].seconds / stages[name].threads)
        rate = manifest.bytes / seconds
        what = "the source" if limit == "read" else "this server's disk" if limit in ("write", "sync") else "checking"
        return FetchReport(
            source=self._source.name,
            destination=str(self._destination),
            bytes=manifest.bytes,
            seconds=seconds,
            gigabytes_per_second=rate / 1e9,
            stages=stages,
            limit=limit,
            advice=f"{what} was the limit: {rate / 1e9:.2f} GB/s in all",
            kept_bytes=self._kept_bytes,
        )


def _ring(threads: int, packed: PackedHeader) -> Where:
    """A block of memory per thread, used again for each of its chunks."""
    room = -(-packed.chunk_bytes // DIRECT_BYTES) * DIRECT_BYTES
    ring = MemoryPool(threads * (room + (2 << 20)), populate=False)
    local = threading.local()

    def where(offset: int, count: int) -> memoryview:
        if not hasattr(local, "block"):
            local.block = ring.take(room)
        memory: memoryview = local.block.memory
        return memory

    return where


def _clear(temporary: Path) -> None:
    """Of what an earlier fetch has left, everything but the weights."""
    for path in temporary.iterdir():
        if path.name == WEIGHTS_NAME and path.is_file():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def fetch_checkpoint(
    address: str | Path,
    destination: Path | str,
    *,
    keep_in_memory: bool = True,
    digest: str = "",
    progress: Progress | None = None,
) -> FetchReport:
    """Fetch the packed checkpoint at a directory, `http://` or `https://` into the directory `destination`.

    A packed checkpoint there is replaced as a whole. Afterwards it lies on the disk and, with `keep_in_memory`, in the
    page cache. Raises CheckpointError; the destination then is as it was before, and the next attempt goes on with what
    came.
    """
    fetch = Fetch(
        open_source(address),
        resolve_destination(destination),
        keep_in_memory=keep_in_memory,
        digest=digest,
        progress=progress,
    )
    return fetch.run()
