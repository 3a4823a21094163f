"""Loading a checkpoint from disk into memory, as fast as the disk is: for a store, or for anyone's script.

    with load_checkpoint("packed/qwen3") as loaded:
        tensors, report = loaded.tensors, loaded.report

Threads take piece after piece: some read, one in two cores checks what was read. Both run without the interpreter lock.
Pieces come in the order of first use, so that computing may begin before the end (`CheckpointLoad.wait`).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import msgspec
import torch

from loaders.device_target import DeviceMap, DeviceName, open_device_target
from loaders.direct import LargeFile, Way, best_way
from loaders.errors import CheckpointError, quote
from loaders.memory import MemoryPool
from loaders.packed import checksum_of
from loaders.plan import LoadPlan, plan_load
from loaders.read_threads import URGENT, Check, ReadThreads
from loaders.staging import StagingRing
from loaders.targets import HostTarget, LoadTarget

READ_THREADS = 16
"""Four times what keeps a disk busy: some check what was read, and short reads leave gaps."""
SLOW_DISK_BYTES_PER_SECOND = 1e9
"""A disk below this is worth a word: any NVMe reads faster."""

Progress = Callable[[int, int], None]


class StageReport(msgspec.Struct, frozen=True):
    """One stage of a load: the seconds that its threads were busy together, over how many threads."""

    seconds: float
    threads: int
    bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """What this stage alone would have reached with its threads busy all the time."""
        return self.bytes * self.threads / self.seconds / 1e9 if self.seconds > 0 else float("inf")


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a load did. `limit` names the slowest stage, `advice` what would make it faster, if anything."""

    source: str
    bytes: int
    seconds: float
    gigabytes_per_second: float
    way: str
    """How the files were read: direct, buffered (they lay in the page cache), or mixed."""
    verified: bool
    huge_pages: bool
    """Whether the system was willing to back the memory with huge pages."""
    stages: dict[str, StageReport]
    limit: str
    advice: str = ""


