"""Everything that writes: a directory is replaced as a whole, or not at all.

`replacing_directory` fills a temporary directory beside the destination and swaps it in with one rename. Whatever
stops the process in between leaves the old state or the new one, and at most a temporary directory that the next
packing removes; that of `resuming_directory` is what the next fetch goes on with. All writes of this room go through
the one-line functions at the top, so that tests can fail each of them in turn.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loaders.errors import CheckpointError, DestinationBusy, DiskFull

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def create(path: Path) -> int:
    """A descriptor of a new file, for writing; an existing file is an error."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def reopen(path: Path) -> int:
    """A descriptor of a file that is there, for writing."""
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_direct(path: Path) -> int:
    """A descriptor of a file that is there, for writing past the page cache; -1 where the file system cannot."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
            return -1
        raise


def write(descriptor: int, data: memoryview, offset: int) -> int:
    """Writes some of `data` at `offset`; how many bytes is the answer."""
    return os.pwrite(descriptor, data, offset)


def sync(descriptor: int) -> None:
    """What was written is on the disk when this returns."""
    os.fsync(descriptor)


def rename(source: Path, destination: Path) -> None:
    """Moves a directory to a name that is free or an empty directory."""
    source.rename(destination)


def exchange(first: Path, second: Path) -> None:
    """Swaps two directories in one step (Linux, renameat2); OSError where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def make_directory(parent: Path, prefix: str) -> Path:
    """A new directory under `parent`, readable as others are."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o755)
    return path


def remove(path: Path) -> None:
    """Removes a directory and all in it, as far as possible."""
    shutil.rmtree(path, ignore_errors=True)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, however many short writes that takes."""
    view = memoryview(data)
    while view:
        written = write(descriptor, view, offset)
        view = view[written:]
        offset += written


def write_file(path: Path, content: bytes) -> None:
    """A new file with this content, on the disk when this returns."""
    descriptor = create(path)
    try:
        write_all(descriptor, content, 0)
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """The names in the directory are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_directory(destination: Path) -> Iterator[Path]:
    """A temporary directory to fill; leaving the block makes it `destination`, an exception leaves `destination` as
    it was.

    Raises DestinationBusy when another process or thread holds the destination, DiskFull when the disk is full,
    CheckpointError when it fails.
    """
    with _holding(destination):
        remove(_partial(destination))
        temporary = make_directory(destination.parent, f".{destination.name}.packing-")
        try:
            yield temporary
            _commit(temporary, destination)
        finally:
            # After the swap this is what stood at the destination before.
            remove(temporary)


@contextmanager
def resuming_directory(destination: Path, keep: Callable[[], bool]) -> Iterator[Path]:
    """The same, but what stands in the temporary directory after an exception stays for the next time if `keep()`.

    Then it stands in the directory that is yielded; a killed process leaves it there, too. Nothing stays on a full
    disk.
    """
    with _holding(destination):
        temporary = _partial(destination)
        if temporary.is_symlink() or not temporary.is_dir():
            temporary.unlink(missing_ok=True)
            temporary.mkdir()
            temporary.chmod(0o755)
        try:
            yield temporary
            _commit(temporary, destination)
        except BaseException as error:
            if isinstance(error, DiskFull) or _is_full(error) or not keep():
                remove(temporary)
            raise
        remove(temporary)


def remove_partial(destination: Path) -> None:
    """Removes what a fetch of `destination` that broke off has left, unless somebody is at work on it."""
    if _partial(destination).exists():
        with suppress(CheckpointError, OSError), _only_one(_lock_of(destination), destination):
            remove(_partial(destination))


def partial_bytes(destination: Path) -> int:
    """What a fetch of `destination` that broke off takes of the disk."""
    try:
        return sum(path.lstat().st_blocks * 512 for path in _partial(destination).iterdir())
    except OSError:
        return 0


def partials_in(parent: Path) -> list[Path]:
    """The destinations of which a fetch that broke off, or is at work, has left something."""
    found = sorted(parent.glob(".*.fetching"))
    return [path.with_name(path.name.removeprefix(".").removesuffix(".fetching")) for path in found]


def remove_leftovers(parent: Path) -> None:
    """Removes what packings that were killed have left in `parent`; what somebody is at work on stays."""
    for leftover in sorted(parent.glob(".*.packing-*")):
        destination = parent / leftover.name[1:].rpartition(".packing-")[0]
        with suppress(CheckpointError, OSError), _only_one(_lock_of(destination), destination):
            remove(leftover)


def _partial(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.fetching")


def _lock_of(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.packing")


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _holding(destination: Path) -> Iterator[None]:
    """Nobody else writes there. What killed packings have left is gone; errors of the disk are CheckpointErrors."""
    parent = destination.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _only_one(_lock_of(destination), destination):
            for leftover in parent.glob(f"{_escape(f'.{destination.name}.packing-')}*"):
                remove(leftover)
            yield
    except OSError as error:
        if _is_full(error):
            raise DiskFull(f"{parent}: the disk is full; free some space and pack again") from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CheckpointError(f"{destination} cannot be written: {reason}") from error


def _commit(temporary: Path, destination: Path) -> None:
    sync_directory(temporary)
    if destination.exists():
        try:
            exchange(temporary, destination)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            raise CheckpointError(
                f"{destination} exists, and this file system cannot replace a directory in one step; remove it first"
            ) from error
    else:
        rename(temporary, destination)
    sync_directory(destination.parent)


@contextmanager
def _only_one(lock: Path, destination: Path) -> Iterator[None]:
    """Holds the lock file; it goes with the process, however that ends."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise DestinationBusy(f"{destination} is being packed by another process; wait until it is done") from error
        try:
            # Between opening and locking, the one before may have removed the file: then this lock protects nothing.
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _escape(text: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)
