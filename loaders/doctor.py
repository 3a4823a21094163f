"""What this system grants for weights in memory: found out by trying, said with what would be better.

Huge pages decide whether a start from DRAM depends on the model's size. Three kinds of memory can hold weights for all
workers of a server: the page cache of the packed file, shared memory, and pages of the hugetlb pool.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from loaders.direct import LargeFile
from loaders.errors import CheckpointError
from loaders.mapping import FileMapping
from loaders.memory import HUGE_PAGE_BYTES, MemoryPool
from loaders.packed import WEIGHTS_NAME
from loaders.shared_memory_tier import huge_pages_in

_PROBE_BYTES = 16 << 20
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_SHARED = Path("/dev/shm")


class MemoryFinding(msgspec.Struct, frozen=True):
    """One kind of memory: whether huge pages back it here, and what to do where they do not."""

    kind: str
    huge_pages: bool
    found: str
    advice: str = ""


class MemoryReport(msgspec.Struct, frozen=True):
    """`best`: the kind that a store takes here."""

    best: str
    direct_reads: bool
    findings: tuple[MemoryFinding, ...]


def examine_memory(directory: Path) -> MemoryReport:
    """Try every kind; `directory` is where models lie or are to lie. Raises CheckpointError where it cannot be used."""
    cache = _page_cache(directory)
    shared = _shared_memory()
    private = _private_memory()
    reserved = _reserved_pages()
    findings = (cache, shared, private, reserved)
    best = "page cache" if cache.huge_pages or not shared.huge_pages else "shared memory"
    return MemoryReport(best, _direct_reads(directory), findings)


def _page_cache(directory: Path) -> MemoryFinding:
    with _probe_file(directory) as path:
        mapping = FileMapping(path)
        mapping.want_huge_pages()
        mapping.populate(0, min(mapping.bytes, _PROBE_BYTES))
        kind = mapping.page_kind()
    share = kind.huge_share if kind else 0.0
    if share > 0.5:
        return MemoryFinding("page cache", True, f"{share:.0%} of a packed file is mapped by huge pages")
    return MemoryFinding(
        "page cache",
        False,
        "a packed file is mapped by small pages",
        "put the models on ext4, xfs or btrfs under a kernel from 6.16 on, which keep files in large folios",
    )


def _shared_memory() -> MemoryFinding:
    try:
        huge = huge_pages_in(_SHARED)
    except (OSError, CheckpointError) as error:
        return MemoryFinding("shared memory", False, f"{_SHARED} cannot be used: {error}", "mount a tmpfs there")
    if huge:
        return MemoryFinding("shared memory", True, f"a file in {_SHARED} is mapped by huge pages")
    return MemoryFinding(
        "shared memory",
        False,
        f"a file in {_SHARED} is mapped by small pages",
        f"as root: mount -o remount,huge=advise {_SHARED}, or mount a tmpfs of its own so, and name it by --dram-tier",
    )


def _private_memory() -> MemoryFinding:
    setting = _chosen(_THP / "enabled")
    if setting in ("always", "madvise") and MemoryPool(HUGE_PAGE_BYTES, populate=False).huge:
        return MemoryFinding("private memory", True, f"huge pages are granted (enabled is {setting})")
    return MemoryFinding(
        "private memory",
        False,
        f"small pages only (enabled is {setting or 'not there'})",
        "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )


def _reserved_pages() -> MemoryFinding:
    free = 0
    with contextlib.suppress(OSError, ValueError):
        free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    return MemoryFinding("reserved huge pages", free > 0, f"{free} pages of 2 MiB are free; they are not used")


def _direct_reads(directory: Path) -> bool:
    with _probe_file(directory) as path:
        pool = MemoryPool(HUGE_PAGE_BYTES, populate=False)
        file = LargeFile(path, "direct")
        try:
            file.read(pool.take(mmap.PAGESIZE).memory, 0, mmap.PAGESIZE)
            return file.way == "direct"
        finally:
            file.close()


@contextlib.contextmanager
def _probe_file(directory: Path) -> Iterator[Path]:
    """A file of some MiB below `directory`, written as packing writes it, gone afterwards; or, where nothing can be
    written, that of a model that lies there: a full disk keeps no node from serving what it has.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".longshore-doctor-"))
            block = memoryview(bytes(8 << 20))
            for offset in range(0, _PROBE_BYTES, len(block)):
                os.pwrite(file.fileno(), block, offset)
            path = Path(file.name)
        except OSError as error:
            packed = sorted(directory.glob(f"[!.]*/{WEIGHTS_NAME}"))
            if not packed:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise CheckpointError(
                    f"{directory} cannot be tried: {reason}; name the directory of your models"
                ) from None
            path = packed[0]
        yield path


def _chosen(path: Path) -> str:
    """The word in brackets of a kernel setting."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""
