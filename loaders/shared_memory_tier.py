"""Shared memory as DRAM tier: a copy of each packed model in a tmpfs, filled by direct reads, each chunk checked.

    SSD ──direct reads, 4 threads──┐
    remote ──connections──┬────────┴─▶ <root>/.<key>.<number>.loading ──rename──▶ <root>/<key>
                          └─▶ SSD (direct writes out of the same memory)

A directory with its final name is a whole packed directory whose every byte was checked: only a load that ended well
renames, and a tmpfs ends with the machine, so there is nothing that a store which starts again has to doubt. It removes
what has no final name. Eviction unlinks: the pages go at once, or with the last process that has them mapped.

Huge pages come from the mount option `huge=` of the tmpfs (for `advise` the mapping asks for them);
`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is about memory without a name only.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from loaders.arrival import Announcement
from loaders.direct import LargeFile, best_way
from loaders.errors import CheckpointError, NoRoom
from loaders.manifest import Manifest, read_manifest
from loaders.mapping import FileMapping, LockRefused, drop_from_memory, is_tmpfs
from loaders.memory import populate_pages, round_up, want_huge_pages
from loaders.model_copy import ModelCopy
from loaders.packed import WEIGHTS_NAME, checksum_of
from loaders.page_cache_tier import LookedAfter
from loaders.plan import DIRECT_BYTES, LoadPlan, Piece, plan_load
from loaders.room import has_swap, room_in

READ_THREADS = 4
ROOM_SECONDS = 5.0
"""So long is waited for the pages of a process that is just ending."""


def default_root(state: Path) -> Path:
    """Below /dev/shm, the same at every start of the server whose notes are in `state`, and no other's."""
    name = hashlib.sha256(os.fsencode(state.absolute())).hexdigest()[:12]
    return Path("/dev/shm") / f"longshore-{os.getuid()}-{name}"


def key_of(manifest: Manifest) -> str:
    """The name of a model's directory: of its weights, and of all the files beside them."""
    return f"{manifest.digest}-{manifest.checksum}"


def weights_directory(root: Path, directory: Path) -> Path:
    """Where a worker opens the model packed in `directory`: its copy below `root`, if there is one."""
    copy = root / key_of(read_manifest(directory))
    return copy if copy.is_dir() else directory


