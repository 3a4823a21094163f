"""How fast the disk is at this moment: direct reads into huge pages, as nothing that loads a checkpoint can beat."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loaders.direct import LargeFile
from loaders.memory import MemoryPool

PROBE_BYTES = 1 << 30
PIECE_BYTES = 8 << 20
THREADS = 4


class DiskProbe:
    """Reads a file of its own of `probe_bytes` in `directory`; the file is made at the first use and stays."""

    def __init__(self, directory: Path, probe_bytes: int = PROBE_BYTES) -> None:
        self._bytes = max(1, probe_bytes // PIECE_BYTES) * PIECE_BYTES
        self.path = directory / f"disk-probe-{self._bytes >> 20}.bin"
        if not self.path.exists() or self.path.stat().st_size != self._bytes:
            block = os.urandom(PIECE_BYTES)
            with self.path.open("wb") as file:
                for _ in range(self._bytes // PIECE_BYTES):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        self._pool = MemoryPool(THREADS * PIECE_BYTES)
        self._blocks = [self._pool.take(PIECE_BYTES) for _ in range(THREADS)]

    def measure(self) -> float:
        """GB/s of one pass over the file. `direct` reads do not see the page cache."""
        file = LargeFile(self.path, "direct")
        try:
            began = time.perf_counter()
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda thread: self._read(file, thread), range(THREADS)))
            return self._bytes / (time.perf_counter() - began) / 1e9
        finally:
            file.close()

    def _read(self, file: LargeFile, thread: int) -> None:
        memory = self._blocks[thread].memory
        for piece in range(thread, self._bytes // PIECE_BYTES, THREADS):
            file.read(memory, piece * PIECE_BYTES, PIECE_BYTES)
