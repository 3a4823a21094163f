"""The page cache as DRAM tier: the packed file itself, in memory.

The store keeps a mapping of what it brought, locked where the system allows that. A note per model says which file was
checked, at which boot. A store that starts again checks what is noted and still resident once more, from memory, which
takes a tenth of a second per gigabyte; what merely happens to be cached was checked by nobody and does not count.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from loaders.arrival import Announcement
from loaders.errors import CheckpointError, NoRoom
from loaders.manifest import Manifest, read_manifest
from loaders.mapping import FileMapping, LockRefused, cached_bytes
from loaders.model_copy import ModelCopy
from loaders.packed import WEIGHTS_NAME
from loaders.room import memory_room
from loaders.verification import populate_checkpoint, release_checkpoint


class _Note(msgspec.Struct, frozen=True):
    """Which file was checked, and when the machine was started then."""

    digest: str
    boot: str
    inode: int
    changed_ns: int
    bytes: int


class _Held(msgspec.Struct):
    note: _Note
    mapping: FileMapping


class LookedAfter(NamedTuple):
    """A sentence for each model that went away from memory unasked, and the directories of those that stay away."""

    said: tuple[str, ...] = ()
    lost: tuple[Path, ...] = ()


class PageCacheTier:
    """Obeys `loaders.dram_tier.DramTier`. `state`: a directory of its own for the notes, made when needed; None: the
    next store believes nothing of this one."""

    weights_root: Path | None = None
    kind = "page cache"

    def __init__(self, state: Path | None) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._held: dict[Path, _Held] = {}
        self._leaving: dict[Path, None] = {}
        """What was released while some process had it mapped: the kernel keeps it when that process is gone."""
        self._refused = ""

    @property
    def description(self) -> str:
        locked = f"not locked: {self._refused}" if self._refused else "locked in memory"
        return f"the page cache of the packed files, {locked}"

    def bring(
        self, directory: Path, *, before: Callable[[], None] | None = None, told: Announcement | None = None
    ) -> int:
        digest = read_manifest(directory).digest
        with self._lock:
            self._leaving.pop(directory, None)
        self._drop_leaving()
        report = populate_checkpoint(directory, verify=True, before=before, told=told)
        self._keep(directory, digest)
        return report.bytes

    @contextlib.contextmanager
    def filling(self, manifest: Manifest, name: str) -> Iterator[ModelCopy | None]:
        """None: what is written to the SSD is in this tier."""
        self._drop_leaving()
        yield None

    def adopt(self, directory: Path) -> bool:
        manifest = read_manifest(directory)
        if cached_bytes(directory / WEIGHTS_NAME) < manifest.bytes:
            return False
        self._keep(directory, manifest.digest)
        return True

    def holds(self, directory: Path) -> bool:
        manifest = read_manifest(directory)
        if cached_bytes(directory / WEIGHTS_NAME) < manifest.bytes:
            return False
        with self._lock:
            held = self._held.get(directory)
        note = _describe(directory, manifest.digest)
        if held is not None and held.note == note:
            return True
        if held is not None or self._noted(directory) != note:
            return False
        try:
            self.bring(directory)
        except CheckpointError:  # whoever loads it is told
            return False
        return True

    def release(self, directory: Path) -> int:
        with self._lock:
            # With the last reference the mapping goes, and its lock.
            self._held.pop(directory, None)
        self._forget(directory)
        stayed = release_checkpoint(directory)
        if stayed:
            with self._lock:
                self._leaving[directory] = None
        return stayed

    def forget_others(self, directories: Iterable[Path]) -> None:
        if self._state is None:
            return
        wanted = {_note_path(self._state, directory) for directory in directories}
        for path in self._state.glob("*.json"):
            if path not in wanted:
                path.unlink(missing_ok=True)

    @property
    def held_bytes(self) -> int:
        with self._lock:
            return sum(one.mapping.bytes for one in self._held.values())

    def look_after(self) -> LookedAfter:
        self._drop_leaving()
        with self._lock:
            held = dict(self._held)
        said, gone = list[str](), list[Path]()
        for directory, one in held.items():
            missing = one.mapping.bytes - one.mapping.resident_bytes()
            if missing <= 0:
                continue
            lost = f"{directory.name}: {missing / 1e6:.0f} MB had been pushed out of memory"
            try:
                if _describe(directory, read_manifest(directory).digest) != one.note:
                    continue
                populate_checkpoint(directory, verify=True)
                if one.mapping.resident_bytes() < one.mapping.bytes:
                    raise NoRoom("memory does not keep them")
                said.append(f"{lost} and are there again")
            except (CheckpointError, OSError) as error:
                with self._lock:
                    self._held.pop(directory, None)
                self._forget(directory)
                said.append(f"{lost} and cannot be brought back: {error}")
                gone.append(directory)
        return LookedAfter(tuple(said), tuple(gone))

    def _keep(self, directory: Path, digest: str) -> None:
        mapping = FileMapping(directory / WEIGHTS_NAME)
        room = memory_room()
        if room is not None and room.bytes < mapping.bytes:
            # It may be pushed out then, which is better than that others are.
            self._refused = f"only {room.free / 1e9:.1f} GB of memory are left"
        else:
            try:
                mapping.lock()
                self._refused = ""
            except LockRefused as refused:
                self._refused = str(refused)
        note = _describe(directory, digest)
        with self._lock:
            self._leaving.pop(directory, None)
            self._held[directory] = _Held(note, mapping)
        if self._state is None:
            return
        with contextlib.suppress(OSError):  # without a note the next store reads it once more, that is all
            self._state.mkdir(parents=True, exist_ok=True)
            _note_path(self._state, directory).write_bytes(msgspec.json.encode(note))

    def _drop_leaving(self) -> None:
        """What nobody has mapped any more goes from memory now."""
        with self._lock:  # whoever brings one of these takes it off first
            for directory in list(self._leaving):
                try:
                    stayed = release_checkpoint(directory)
                except (CheckpointError, OSError):  # its file is gone, and its pages with that
                    stayed = 0
                if not stayed:
                    del self._leaving[directory]

    def _forget(self, directory: Path) -> None:
        if self._state is not None:
            _note_path(self._state, directory).unlink(missing_ok=True)

    def _noted(self, directory: Path) -> _Note | None:
        if self._state is None:
            return None
        try:
            return msgspec.json.decode(_note_path(self._state, directory).read_bytes(), type=_Note)
        except (OSError, msgspec.DecodeError):
            return None


def _note_path(state: Path, directory: Path) -> Path:
    return state / f"{directory.name}.json"


def _describe(directory: Path, digest: str) -> _Note:
    found = (directory / WEIGHTS_NAME).stat()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return _Note(digest, boot, found.st_ino, found.st_mtime_ns, found.st_size)