class CheckpointLoad:
    """A load under way. `tensors` are views of its memory from the beginning; their numbers are there after `wait`.

    `tensors` are writable and private to this process. They stay valid as long as anything refers to them.
    """

    def __init__(
        self,
        plan: LoadPlan,
        target: LoadTarget,
        *,
        ways: Iterable[Way],
        readers: ReadThreads | None = None,
        priority: int = URGENT,
        progress: Progress | None = None,
    ) -> None:
        self._began = time.perf_counter()
        self._plan, self._target, self._progress = plan, target, progress
        self._done = [False] * len(plan.pieces)
        self._done_bytes = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._cancelled = False
        self._read_seconds = self._check_seconds = 0.0
        self._ended_at = 0.0
        self._final: LoadReport | None = None
        self._files: list[LargeFile] = []
        try:
            for path, way in zip(plan.files, ways, strict=True):
                self._files.append(LargeFile(path, way))
        except BaseException:
            self._close_files()
            target.abandon()
            raise
        own = readers is None
        threads = readers or ReadThreads(READ_THREADS)
        self._threads = max(1, min(threads.threads, len(plan.pieces)))
        self._left = len(plan.pieces)
        for index in range(len(plan.pieces)):
            threads.submit(priority, functools.partial(self._read, index))
        if own:
            threads.close()
        try:
            self.tensors = target.view()  # while the disk is at work already
        except BaseException:
            self.cancel()
            raise

    @property
    def packed(self) -> bool:
        """Whether the names are the module's own, as in a packed directory."""
        return self._plan.packed

    @property
    def finished(self) -> bool:
        """Whether `finish` has returned."""
        return self._final is not None

    def wait(self, names: Iterable[str]) -> None:
        """Until the bytes of these tensors are there and checked. Raises CheckpointError where that will not be."""
        wanted = self._pieces_of(names)
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or all(self._done[index] for index in wanted))
            if self._error is not None and not all(self._done[index] for index in wanted):
                raise self._error
        self._target.wait(wanted)

    def finish(self) -> LoadReport:
        """Until everything is there; what it took. Raises CheckpointError, and then nothing of it may be used.

        May be called again.
        """
        if self._final is not None:
            return self._final
        with self._changed:
            self._changed.wait_for(lambda: not self._left)
        self._close_files()
        if self._error is not None:
            self.tensors = {}
            self._target.abandon()
            raise self._error
        try:
            copied = self._target.finish()
        except BaseException as error:
            self.tensors = {}
            self._error = error
            raise
        self._final = self._report(copied)
        return self._final

    def cancel(self) -> None:
        """Stop reading; `wait` and `finish` raise. What is being read is read to its end, nothing new is begun."""
        with self._changed:
            self._cancelled = True
            self._fail(CheckpointError(f"loading {self._plan.directory} was cancelled"))

    # ---- threads ----------------------------------------------------------------------------------------------

    def _read(self, index: int) -> Check | None:
        """Read one piece. What comes back checks it and hands it on."""
        if self._error is not None:
            self._ended(index)
            return None
        piece = self._plan.pieces[index]
        try:
            memory = self._target.room(index)
            began = time.perf_counter()
            try:
                self._files[piece.file].read(memory, piece.offset, piece.count)
            except BaseException:
                self._target.dropped(index)
                raise
        except BaseException as error:
            self._ended(index, error)
            return None
        seconds = time.perf_counter() - began
        return functools.partial(self._check, index, memory, seconds)

    def _check(self, index: int, memory: memoryview, read_seconds: float) -> None:
        piece = self._plan.pieces[index]
        seconds = 0.0
        if self._error is not None:
            self._target.dropped(index)
            self._ended(index)
            return
        try:
            try:
                if piece.checksum is not None:
                    began = time.perf_counter()
                    found = checksum_of(memory[: piece.count])
                    seconds = time.perf_counter() - began
                    if found != piece.checksum:
                        raise CheckpointError(
                            f"{self._plan.files[piece.file]}: {self._plan.describe(index)} is damaged (its checksum "
                            "differs); pack or copy the checkpoint again"
                        )
            except BaseException:
                self._target.dropped(index)
                raise
            self._target.arrived(index)
        except BaseException as error:
            self._ended(index, error)
            return
        self._ended(index, None, read_seconds, seconds)

    def _ended(
        self, index: int, error: BaseException | None = None, read_seconds: float = 0.0, check_seconds: float = 0.0
    ) -> None:
        """No thread has to do with the piece any more."""
        now = time.perf_counter()
        with self._changed:
            self._left -= 1
            if error is not None:
                self._fail(error)
            elif self._error is None:
                self._done[index] = True
                self._done_bytes += self._plan.pieces[index].count
                self._read_seconds += read_seconds
                self._check_seconds += check_seconds
                if self._progress is not None:
                    try:
                        self._progress(self._done_bytes, self._plan.bytes)
                    except BaseException as raised:  # the caller's own: it ends the load, not this thread
                        self._fail(raised)
            self._ended_at = now
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._changed.notify_all()

    def _pieces_of(self, names: Iterable[str]) -> list[int]:
        places = {tensor.name: tensor for tensor in self._plan.tensors}
        wanted = []
        for name in names:
            if (tensor := places.get(self._plan.aliases.get(name, name))) is None:
                raise CheckpointError(f"{self._plan.directory} has no tensor {quote(name)}")
            wanted.append(tensor)
        return [
            index
            for index, piece in enumerate(self._plan.pieces)
            if any(tensor.begin < piece.place + piece.count and tensor.end > piece.place for tensor in wanted)
        ]

    # ---- the report -------------------------------------------------------------------------------------------

    def _report(self, copied: float) -> LoadReport:
        """`copied`: seconds that copying to devices kept threads busy; 0 where nothing is copied."""
        if copied:
            self._ended_at = time.perf_counter()
        seconds = max(1e-9, self._ended_at - self._began)
        count = self._plan.bytes
        stages = {"read": StageReport(self._read_seconds, self._threads, count)}
        verified = any(piece.checksum is not None for piece in self._plan.pieces)
        if verified:
            stages["checksum"] = StageReport(self._check_seconds, self._threads, count)
        if copied:
            stages["copy"] = StageReport(copied, self._threads, count)
        limit = max(stages, key=lambda name: stages[name].seconds)
        ways = {file.way for file in self._files}
        way = ways.pop() if len(ways) == 1 else "mixed"
        rate = count / seconds
        advice = ""
        if limit == "read" and way == "direct" and rate < SLOW_DISK_BYTES_PER_SECOND:
            advice = f"the disk was the limit: it gave {rate / 1e9:.2f} GB/s"
        return LoadReport(
            source=str(self._plan.directory),
            bytes=count,
            seconds=seconds,
            gigabytes_per_second=rate / 1e9,
            way=way,
            verified=verified,
            huge_pages=self._target.huge,
            stages=stages,
            limit=limit,
            advice=advice,
        )

    def _close_files(self) -> None:
        for file in self._files:
            file.close()