class SharedMemoryTier:
    """Obeys `loaders.dram_tier.DramTier`. `root` belongs to one server; it is made when this is.

    Raises CheckpointError where `root` does not lie in a tmpfs.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._promised: dict[int, int] = {}
        """Of each copy that is being filled, the bytes whose pages are not there yet."""
        self._numbers = itertools.count()
        self._held: dict[Path, tuple[str, FileMapping]] = {}
        self._refused = ""
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_tmpfs(root):
                raise CheckpointError(
                    f"{root} is on a disk; shared memory needs a tmpfs (mount -t tmpfs -o huge=advise)"
                )
            for leftover in root.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._huge = huge_pages_in(root)
        except OSError as error:
            raise CheckpointError(f"{root} cannot be used as shared memory: {error.strerror or error}") from error

    @staticmethod
    def remove(root: Path) -> None:
        """Give back everything that a store left in memory below `root`."""
        shutil.rmtree(root, ignore_errors=True)

    @property
    def weights_root(self) -> Path | None:
        return self._root

    @property
    def kind(self) -> str:
        return "shared memory, huge pages" if self._huge else "shared memory, 4 KiB pages"

    @property
    def description(self) -> str:
        pages = "huge pages" if self._huge else "4 KiB pages (mount a tmpfs with huge=advise for huge ones)"
        locked = f"not locked: {self._refused}" if self._refused else "nothing can push it out"
        return f"shared memory below {self._root}, {pages}, {locked}"

    def bring(
        self, directory: Path, *, before: Callable[[], None] | None = None, told: Announcement | None = None
    ) -> int:
        manifest = read_manifest(directory)
        key = key_of(manifest)
        with self._lock:
            held = self._held.get(directory)
        if held is not None and held[0] != key:
            self.release(directory)  # another packing lies there by now
        self._fill(directory, manifest, before, told)
        self._keep(directory, key)
        return manifest.bytes

    def adopt(self, directory: Path) -> bool:
        return self.holds(directory)

    def holds(self, directory: Path) -> bool:
        manifest = read_manifest(directory)
        key = key_of(manifest)
        if not self._lies_there(manifest):
            return False
        with self._lock:
            held = self._held.get(directory)
        if held is None or held[0] != key:
            self._keep(directory, key)
        return True

    def release(self, directory: Path) -> int:
        """0 also where a process that is ending has the pages mapped still: they go with it."""
        with self._lock:
            held = self._held.pop(directory, None)
            key = held[0] if held is not None else key_of(read_manifest(directory))
            shared = any(other == key for other, _ in self._held.values())
        del held
        if not shared:
            # First it has no final name any more, so that no crash in between leaves half of it under that.
            doomed = self._root / f".{key}.{next(self._numbers)}.doomed"
            try:
                (self._root / key).rename(doomed)
            except FileNotFoundError:
                return 0
            shutil.rmtree(doomed)
        return 0

    def forget_others(self, directories: Iterable[Path]) -> None:
        wanted = {key_of(read_manifest(directory)) for directory in directories}
        for path in list(self._root.iterdir()):
            if path.name not in wanted and not path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def held_bytes(self) -> int:
        with self._lock:
            return sum({key: mapping.bytes for key, mapping in self._held.values()}.values())

    def look_after(self) -> LookedAfter:
        """Nothing but an eviction takes pages from a tmpfs for good, or somebody who removes files there."""
        with self._lock:
            held = dict(self._held)
        lost = []
        for directory, one in held.items():
            if (self._root / one[0] / WEIGHTS_NAME).exists():
                continue
            with self._lock:
                # An eviction lets go of the mapping before it removes anything.
                if self._held.get(directory) is one:
                    del self._held[directory]
                    lost.append(directory)
        said = (f"{directory.name}: somebody has removed it from {self._root}" for directory in lost)
        return LookedAfter(tuple(said), tuple(lost))

    @contextmanager
    def filling(self, manifest: Manifest, name: str) -> Iterator[ModelCopy | None]:
        """A copy to fill, for which there is room; None where these weights are here already.

        It is gone after the block unless it was finished. Raises `NoRoom`, CheckpointError.
        """
        key = key_of(manifest)
        if self._lies_there(manifest):
            yield None
            return
        needed = round_up(manifest.bytes, DIRECT_BYTES) + sum(file.bytes for file in manifest.files.values())
        number = self._promise(needed, name)
        try:
            temporary = self._root / f".{key}.{number}.loading"
            try:
                copy = ModelCopy(temporary, self._root / key, manifest, lambda count: self._took(number, count))
            except OSError as error:
                raise CheckpointError(f"{self._root} takes no copy of a model: {error.strerror}") from error
            try:
                yield copy
            finally:
                copy.discard()
        finally:
            with self._lock:
                del self._promised[number]

    def _lies_there(self, manifest: Manifest) -> bool:
        """Whether the copy of these weights is here, with all that it was given; what others left of one goes."""
        final = self._root / key_of(manifest)
        if not final.is_dir():
            return False
        files = {WEIGHTS_NAME: manifest.bytes} | {name: file.bytes for name, file in manifest.files.items()}
        try:
            if all((final / name).stat().st_size == count for name, count in files.items()):
                return True
        except OSError:
            pass
        shutil.rmtree(final, ignore_errors=True)
        return False

    # ---- filling from the SSD ---------------------------------------------------------------------------------

    def _fill(
        self, directory: Path, manifest: Manifest, before: Callable[[], None] | None, told: Announcement | None
    ) -> None:
        plan = plan_load(directory, verify=True)
        with self.filling(manifest, directory.name) as copy:
            if copy is not None:
                self._copy_weights(plan, manifest, copy, before, told)
                if not copy.finish(directory) and told is not None:
                    told.end(whole=False)

    def _promise(self, needed: int, name: str) -> int:
        """Room of which nothing is given away twice; the number of the promise."""
        until = time.monotonic() + ROOM_SECONDS
        while True:
            with self._lock:
                room = room_in(self._root)
                left = room.bytes - sum(self._promised.values())
                if left >= needed:
                    number = next(self._numbers)
                    self._promised[number] = needed
                    return number
            if time.monotonic() > until:
                raise NoRoom(
                    f"{name} needs {needed / 1e9:.2f} GB of shared memory, and {room.limit} leaves "
                    f"{max(0, left) / 1e9:.2f} GB: lower --dram, or give it more"
                )
            time.sleep(0.05)

    def _took(self, number: int, count: int) -> None:
        with self._lock:
            self._promised[number] = max(0, self._promised[number] - count)

    def _copy_weights(
        self,
        plan: LoadPlan,
        manifest: Manifest,
        copy: ModelCopy,
        before: Callable[[], None] | None,
        told: Announcement | None,
    ) -> None:
        source = LargeFile(plan.files[0], best_way(plan.files[0]))
        head = manifest.bytes - sum(piece.count for piece in plan.pieces)
        if told is not None:
            told.begin(copy.path, len(plan.pieces))
        work = functools.partial(self._copy, plan, source, copy, before, told)
        try:
            source.read(copy.memory(0, head), 0, head)
            with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="to-shared-memory") as threads:
                list(threads.map(work, range(len(plan.pieces))))
        finally:
            source.close()
        if source.way == "buffered":
            # Read from the page cache: two copies in memory would be one too many.
            drop_from_memory(source.path)

    def _copy(
        self,
        plan: LoadPlan,
        source: LargeFile,
        copy: ModelCopy,
        before: Callable[[], None] | None,
        told: Announcement | None,
        index: int,
    ) -> None:
        if before is not None:
            before()
        piece: Piece = plan.pieces[index]
        memory = copy.memory(piece.offset, piece.count)
        source.read(memory, piece.offset, piece.count)
        if checksum_of(memory[: piece.count]) != piece.checksum:
            raise CheckpointError(
                f"{source.path}: {plan.describe(index)} is damaged (its checksum differs); pack or copy the checkpoint "
                "again"
            )
        if told is not None:
            told.arrived(index)

    def _keep(self, directory: Path, key: str) -> None:
        mapping = FileMapping(self._root / key / WEIGHTS_NAME)
        mapping.want_huge_pages()
        if has_swap():
            try:
                mapping.lock()
                self._refused = ""
            except LockRefused as refused:
                self._refused = str(refused)
        with self._lock:
            self._held[directory] = (key, mapping)


def huge_pages_in(directory: Path) -> bool:
    """Whether a file in this tmpfs gets huge pages; found by trying one."""
    size = 4 << 20
    path = directory / f".probe-{os.getpid()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        target = mmap.mmap(descriptor, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(target))
        want_huge_pages(address, size)
        populate_pages(address, size)
        mapping = FileMapping(path)
        mapping.want_huge_pages()
        mapping.populate(0, size)
        kind = mapping.page_kind()
        return kind is not None and kind.huge_share > 0.5
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
