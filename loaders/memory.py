"""Memory that weights are read into: large, on huge pages where the system grants them, faulted in beforehand.

The first touch of a fresh 4 KiB page costs more than reading what comes into it, so a pool that outlives one load is
what makes direct reads as fast as the disk. A block goes back to its pool when nothing refers to its bytes any more:
neither the block nor any tensor that views it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loaders.errors import CheckpointError, NoRoom
from loaders.room import memory_ceiling

HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_MADV_POPULATE_WRITE = 23
_POPULATE_BYTES = 64 << 20
"""Faulted in at once by one thread."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def want_huge_pages(address: int, count: int) -> bool:
    """Asks for huge pages in what is faulted in from now on; whether the kernel heard it."""
    return bool(_libc.madvise(address, count, _MADV_HUGEPAGE) == 0)


def populate_pages(address: int, count: int) -> None:
    """Writable pages [address, address + count) are there when this returns. Raises CheckpointError where they cannot.

    `address` is moved down to the page that it lies in. Other threads run meanwhile.
    """
    begin = address - address % mmap.PAGESIZE
    while _libc.madvise(begin, address + count - begin, _MADV_POPULATE_WRITE) != 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number == errno.EINVAL:  # Linux before 5.14: they come when they are touched.
            return
        raise NoRoom(f"the system gives no {count / 1e6:.0f} MB of shared memory more; lower --dram, or give it more")


class Block:
    """`memory`: writable bytes, aligned to a huge page. They stay valid as long as anything refers to `base`."""

    def __init__(self, base: Any, count: int) -> None:
        self.base = base
        """A ctypes array over the bytes: what numpy and torch make views of."""
        self.bytes = count
        self.address = ctypes.addressof(base)

    @property
    def memory(self) -> memoryview:
        return memoryview(self.base).cast("B")[: self.bytes]


class MemoryPool:
    """Private memory of `capacity_bytes`, handed out in blocks of whole huge pages, first fit.

    With `populate` all of it is faulted in now, and stays so: that is what a pool is for. `huge` asks for huge pages;
    the attribute of that name says whether the system is willing. Raises CheckpointError (`NoRoom`) where
    the system has not so much memory. Safe to use from several threads.
    """

    def __init__(self, capacity_bytes: int, *, populate: bool = True, huge: bool = True) -> None:
        if capacity_bytes < 1:
            raise CheckpointError(f"a memory pool of {capacity_bytes} bytes holds nothing; give it a size above 0")
        self.capacity_bytes = round_up(capacity_bytes, HUGE_PAGE_BYTES)
        ceiling = memory_ceiling()
        if ceiling is not None and self.capacity_bytes > ceiling.free:
            # The system grants more than it has, and ends the process that uses it.
            raise NoRoom(
                f"{capacity_bytes / 1e9:.2f} GB of memory are needed, and {ceiling.limit} leaves "
                f"{max(0, ceiling.free) / 1e9:.2f} GB: let other programs end, or choose something smaller"
            )
        try:
            self._mapping = mmap.mmap(-1, self.capacity_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE)
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"the system grants no {capacity_bytes / 1e9:.2f} GB of memory ({error}); choose a smaller pool"
            ) from None
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._offset = -start % HUGE_PAGE_BYTES
        self._address = start + self._offset
        self._lock = threading.Lock()
        self._free: dict[int, int] = {0: self.capacity_bytes}
        """Free pieces, by their start: their length. Neighbours are joined."""
        self._given_back: deque[tuple[int, int]] = deque()
        """A block may be let go of at any moment, also by a collection of garbage in here: without the lock."""
        advice = _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE
        self.huge = _libc.madvise(self._address, self.capacity_bytes, advice) == 0 and huge
        if populate:
            self._populate()

    @property
    def free_bytes(self) -> int:
        with self._lock:
            self._collect()
            return sum(self._free.values())

    def take(self, count: int) -> Block:
        """A block of `count` bytes. Raises CheckpointError where no free piece is long enough."""
        length = round_up(max(1, count), HUGE_PAGE_BYTES)
        with self._lock:
            self._collect()
            start = next((begin for begin, room in self._free.items() if room >= length), None)
            if start is None:
                largest = max(self._free.values(), default=0)
                raise CheckpointError(
                    f"the memory pool of {self.capacity_bytes / 1e9:.2f} GB has no room for {count / 1e9:.2f} GB "
                    f"(its largest free piece has {largest / 1e9:.2f} GB); let other checkpoints go, or enlarge it"
                )
            room = self._free.pop(start)
            if room > length:
                self._free[start + length] = room - length
        base = (ctypes.c_char * length).from_buffer(self._mapping, self._offset + start)
        weakref.finalize(base, self._given_back.append, (start, length)).atexit = False
        return Block(base, count)

    def _collect(self) -> None:
        """Take back what nobody refers to any more. The caller holds the lock."""
        while self._given_back:
            start, length = self._given_back.popleft()
            self._free[start] = length
        joined: dict[int, int] = {}
        last = -1
        for begin in sorted(self._free):
            if last >= 0 and last + joined[last] == begin:
                joined[last] += self._free[begin]
            else:
                joined[begin] = self._free[begin]
                last = begin
        self._free = joined

    def _populate(self) -> None:
        starts = range(0, self.capacity_bytes, _POPULATE_BYTES)
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))), thread_name_prefix="fault-in") as threads:
            list(threads.map(self._fault_in, starts))

    def _fault_in(self, start: int) -> None:
        length = min(_POPULATE_BYTES, self.capacity_bytes - start)
        while _libc.madvise(self._address + start, length, _MADV_POPULATE_WRITE) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number == errno.EINVAL:  # Linux before 5.14
                for page in range(self._offset + start, self._offset + start + length, mmap.PAGESIZE):
                    self._mapping[page] = 0
                return
            raise CheckpointError(
                f"the memory pool of {self.capacity_bytes / 1e9:.2f} GB cannot be faulted in "
                f"({os.strerror(number)}); choose a smaller one"
            )
