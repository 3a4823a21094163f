"""A model's copy that grows in shared memory: whoever has the bytes puts them there, chunk by chunk, each one checked.

It has no final name before it is whole, so nobody opens less, and what is given up is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from loaders.errors import CheckpointError
from loaders.manifest import MANIFEST_NAME, Manifest
from loaders.memory import populate_pages, round_up, want_huge_pages
from loaders.packed import WEIGHTS_NAME
from loaders.plan import DIRECT_BYTES
from loaders.verification import attach


class ModelCopy:
    """`temporary` becomes `final`; both lie in one tmpfs. `taken(bytes)` is told of pages that are there from now on.

    Its memory may be used from several threads. Raises OSError.
    """

    def __init__(self, temporary: Path, final: Path, manifest: Manifest, taken: Callable[[int], None]) -> None:
        self._temporary, self._final, self._manifest, self._taken = temporary, final, manifest, taken
        self.path = temporary / WEIGHTS_NAME
        """Where the weights grow."""
        temporary.mkdir()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            # Direct reads end at whole blocks; what is too much is cut off afterwards.
            os.ftruncate(descriptor, round_up(manifest.bytes, DIRECT_BYTES))
            target = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(target))
        want_huge_pages(self._address, len(target))
        self._memory = memoryview(target)

    def memory(self, offset: int, count: int) -> memoryview:
        """Where bytes [offset, offset + count) belong, with room for `count` rounded up to DIRECT_BYTES.

        Raises `NoRoom`.
        """
        # A tmpfs without room ends who touches it by SIGBUS; asked for beforehand, it is an error.
        populate_pages(self._address + offset, count)
        self._taken(count)
        return self._memory[offset : offset + round_up(count, DIRECT_BYTES)]

    def finish(self, directory: Path) -> bool:
        """Every byte of the weights is there and was checked; the files beside them come from `directory`.

        Whether this copy is the one that has the final name. Raises CheckpointError.
        """
        try:
            os.truncate(self.path, self._manifest.bytes)
            for name in (*self._manifest.files, MANIFEST_NAME):
                (self._temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(directory / name, self._temporary / name)
            # The copy is what workers open: that it is whole is checked on the copy.
            attach(self._temporary, check_files=True)
            if self._final.is_dir():  # the same weights under another name were quicker
                return False
            self._temporary.rename(self._final)
            return True
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be brought to {self._final.parent}: {error.strerror}") from error

    def discard(self) -> None:
        """What did not become a whole copy is gone."""
        shutil.rmtree(self._temporary, ignore_errors=True)
