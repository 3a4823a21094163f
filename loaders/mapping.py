"""A file in memory, read-only and shared: the page cache as the DRAM tier.

What is mapped here are the pages that the kernel keeps of the file anyway. They are shared by all processes that map
it, outlive them, and can be given back. Python's mmap module has no way to populate a range without holding the
interpreter lock, nor mincore, so the C library is called directly.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.errors import CheckpointError
from loaders.reading import open_regular

_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
PAGE_BYTES = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
_SYS_CACHESTAT = 451
"""The same number on every architecture; Linux 6.5 and later."""
_MLOCK_ONFAULT = 1


class LockRefused(Exception):
    """The system lets this process lock no so much memory; one half of a sentence."""


@dataclass(frozen=True, slots=True)
class PageKind:
    """What backs a mapping: how many of its bytes this process has mapped, and how many of those by huge pages."""

    mapped_bytes: int
    huge_bytes: int

    @property
    def huge_share(self) -> float:
        """0 to 1; 0 when nothing is mapped."""
        return self.huge_bytes / self.mapped_bytes if self.mapped_bytes else 0.0


class FileMapping:
    """`memory` is the whole file, or its first `size` bytes, read-only. The mapping lives as long as anything refers to
    `memory`, whatever else is closed.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        descriptor = open_regular(path)
        try:
            self.path = path
            self.bytes = os.fstat(descriptor).st_size
            if size is not None and self.bytes < size:
                raise CheckpointError(f"{path} has {self.bytes} bytes of {size}")
            self.bytes = self.bytes if size is None else size
            if not self.bytes:
                raise CheckpointError(f"{path} is empty")
            mapped = mmap.mmap(descriptor, self.bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be mapped: {os.strerror(error.errno or 0)}") from error
        finally:
            os.close(descriptor)
        # The view holds the mapping: while it exists, mmap refuses to unmap, so no address can go stale.
        self.memory = memoryview(mapped)
        # ctypes takes addresses of writable buffers only; numpy tells the address of any.
        self.address: int = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]

    def want_huge_pages(self) -> bool:
        """Asks for huge pages in what is read from now on; False where the kernel has none for files."""
        return bool(_libc.madvise(self.address, self.bytes, _MADV_HUGEPAGE) == 0)

    def populate(self, begin: int, end: int) -> None:
        """Bytes [begin, end) are in memory and mapped when this returns; other threads run meanwhile.

        An error of the disk is a CheckpointError here, where touching the page would end the process with SIGBUS.
        """
        begin -= begin % PAGE_BYTES
        while _libc.madvise(self.address + begin, end - begin, _MADV_POPULATE_READ) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number == errno.EINVAL:  # Linux before 5.14: one byte of every page brings it in as well.
                bytes(self.memory[begin:end:PAGE_BYTES])
                return
            # The kernel answers EFAULT for a page that cannot be read, since SIGBUS is what an access would give.
            reason = (
                "it was cut short or the disk fails" if number in (errno.EFAULT, errno.EIO) else os.strerror(number)
            )
            raise CheckpointError(f"{self.path}: bytes {begin} to {end} cannot be read: {reason}")

    def lock(self) -> None:
        """What is in memory, and what comes, stays there as long as this mapping exists. Raises LockRefused."""
        if not hasattr(_libc, "mlock2"):
            raise LockRefused("this C library cannot")
        if _libc.mlock2(ctypes.c_void_p(self.address), ctypes.c_size_t(self.bytes), _MLOCK_ONFAULT) != 0:
            number = ctypes.get_errno()
            if number in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
                raise LockRefused("RLIMIT_MEMLOCK is too low (`ulimit -l unlimited`, LimitMEMLOCK=infinity)")
            raise LockRefused(os.strerror(number))
        # Only what this mapping has mapped is locked.
        self.populate(0, self.bytes)

    def resident_bytes(self) -> int:
        """How many bytes of the file lie in memory now, in whole pages, whoever brought them there."""
        pages = -(-self.bytes // PAGE_BYTES)
        flags = np.zeros(pages, np.uint8)
        if _libc.mincore(self.address, self.bytes, flags.ctypes.data) != 0:
            raise CheckpointError(
                f"{self.path}: the kernel does not say what is in memory: {os.strerror(ctypes.get_errno())}"
            )
        return min(int((flags & 1).sum()) * PAGE_BYTES, self.bytes)

    def page_kind(self) -> PageKind | None:
        """What backs the pages that this process has mapped; None where the kernel does not tell."""
        found: dict[str, int] = {}
        try:
            with Path("/proc/self/smaps").open() as lines:
                inside = False
                for line in lines:
                    first = line.split(maxsplit=1)[0]
                    if not first.endswith(":"):
                        # Neighbouring mappings of one file are merged or split by the kernel: take those that lie
                        # inside.
                        low, _, high = first.partition("-")
                        inside = int(low, 16) < self.address + self.bytes and int(high, 16) > self.address
                    elif inside and first in ("Rss:", "FilePmdMapped:", "ShmemPmdMapped:"):
                        found[first] = found.get(first, 0) + int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            return None
        if "Rss:" not in found:
            return None
        return PageKind(found["Rss:"], found.get("FilePmdMapped:", 0) + found.get("ShmemPmdMapped:", 0))


def cached_bytes(path: Path) -> int:
    """How many bytes of the file lie in the page cache, in whole pages. Microseconds where the kernel counts itself
    (`cachestat`); tens of milliseconds per GB where every page has to be asked for.
    """
    descriptor = open_regular(path)
    try:
        everything = (ctypes.c_uint64 * 2)(0, 0)
        counts = (ctypes.c_uint64 * 5)()
        if _libc.syscall(_SYS_CACHESTAT, descriptor, everything, counts, 0) == 0:
            return min(int(counts[0]) * PAGE_BYTES, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    return FileMapping(path).resident_bytes()


def is_tmpfs(directory: Path) -> bool:
    """Whether the file system of this directory is memory."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == wanted:
            return kind.split()[0] == "tmpfs"
    return False


def drop_from_memory(path: Path) -> None:
    """Gives the file's pages back to the kernel. Pages that a process has mapped, or that are not on disk yet, stay."""
    descriptor = open_regular(path)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
