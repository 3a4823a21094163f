"""Bringing a packed file into memory and checking it on the way, without torch: what a store does, once per server.

Threads take chunk after chunk: populate, then hash while it is warm in the cache. Both run without the interpreter
lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from loaders.arrival import Announcement
from loaders.errors import CheckpointError, enumerate_some
from loaders.manifest import Manifest, check_agreement, check_companions, read_manifest
from loaders.mapping import FileMapping, drop_from_memory
from loaders.packed import (
    WEIGHTS_NAME,
    PackedHeader,
    checksum_of,
    describe_chunk,
    read_packed_header,
)

Progress = Callable[[int, int], None]
Before = Callable[[], None]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a load, a population or a verification did. Stages of several threads are summed, so they can exceed
    `seconds`.
    """

    path: str
    bytes: int
    """Bytes of the file that were brought in or checked; 0 for an attach."""
    chunks: int
    verified: bool
    seconds: float
    gigabytes_per_second: float
    """`bytes` / `seconds` / 1e9."""
    stages: dict[str, float]
    """Seconds per stage: header, populate, checksum, tensors."""
    threads: int
    huge_page_share: float | None
    """Share of the mapped bytes that huge pages back; None when it was not looked at."""
    pages: str
    """The same as a word: huge, mixed, small or unknown."""


def populate_checkpoint(
    directory: Path,
    *,
    verify: bool = True,
    progress: Progress | None = None,
    before: Before | None = None,
    told: Announcement | None = None,
) -> Report:
    """Brings model.safetensors into the page cache and checks every chunk, the header and the files beside it.

    Afterwards any process attaches with `open_checkpoint(directory, verify=False, populate=False)`. Raises
    CheckpointError with the damaged chunks and their tensors. `progress(bytes done, bytes in all)` is called from
    this thread, `before()` by each thread before its next chunk: it may wait, and what it raises ends all. `told` hears
    of every chunk that is there and checked. Does not import torch.
    """
    started = time.perf_counter()
    directory = Path(directory)
    _, packed, mapping = attach(directory, check_files=verify)
    header_seconds = time.perf_counter() - started
    if told is not None:
        told.begin(mapping.path, len(packed.checksums))
    return bring_in(
        mapping,
        packed,
        verify=verify,
        progress=progress,
        before=before,
        told=told if verify else None,
        started=started,
        header_seconds=header_seconds,
    )


def verify_checkpoint(directory: Path, *, progress: Progress | None = None) -> Report:
    """Checks every byte of a packed directory against its checksums; CheckpointError names the damaged chunks and
    tensors.
    """
    return populate_checkpoint(directory, verify=True, progress=progress)


def release_checkpoint(directory: Path) -> int:
    """Evicts the packed file from memory; how many bytes stayed is the answer: 0 unless some process has them
    mapped."""
    path = Path(directory) / WEIGHTS_NAME
    drop_from_memory(path)
    return FileMapping(path).resident_bytes()


def resident_bytes(directory: Path) -> int:
    """How many bytes of the packed file lie in memory now, in whole pages."""
    return FileMapping(Path(directory) / WEIGHTS_NAME).resident_bytes()


def attach(directory: Path, *, check_files: bool) -> tuple[Manifest, PackedHeader, FileMapping]:
    """Manifest, header and mapping of a packed directory, checked against each other; no data is read."""
    manifest = read_manifest(directory)
    path = directory / WEIGHTS_NAME
    if not path.exists():
        raise CheckpointError(f"{directory} has lost its {WEIGHTS_NAME}; pack the checkpoint again")
    packed = read_packed_header(path)
    check_agreement(manifest, packed, directory)
    if check_files:
        check_companions(manifest, directory)
    mapping = FileMapping(path)
    if mapping.bytes != manifest.bytes:
        raise CheckpointError(f"{path} changed while it was opened; open it again")
    return manifest, packed, mapping


def bring_in(
    mapping: FileMapping,
    packed: PackedHeader,
    *,
    verify: bool,
    progress: Progress | None,
    before: Before | None = None,
    told: Announcement | None = None,
    started: float,
    header_seconds: float,
) -> Report:
    """Populates the mapping chunk by chunk, and checks each chunk when `verify`; every damaged chunk is in the
    error."""
    mapping.want_huge_pages()
    data_start = packed.header.data_start
    mapping.populate(0, data_start)

    def handle(chunk: int) -> tuple[bool, float, float]:
        if before is not None:
            before()
        begin, end = packed.chunk_span(chunk)
        begun = time.perf_counter()
        mapping.populate(data_start + begin, data_start + end)
        populated = time.perf_counter()
        if not verify:
            return True, populated - begun, 0.0
        whole = checksum_of(mapping.memory[data_start + begin : data_start + end]) == packed.checksums[chunk]
        if whole and told is not None:
            told.arrived(chunk)
        return whole, populated - begun, time.perf_counter() - populated

    chunks = len(packed.checksums)
    # Measured: two threads reach the disk; more of them break up the kernel's read-ahead.
    threads = max(1, min(4, len(os.sched_getaffinity(0)), chunks))
    populate_seconds = checksum_seconds = 0.0
    damaged: list[int] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="populate") as pool:
        for chunk, (whole, populating, hashing) in enumerate(pool.map(handle, range(chunks))):
            populate_seconds += populating
            checksum_seconds += hashing
            if not whole:
                damaged.append(chunk)
            if progress:
                progress(data_start + packed.chunk_span(chunk)[1], mapping.bytes)
    if damaged:
        raise CheckpointError(_describe_damage(mapping.path, packed, damaged))
    seconds = time.perf_counter() - started
    kind = mapping.page_kind()
    share = kind.huge_share if kind else None
    return Report(
        path=str(mapping.path),
        bytes=mapping.bytes,
        chunks=chunks,
        verified=verify,
        seconds=seconds,
        gigabytes_per_second=mapping.bytes / seconds / 1e9,
        stages={"header": header_seconds, "populate": populate_seconds, "checksum": checksum_seconds},
        threads=threads,
        huge_page_share=share,
        pages="unknown" if share is None else "huge" if share > 0.9 else "mixed" if share > 0.1 else "small",
    )


def _describe_damage(path: Path, packed: PackedHeader, damaged: list[int]) -> str:
    text = f"{path}: {describe_chunk(packed, damaged[0])} is damaged (its checksum differs)"
    if len(damaged) > 1:
        others = enumerate_some([str(chunk) for chunk in damaged[1:]], 8).replace("'", "")
        text += f", and so are the chunks {others}"
    return text + "; pack or copy the checkpoint again"
