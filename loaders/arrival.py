"""What of a model has come to DRAM so far, told by the store that brings it to workers that begin before the end.

    <folder>/<name>    a page of words (which weights, in which file), a byte for the load, a byte for each chunk

Both sides map the file. A chunk's byte is set once the chunk is in memory and checked, the load's byte when everything
is, or when it failed; then the file goes. Its writer holds a lock on it: where nobody does, the writer is dead. All of
it is a hint: what a worker has begun is used only after the cell has told it that the model lies in DRAM.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from loaders.errors import CheckpointError

_HEAD_BYTES = 4096
_COMING, _HERE, _FAILED = 0, 1, 2
_POLL_SECONDS = 0.001
_ALIVE_SECONDS = 0.1
"""So often is looked whether the writer still lives."""


class Interrupted(Exception):
    """What was waited for is not to be waited for any longer: the load failed, or somebody else wants to go on."""


class _Head(msgspec.Struct, frozen=True):
    digest: str
    weights: str
    chunks: int
    directory: str = ""
    inode: int = 0


class Announcement:
    """One load, as its store tells of it. Where the file cannot be written, nothing is told, and nobody misses it."""

    def __init__(self, path: Path | None, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._descriptor = -1
        self._marks: mmap.mmap | None = None

    def begin(self, weights: Path, chunks: int, directory: Path | None = None) -> None:
        """The bytes of the packed file come to `weights`, which exists and has its length. `directory` has all the rest
        of the model, checked, where that does not lie at its own place yet.
        """
        if self._path is None:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError, UnicodeError):
            place = ("", 0) if directory is None else (str(directory), directory.stat().st_ino)
            head = msgspec.json.encode(_Head(self._digest, str(weights), chunks, *place))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Written, not cut to length: a full disk is an error here, where a page without room would be a signal.
            content = head.ljust(_HEAD_BYTES) + bytes(1 + chunks)
            if len(head) <= _HEAD_BYTES and os.write(self._descriptor, content) == len(content):
                self._marks = mmap.mmap(self._descriptor, len(content))
                temporary.rename(self._path)

    def arrived(self, chunk: int) -> None:
        """This chunk is in memory and checked. Any thread may say so."""
        if self._marks is not None:
            self._marks[_HEAD_BYTES + 1 + chunk] = 1

    def end(self, *, whole: bool) -> None:
        """Everything is in memory and checked; or it never will be."""
        if self._path is None or self._descriptor < 0:
            return
        if self._marks is not None:
            self._marks[_HEAD_BYTES] = _HERE if whole else _FAILED
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._marks = None
        os.close(self._descriptor)
        self._descriptor = -1


class Arrival:
    """A load that is under way, as a worker sees it.

    `weights`: the file whose bytes are coming. `directory`: where manifest, header and the files beside the weights are
    meanwhile; None: at the model's own place.
    """

    def __init__(self, descriptor: int, head: _Head, marks: mmap.mmap) -> None:
        self._descriptor = descriptor
        self._marks: mmap.mmap | None = marks
        self._looked_at = 0.0
        self.digest = head.digest
        self.weights = Path(head.weights)
        self.chunks = head.chunks
        self.directory = Path(head.directory) if head.directory else None
        self._inode = head.inode

    @classmethod
    def find(cls, path: Path) -> Arrival | None:
        """The load that is told of there; None where there is none, or not any more."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        found = None
        try:
            head = msgspec.json.decode(os.pread(descriptor, _HEAD_BYTES, 0), type=_Head)
            marks = mmap.mmap(descriptor, _HEAD_BYTES + 1 + head.chunks, prot=mmap.PROT_READ)
            found = cls(descriptor, head, marks)
        except (OSError, ValueError, msgspec.DecodeError):
            pass
        if found is None:
            os.close(descriptor)
        elif not (found.coming or found.here):
            found.close()
            found = None
        return found

    @property
    def here(self) -> bool:
        """Whether every byte is in memory and checked."""
        marks = self._marks
        return marks is not None and marks[_HEAD_BYTES] == _HERE

    @property
    def coming(self) -> bool:
        """Whether the load is under way; neither this nor `here`: it failed, or whoever did it is dead."""
        marks = self._marks
        if marks is None or marks[_HEAD_BYTES] != _COMING:
            return False
        now = time.monotonic()
        if now - self._looked_at >= _ALIVE_SECONDS:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                self._looked_at = now
            else:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                return False
        return True

    def check_in_place(self) -> None:
        """What was read below `directory` until now was all of this load. Raises CheckpointError where it may be not.

        When the load is done its directory gets another name, and what stood under that before may stand here.
        """
        if self.directory is None:
            return
        try:
            moved = self.directory.stat().st_ino != self._inode
        except OSError:
            moved = True
        if moved:
            raise CheckpointError(f"{self.directory} was moved while it was read")

    def has(self, first: int, end: int) -> bool:
        """Whether the chunks [first, end) are in memory and checked."""
        marks = self._marks
        if marks is None:
            return False
        begin = _HEAD_BYTES + 1
        return marks[_HEAD_BYTES] == _HERE or 0 not in marks[begin + first : begin + end]

    def wait(self, first: int, end: int, stop: Callable[[], bool]) -> None:
        """Until the chunks [first, end) are there. Raises `Interrupted` where they never will be, or `stop()` is so."""
        while not self.has(first, end):
            if stop():
                raise Interrupted("somebody else goes on")
            if not (self.coming or self.here):
                raise Interrupted(f"{self.weights} does not come any more")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Nothing is there or comes any more. May be called twice."""
        self._marks = None
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def remove_leftovers(folder: Path) -> None:
    """What dead stores have told of in this folder, which has one living store at the most: the one that calls."""
    try:
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
    except OSError:
        pass


def arrival_path(folder: Path, name: str) -> Path:
    """Where the load of a model is told of; `name` is that of its directory."""
    if "/" in name or name.startswith("."):
        raise CheckpointError(f"{name!r} is no name of a directory of a model")
    return folder / name
