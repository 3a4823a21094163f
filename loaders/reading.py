"""Opening and reading small files that nobody vouches for: never hang, never read more than was expected."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loaders.errors import CheckpointError, quote


@contextmanager
def looking_at(path: Path) -> Iterator[None]:
    """Within the block, what the system refuses is a CheckpointError: `exists` and its like raise what is no answer."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CheckpointError(f"{error.filename or path} cannot be looked at: {reason}") from error


def open_regular(path: Path) -> int:
    """A read-only file descriptor of a regular file; the caller closes it. Raises CheckpointError."""
    try:
        # Without O_NONBLOCK, opening a pipe that lies where a file should lie would wait for a writer forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file")
    return descriptor


def read_exactly(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    """`count` bytes at `offset`; short reads are continued, an early end of the file is a CheckpointError."""
    pieces: list[bytes] = []
    while count:
        try:
            piece = os.pread(descriptor, count, offset)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from error
        if not piece:
            raise CheckpointError(f"{path} ends at byte {offset}, {count} bytes too early; copy or download it again")
        pieces.append(piece)
        count -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def require_directory(path: Path) -> None:
    """A CheckpointError unless `path` is a directory. Raises OSError."""
    if path.is_dir():
        return
    if str(path).startswith(("http:/", "https:/")):
        raise CheckpointError(f"{path} is an address and no directory: fetch it first (`longshore fetch`)")
    if path.exists():
        raise CheckpointError(f"{path} is not a directory but a file; give the directory that holds it")
    raise CheckpointError(f"there is no directory {path}")


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole file, refused when it is larger than `limit` bytes."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(f"{path} has {size} bytes, more than the {limit} that such a file may have")
        return read_exactly(descriptor, size, 0, path)
    finally:
        os.close(descriptor)


def require_plain_name(name: str, where: str) -> str:
    """`name` when it names a file inside its own directory and nothing else; a CheckpointError otherwise."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or len(name) > 255:
        raise CheckpointError(f"{where} names the file {quote(name)}, which is not a plain file name")
    return name


def require_companion_name(name: str, where: str) -> str:
    """`name` when it names a file of a directory, or one in a folder directly below it; a CheckpointError otherwise."""
    for part in name.split("/", 1):
        require_plain_name(part, where)
    return name
