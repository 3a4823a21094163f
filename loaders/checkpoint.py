"""A packed checkpoint as tensors: views of the mapped file, nothing copied."""

from __future__ import annotations

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import msgspec
import torch

from loaders.dtypes import view_elements
from loaders.errors import CheckpointError
from loaders.manifest import Manifest
from loaders.mapping import FileMapping, PageKind
from loaders.packed import PackedHeader
from loaders.verification import Progress, Report, attach, bring_in

_PART_BYTES = 2 << 20
"""Threads that map one file begin at multiples of a huge page."""


class MappedCheckpoint:
    """The tensors of a packed checkpoint.

    `tensors` maps every name of the module's state, tied names included, to a view of the mapped file; two tied names
    have one address. The pages are read-only: writing to such a tensor ends the process with SIGSEGV. Views stay
    valid after `close`, which only lets go of what this object holds; the mapping ends with the last view.
    """

    def __init__(
        self, manifest: Manifest, tensors: dict[str, torch.Tensor], mapping: FileMapping, report: Report
    ) -> None:
        self.manifest = manifest
        self.tensors = tensors
        self.bytes = mapping.bytes
        self.report = report
        self._mapping: FileMapping | None = mapping

    @property
    def address_range(self) -> tuple[int, int]:
        """[begin, end) of the mapping in this process's memory."""
        mapping = self._open_mapping()
        return mapping.address, mapping.address + mapping.bytes

    def map_pages(self, threads: int = 2) -> None:
        """Every byte is in this process's page tables when this returns, so that no use of a tensor faults.

        Pages that lie in memory are only mapped by this. CheckpointError where one cannot be read.
        """
        mapping = self._open_mapping()
        part = -(-mapping.bytes // threads)
        part += -part % _PART_BYTES
        begins = range(0, mapping.bytes, part)
        with ThreadPoolExecutor(threads, thread_name_prefix="maps") as pool:
            for _ in pool.map(lambda begin: mapping.populate(begin, min(begin + part, mapping.bytes)), begins):
                pass

    def page_kind(self) -> PageKind | None:
        """What backs the pages that this process has touched so far; None where the kernel does not tell."""
        return self._open_mapping().page_kind()

    def close(self) -> None:
        """Lets go of the tensors and the mapping; may be called twice."""
        self.tensors = {}
        self._mapping = None

    def __enter__(self) -> MappedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_mapping(self) -> FileMapping:
        if self._mapping is None:
            raise CheckpointError("this checkpoint is closed; open it again")
        return self._mapping


def open_checkpoint(
    directory: Path, *, verify: bool = True, populate: bool = True, progress: Progress | None = None
) -> MappedCheckpoint:
    """Maps a packed directory. With `verify`, all bytes are read and checked (so they are populated too); with
    `populate` alone they
    are brought in unchecked; with neither this is the cheap attach to what `populate_checkpoint` brought in. The
    header is checked always.

    Raises CheckpointError: not packed, damaged (which chunk, which tensors), or from another packing than its manifest.
    """
    started = time.perf_counter()
    manifest, packed, mapping = attach(Path(directory), check_files=verify)
    header_seconds = time.perf_counter() - started
    if verify or populate:
        report = bring_in(
            mapping, packed, verify=verify, progress=progress, started=started, header_seconds=header_seconds
        )
    else:
        # What is touched for the first time later should be mapped by as few faults as possible.
        mapping.want_huge_pages()
        report = Report(
            path=str(mapping.path),
            bytes=0,
            chunks=0,
            verified=False,
            seconds=0.0,
            gigabytes_per_second=0.0,
            stages={"header": header_seconds},
            threads=0,
            huge_page_share=None,
            pages="unknown",
        )
    before = time.perf_counter()
    tensors = view_tensors(mapping, packed)
    report = msgspec.structs.replace(
        report,
        stages={**report.stages, "tensors": time.perf_counter() - before},
        seconds=time.perf_counter() - started,
    )
    return MappedCheckpoint(manifest, tensors, mapping, report)


def view_tensors(mapping: FileMapping, packed: PackedHeader) -> dict[str, torch.Tensor]:
    """Every tensor and alias as a view of the mapping; padding is left out."""
    header = packed.header
    tensors: dict[str, torch.Tensor] = {}
    if not header.data_bytes:
        return tensors
    with warnings.catch_warnings():
        # torch warns that the buffer is read-only. That is wanted: weights are never written, and if code tried, the
        # pages' protection would stop it before it changed what other processes compute with.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        data = torch.frombuffer(mapping.memory, dtype=torch.uint8, count=header.data_bytes, offset=header.data_start)
    for record in packed.tensors:
        tensors[record.name] = view_elements(data[record.begin : record.end], record.dtype, record.shape)
    for alias, name in packed.aliases.items():
        tensors[alias] = tensors[name]
    return tensors
