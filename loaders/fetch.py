"""Fetching a packed checkpoint from elsewhere: every chunk is checked before it is written, and the whole is committed.

    remote ─▶ piece in a ring ─▶ checksum ─▶ file (page cache ─▶ disk)

All stages are at work at once, in as many threads as the source takes. What is written stays in the page cache: the
fetched model lies on the SSD and in DRAM when this ends. `keep_in_memory=False` drops each piece once it is on disk,
for a model larger than the memory that it may have.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from loaders import storage
from loaders.destination import check_replaceable, check_space
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
from loaders.packed import WEIGHTS_NAME, PackedHeader, checksum_of, describe_chunk, parse_packed_region
from loaders.plan import DIRECT_BYTES
from loaders.remote import RemoteFile, RemoteSource, open_source

_SYNC_FILE_RANGE_ALL = 7

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

Progress = Callable[[int, int], None]


class FetchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a fetch did. Stages: read (the source), checksum, write (page cache), sync (disk, at the end)."""

    source: str
    destination: str
    bytes: int
    seconds: float
    gigabytes_per_second: float
    stages: dict[str, StageReport]
    limit: str
    advice: str = ""


def look_at_source(source: RemoteSource) -> Manifest:
    """The manifest of the packed checkpoint there, which agrees with the header of its weights.

    Nothing else is read. Raises CheckpointError.
    """
    manifest = _manifest_of(source)
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


def _manifest_of(source: RemoteSource) -> Manifest:
    return parse_manifest(source.read_small(MANIFEST_NAME, MANIFEST_LIMIT_BYTES), f"{source.name}/{MANIFEST_NAME}")


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
    ) -> None:
        """`digest`, if given, is that of the very weights wanted: others are refused.

        `before()` is called by each thread before its next chunk: it may wait, and what it raises ends all. `beside`
        are small files of the fetcher's own, committed with the rest.
        """
        self._source, self._destination = source, Path(destination)
        self._keep, self._digest, self._progress = keep_in_memory, digest, progress
        self._before, self._beside = before, dict(beside or {})
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._seconds = {"read": 0.0, "checksum": 0.0, "write": 0.0}
        self._done_bytes = 0

    def cancel(self) -> None:
        """`run` ends soon with a CheckpointError, and leaves nothing behind."""
        self._stop.set()
        self._source.cancel()

    def run(self) -> FetchReport:
        """Fetch, check, commit. Raises CheckpointError: then the destination is as it was before."""
        began = time.perf_counter()
        source = self._source
        manifest = _manifest_of(source)
        if self._digest and manifest.digest != self._digest:
            raise CheckpointError(
                f"{source.name} holds other weights (digest {manifest.digest[:12]}) than those wanted "
                f"({self._digest[:12]}); fetch the version that is served there"
            )
        check_replaceable(self._destination)
        before = _digest_at(self._destination)
        companions = {name: read_companion(source, manifest, name) for name in manifest.files}
        file = source.open_large(WEIGHTS_NAME)
        try:
            region, packed = _header_of(source, file, manifest)
            check_space(self._destination.parent, manifest.bytes + sum(map(len, companions.values())))
            with storage.replacing_directory(self._destination) as temporary:
                if before != manifest.digest == _digest_at(self._destination):
                    raise DestinationBusy(f"another process has just fetched {self._destination}; look at it again")
                synced = self._weights(file, packed, region, temporary / WEIGHTS_NAME)
                for name, content in (companions | self._beside).items():
                    (temporary / name).parent.mkdir(exist_ok=True)
                    storage.write_file(temporary / name, content)
                storage.write_file(temporary / MANIFEST_NAME, source.read_small(MANIFEST_NAME, MANIFEST_LIMIT_BYTES))
                self._check_same_manifest(temporary, manifest)
        finally:
            file.close()
        return self._report(manifest, file, time.perf_counter() - began, synced)

    def _check_same_manifest(self, temporary: Path, manifest: Manifest) -> None:
        now = parse_manifest((temporary / MANIFEST_NAME).read_bytes(), f"{self._source.name}/{MANIFEST_NAME}")
        if now != manifest:
            raise CheckpointError(f"{self._source.name} changed while it was fetched; fetch it again")

    # ---- the weights ------------------------------------------------------------------------------------------

    def _weights(self, file: RemoteFile, packed: PackedHeader, region: bytes, path: Path) -> float:
        """Every chunk in its place in the file at `path`; the seconds that the last sync took."""
        descriptor = storage.create(path)
        try:
            storage.write_all(descriptor, region, 0)
            threads = max(1, min(file.threads, len(packed.checksums)))
            room = -(-packed.chunk_bytes // DIRECT_BYTES) * DIRECT_BYTES
            ring = MemoryPool(threads * (room + (2 << 20)), populate=False)
            local = threading.local()

            def handle(chunk: int) -> None:
                if not hasattr(local, "block"):
                    local.block = ring.take(room)
                self._chunk(file, packed, chunk, local.block.memory, descriptor)

            with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
                try:
                    for _ in pool.map(handle, range(len(packed.checksums))):
                        pass
                except BaseException:
                    self._stop.set()
                    self._source.cancel()
                    raise
            began = time.perf_counter()
            storage.sync(descriptor)
            return time.perf_counter() - began
        finally:
            os.close(descriptor)

    def _chunk(self, file: RemoteFile, packed: PackedHeader, chunk: int, memory: memoryview, descriptor: int) -> None:
        if self._before is not None:
            self._before()
        if self._stop.is_set():
            raise CheckpointError(f"fetching {self._source.name} was cancelled")
        begin, end = packed.chunk_span(chunk)
        offset, count = packed.header.data_start + begin, end - begin
        began = time.perf_counter()
        file.read(memory, offset, count)
        read = time.perf_counter()
        if checksum_of(memory[:count]) != packed.checksums[chunk]:
            raise CheckpointError(
                f"{self._source.name}/{WEIGHTS_NAME}: {describe_chunk(packed, chunk)} came damaged (its checksum "
                "differs); verify the source, then fetch it again"
            )
        checked = time.perf_counter()
        storage.write_all(descriptor, memory[:count], offset)
        # What stays in memory the kernel writes back by itself: to ask for it piece by piece made the threads wait for
        # each other at the file, and the whole two to three times slower.
        if not self._keep:
            _libc.sync_file_range(descriptor, offset, count, _SYNC_FILE_RANGE_ALL)
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        with self._lock:
            self._seconds["read"] += read - began
            self._seconds["checksum"] += checked - read
            self._seconds["write"] += written - checked
            self._done_bytes += count
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
        )


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
    page cache. Raises CheckpointError; the destination then is as it was before.
    """
    fetch = Fetch(
        open_source(address), Path(destination), keep_in_memory=keep_in_memory, digest=digest, progress=progress
    )
    return fetch.run()
