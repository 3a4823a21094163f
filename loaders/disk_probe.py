"""How fast the disk gives these very files at this moment: direct reads into huge pages, as no loader can beat.

The files themselves, since a virtual disk does not give every file alike: a copy of a file was read 6 % faster than the
file. What is read lands in memory of the same size: a ring of a few pieces stays in the processor's cache and
flatters the disk by some percent that no loader can have, for a model has to go to DRAM.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from loaders.direct import LargeFile
from loaders.errors import CheckpointError
from loaders.memory import MemoryPool

PROBE_BYTES = 2 << 30
PIECE_BYTES = 8 << 20
THREADS = 4


class DiskProbe:
    """Memory for `probe_bytes`, faulted in once. `huge` False shows what 4 KiB pages cost: the same, in small pages."""

    def __init__(self, probe_bytes: int = PROBE_BYTES, *, huge: bool = True) -> None:
        self.bytes = max(1, probe_bytes // PIECE_BYTES) * PIECE_BYTES
        self._block = MemoryPool(self.bytes, huge=huge).take(self.bytes)

    def measure(self, files: Sequence[Path]) -> float:
        """GB/s of one pass over `files`, or over pieces evenly spread over them where they are larger than the memory.

        Direct reads neither see the page cache nor fill it. Raises CheckpointError.
        """
        with ExitStack() as opened:
            pieces = []
            for path in files:
                file = LargeFile(path, "direct")
                opened.callback(file.close)
                pieces += [(file, number * PIECE_BYTES) for number in range(path.stat().st_size // PIECE_BYTES)]
            if not pieces:
                raise CheckpointError(f"files of less than {PIECE_BYTES >> 20} MiB say nothing of a disk; ask for more")
            room = self.bytes // PIECE_BYTES
            chosen = [pieces[number * len(pieces) // room] for number in range(room)] if len(pieces) > room else pieces

            def read(thread: int) -> None:
                for place in range(thread, len(chosen), THREADS):
                    file, offset = chosen[place]
                    begin = place * PIECE_BYTES
                    file.read(self._block.memory[begin : begin + PIECE_BYTES], offset, PIECE_BYTES)

            with ThreadPoolExecutor(THREADS) as pool:
                began = time.perf_counter()
                list(pool.map(read, range(THREADS)))
                return len(chosen) * PIECE_BYTES / (time.perf_counter() - began) / 1e9