class LoadedCheckpoint:
    """The tensors of a checkpoint, by the names of its files, and the report of how they came."""

    def __init__(self, tensors: dict[str, torch.Tensor], report: LoadReport) -> None:
        self.tensors = tensors
        self.report = report

    def close(self) -> None:
        """Let go of the tensors; memory goes back to its pool with the last of them."""
        self.tensors = {}

    def __enter__(self) -> LoadedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_load(
    directory: Path | str,
    *,
    device: DeviceName | DeviceMap | None = None,
    verify: bool = True,
    pool: MemoryPool | None = None,
    ring: StagingRing | None = None,
    readers: ReadThreads | None = None,
    priority: int = URGENT,
    way: Way | None = None,
    progress: Progress | None = None,
) -> CheckpointLoad:
    """Begin a load and return at once; see `load_checkpoint`."""
    plan = plan_load(Path(directory), verify=verify)
    ways = [way or best_way(path) for path in plan.files]
    target: LoadTarget
    if device is None or str(device) == "cpu":
        memory = pool or MemoryPool(plan.memory_bytes, populate=False)
        target = HostTarget(plan, memory.take(plan.memory_bytes), huge=memory.huge)
    else:
        target = open_device_target(plan, device, ring)
    return CheckpointLoad(plan, target, ways=ways, readers=readers, priority=priority, progress=progress)


def load_checkpoint(
    directory: Path | str,
    *,
    device: DeviceName | DeviceMap | None = None,
    verify: bool = True,
    pool: MemoryPool | None = None,
    ring: StagingRing | None = None,
    readers: ReadThreads | None = None,
    priority: int = URGENT,
    way: Way | None = None,
    progress: Progress | None = None,
) -> LoadedCheckpoint:
    """All tensors of a packed directory, or of a plain one with safetensors, in memory, with a report.

    Names are those of the files: a packed directory has the module's own. `device` is this machine's memory unless it
    names another (`"cuda:0"`), or says for each tensor, or the beginning of its name, where it goes
    (`{"model.layers.0": "cuda:0", "": "cuda:1"}`). `pool` is memory that is faulted in already and is used again: with
    it a load is as fast as the disk from the first byte; `ring` is the same for what goes to devices. `readers` are
    threads that several loads share, the smallest `priority` first. `way` is chosen by where the files lie.
    Raises CheckpointError: nothing half-loaded is ever returned.
    """
    load = start_load(
        directory,
        device=device,
        verify=verify,
        pool=pool,
        ring=ring,
        readers=readers,
        priority=priority,
        way=way,
        progress=progress,
    )
    try:
        report = load.finish()
    except BaseException:
        load.cancel()
        raise
    return LoadedCheckpoint(load.tensors, report)
