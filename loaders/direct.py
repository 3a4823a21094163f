"""Reading large pieces of a file past the page cache, or through it where it has them already.

A cold file is read directly: no copy, and nothing else is pushed out of the cache. A file that lies in the page cache
is read from there, which is many times faster than any disk. File systems without direct reads are read buffered.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from loaders.errors import CheckpointError
from loaders.mapping import cached_bytes
from loaders.plan import DIRECT_BYTES
from loaders.reading import looking_at, open_regular

Way = Literal["direct", "buffered"]

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def read_some(descriptor: int, memory: memoryview, offset: int) -> int:
    """Read at `offset` into `memory`; how many bytes came, 0 at the end of the file. Tests make it fail."""
    return os.preadv(descriptor, [memory], offset)


class LargeFile:
    """One file, opened for large reads. `way` says how it is read; "direct" turns to "buffered" where that is refused.

    Safe to use from several threads. Errors are CheckpointErrors that name the file and the bytes.
    """

    def __init__(self, path: Path, way: Way) -> None:
        self.path = path
        self.way: Way = way
        self._descriptor = open_regular(path)
        self.bytes = os.fstat(self._descriptor).st_size
        """Of the file when it was opened."""
        self._direct = self._retired = -1
        if way == "direct":
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    os.close(self._descriptor)
                    raise self._failed(error, 0, 0) from error
                self.way = "buffered"

    def read(self, memory: memoryview, offset: int, count: int) -> None:
        """`count` bytes at `offset` stand in `memory`, which has room for `count` rounded up to DIRECT_BYTES."""
        done = 0
        while done < count:
            # After a short read a direct one goes on from the last whole block.
            direct = self._direct >= 0
            begin = done - done % DIRECT_BYTES if direct else done
            wanted = -(-(count - begin) // DIRECT_BYTES) * DIRECT_BYTES if direct else count - begin
            try:
                got = read_some(
                    self._direct if direct else self._descriptor, memory[begin : begin + wanted], offset + begin
                )
            except InterruptedError:
                continue
            except OSError as error:
                if direct and error.errno in _NO_DIRECT:
                    self._give_up_direct()
                    continue
                raise self._failed(error, offset + done, offset + count) from error
            if begin + got <= done:
                if direct and got and begin + got < count:
                    self._give_up_direct()
                    continue
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}, {count - done} bytes too early; copy or download it "
                    "again"
                )
            done = begin + got

    def close(self) -> None:
        for descriptor in (self._descriptor, self._direct, self._retired):
            if descriptor >= 0:
                os.close(descriptor)

    def _give_up_direct(self) -> None:
        """The descriptor stays open until `close`: other threads may be reading from it."""
        if self._direct >= 0:
            self._retired, self._direct, self.way = self._direct, -1, "buffered"

    def _failed(self, error: OSError, begin: int, end: int) -> CheckpointError:
        reason = os.strerror(error.errno or 0)
        where = f"bytes {begin} to {end} cannot be read" if end else "it cannot be opened"
        hint = "; the disk fails: get the checkpoint from elsewhere" if error.errno == errno.EIO else ""
        return CheckpointError(f"{self.path}: {where}: {reason}{hint}")


def best_way(path: Path) -> Way:
    """Buffered where most of the file lies in the page cache, direct otherwise."""
    with looking_at(path):
        return "buffered" if 2 * cached_bytes(path) > path.stat().st_size else "direct"
