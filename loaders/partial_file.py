"""The file that a fetch fills on the SSD, and what of it an earlier fetch that broke off has left.

A file that begins with the very header that the source has is taken over: each of its chunks is believed once it was
read again and its checksum is right. So it needs no journal, and nothing done to it in between can be taken for data.

It is written in whole blocks of 2 MiB, for each of which the kernel takes one huge page into the page cache: a process
that maps the model then maps huge pages, too. What needs no place in the page cache is written past it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from pathlib import Path

from loaders import storage
from loaders.direct import LargeFile, best_way
from loaders.errors import CheckpointError
from loaders.memory import HUGE_PAGE_BYTES
from loaders.plan import DIRECT_BYTES

_SYNC_FILE_RANGE_ALL = 7
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EFAULT)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class PartialFile:
    """`region` is everything in front of the data. Safe to use from several threads; errors of the disk are OSErrors.

    The file has its length from the beginning; what has not come is a hole. `cached`: what is written stays in the page
    cache. `resumed`: an earlier fetch has left something.
    """

    def __init__(self, path: Path, region: bytes, file_bytes: int, *, cached: bool) -> None:
        self._path, self._bytes = path, file_bytes
        self._lock = threading.Lock()
        self._begun: set[int] = set()
        self._direct = -1
        self.resumed = _begins_with(path, region)
        if self.resumed:
            self._descriptor = storage.reopen(path)
            self._left: LargeFile | None = LargeFile(path, "buffered" if cached else best_way(path))
        else:
            path.unlink(missing_ok=True)
            self._descriptor = storage.create(path)
            self._left = None
        self._cached = cached
        try:
            os.ftruncate(self._descriptor, file_bytes)
            if not cached:
                self._direct = storage.open_direct(path)
            if not self.resumed and cached:
                self._write_cached(memoryview(region), 0)
            elif not self.resumed:
                storage.write_all(self._descriptor, region, 0)
        except BaseException:
            self.close()
            raise

    def read_left(self, memory: memoryview, offset: int, count: int) -> bool:
        """What the earlier fetch has left there stands in `memory`; false where it has left nothing, or a part.

        `memory` has room for `count` rounded up to DIRECT_BYTES.
        """
        if self._left is None or _has_hole(self._descriptor, offset, offset + count):
            return False
        try:
            self._left.read(memory, offset, count)
        except CheckpointError:  # the disk gives it no more: it comes from the source
            return False
        return True

    def write(self, memory: memoryview, offset: int, count: int) -> None:
        """The first `count` bytes of `memory`, which has room for `count` rounded up to DIRECT_BYTES.

        `offset` is a multiple of DIRECT_BYTES.
        """
        if self._cached:
            self._write_cached(memory[:count], offset)
            return
        if self._direct >= 0:
            # The last chunk may end within a block; `sync` cuts off what is too much.
            try:
                storage.write_all(self._direct, memory[: -(-count // DIRECT_BYTES) * DIRECT_BYTES], offset)
                return
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
        storage.write_all(self._descriptor, memory[:count], offset)
        _libc.sync_file_range(self._descriptor, offset, count, _SYNC_FILE_RANGE_ALL)
        os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """The file is on the disk, whole, when this returns."""
        os.ftruncate(self._descriptor, self._bytes)
        storage.sync(self._descriptor)

    def close(self) -> None:
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1
        if self._left is not None:
            self._left.close()

    def _write_cached(self, data: memoryview, offset: int) -> None:
        while data:
            block = offset - offset % HUGE_PAGE_BYTES
            piece = data[: block + HUGE_PAGE_BYTES - offset]
            with self._lock:
                if len(piece) < HUGE_PAGE_BYTES and not self.resumed and block not in self._begun:
                    # Two chunks meet in this block. Its first piece alone would get small pages, for both.
                    storage.write_all(self._descriptor, _ZEROS[: self._bytes - block], block)
                self._begun.add(block)
                storage.write_all(self._descriptor, piece, offset)
            data, offset = data[len(piece) :], offset + len(piece)


_ZEROS = memoryview(bytes(HUGE_PAGE_BYTES))


def _begins_with(path: Path, region: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            return False
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(len(region)) == region
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _has_hole(descriptor: int, begin: int, end: int) -> bool:
    """Whether some byte in [begin, end) was never written; a file system that does not know says no."""
    try:
        return os.lseek(descriptor, begin, os.SEEK_HOLE) < end
    except OSError as error:
        return error.errno == errno.ENXIO
