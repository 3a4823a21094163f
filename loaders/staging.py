"""Page-locked memory that pieces pass on their way to a device: read into a chunk, copied from it, used again.

A chunk given back may still be the source of copies under way. It comes with their marks, and whoever takes it next
waits for those first: no chunk is overwritten while a device reads from it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loaders.errors import CheckpointError
from loaders.memory import Block, MemoryPool, round_up
from loaders.plan import DIRECT_BYTES


class Mark(Protocol):
    """A point in the work of a device."""

    def wait(self) -> None:
        """Until the device has come so far. Other threads run meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """`memory` and `data` are the same bytes."""

    number: int
    memory: memoryview
    data: torch.Tensor


Lock = Callable[[int, int], Callable[[], None]]
"""Locks the pages of `count` bytes at `address` in memory; what it returns gives them free."""


class StagingRing:
    """`chunks` of `chunk_bytes` on huge pages, faulted in, and page-locked once by `lock`, for all devices.

    Loads may share it, one after the other or at once. `close` when no load uses it any more; a ring that is not
    closed keeps its pages locked until the process ends.
    """

    def __init__(self, chunk_bytes: int, chunks: int, lock: Lock | None = None) -> None:
        if chunks < 1:
            raise CheckpointError("a staging ring needs at least one chunk")
        self.chunk_bytes = round_up(chunk_bytes, DIRECT_BYTES)
        pool = MemoryPool(self.chunk_bytes * chunks)
        self.huge = pool.huge
        self._block: Block = pool.take(self.chunk_bytes * chunks)
        self._unlock = lock(self._block.address, self.chunk_bytes * chunks) if lock is not None else None
        data = torch.frombuffer(self._block.base, dtype=torch.uint8, count=self.chunk_bytes * chunks)
        self._changed = threading.Condition()
        self._free: deque[tuple[Chunk, Sequence[Mark]]] = deque()
        self._chunks = chunks
        for number in range(chunks):
            begin, end = number * self.chunk_bytes, (number + 1) * self.chunk_bytes
            self._free.append((Chunk(number, self._block.memory[begin:end], data[begin:end]), ()))

    def take(self) -> Chunk:
        """A chunk that nothing reads from any more. Waits for one. Raises where a device fails."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or not self._chunks)
            if not self._free:
                raise CheckpointError("all chunks of the staging ring went with devices that failed; start again")
            chunk, marks = self._free.popleft()
        try:
            for mark in marks:
                mark.wait()
        except BaseException:
            self.lose(chunk)
            raise
        return chunk

    def give_back(self, chunk: Chunk, marks: Sequence[Mark] = ()) -> None:
        """Whoever takes it next waits for `marks` first."""
        with self._changed:
            self._free.append((chunk, marks))
            self._changed.notify()

    def lose(self, chunk: Chunk) -> None:
        """Nobody knows whether a device still reads from it: it is never used again."""
        with self._changed:
            self._chunks -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Unlock the pages, after everything that still reads from them."""
        with self._changed:
            waiting = [mark for _, marks in self._free for mark in marks]
            self._free.clear()
            self._chunks = 0
            self._changed.notify_all()
        try:
            for mark in waiting:
                mark.wait()
        finally:
            unlock, self._unlock = self._unlock, None
            if unlock is not None:
                unlock()
