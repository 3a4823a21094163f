"""Where packed checkpoints come from when they do not lie on this server: what a source promises, and a directory.

A source names files by plain names and reads any part of them. It never gives other bytes than were asked for: what
changes while it is read is an error. `open_source` makes one from a path or an address.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from loaders.direct import LargeFile
from loaders.errors import CheckpointError
from loaders.manifest import MANIFEST_NAME
from loaders.reading import looking_at, read_bounded, require_directory


class RemoteFile(Protocol):
    """One large file of a source; several threads may read from it at once."""

    @property
    def bytes(self) -> int: ...

    @property
    def threads(self) -> int:
        """How many threads may usefully read at once; 1 where only reading in order works."""
        ...

    def read(self, memory: memoryview, offset: int, count: int) -> None:
        """`count` bytes at `offset` stand at the beginning of `memory`. Raises CheckpointError."""
        ...

    def close(self) -> None: ...


class RemoteSource(Protocol):
    """A packed checkpoint somewhere else."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    def read_small(self, name: str, limit: int) -> bytes:
        """A whole small file; CheckpointError where there is none, or where it is larger than `limit` bytes."""
        ...

    def open_large(self, name: str) -> RemoteFile: ...

    def cancel(self) -> None:
        """Reads that wait for something end soon, with a CheckpointError."""
        ...


def open_source(address: str | Path, *, hurry: bool = False) -> RemoteSource:
    """The source at `http://`, `https://` or `file://`, or in a directory.

    `hurry`: there is another one, so that this one is given up soon.
    """
    text = str(address)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return DirectorySource(Path(text))
    if scheme in ("http", "https"):
        from loaders.http_source import ATTEMPTS, HURRIED_ATTEMPTS, HttpSource

        return HttpSource(text, attempts=HURRIED_ATTEMPTS if hurry else ATTEMPTS)
    if scheme == "file":
        return DirectorySource(Path("/" + rest.lstrip("/")))
    raise CheckpointError(f"{text!r} is no place to load from: give a directory, or http://, https:// or file://")


class DirectorySource:
    """A packed directory on a shared file system."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with looking_at(directory):
            require_directory(directory)

    @property
    def name(self) -> str:
        return str(self.directory)

    def read_small(self, name: str, limit: int) -> bytes:
        with looking_at(self.directory):
            if name == MANIFEST_NAME and not (self.directory / name).exists():
                raise CheckpointError(f"{self.directory} is not a packed checkpoint (it has no {name}); pack it first")
        return read_bounded(self.directory / name, limit)

    def open_large(self, name: str) -> RemoteFile:
        return _LargeDirectoryFile(self.directory / name)

    def cancel(self) -> None:
        return


class _LargeDirectoryFile:
    """Read through the page cache of this server: the file system may be one without direct reads, or cache itself."""

    threads = 4

    def __init__(self, path: Path) -> None:
        self._file = LargeFile(path, "buffered")
        self.bytes = self._file.bytes

    def read(self, memory: memoryview, offset: int, count: int) -> None:
        self._file.read(memory, offset, count)

    def close(self) -> None:
        self._file.close()
