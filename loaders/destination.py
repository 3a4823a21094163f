"""Whether something may be written to a place: before the first byte, so that a refusal costs nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from loaders.errors import CheckpointError, DiskFull
from loaders.manifest import MANIFEST_NAME


def check_replaceable(destination: Path) -> None:
    """CheckpointError unless `destination` is free, an empty directory, or a packed checkpoint."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination} exists and is not a directory; choose another destination")
    if any(destination.iterdir()) and not (destination / MANIFEST_NAME).exists():
        raise CheckpointError(f"{destination} holds files that are no packed checkpoint; choose another destination")


def check_space(parent: Path, needed: int) -> None:
    """DiskFull unless the file system of `parent`, which need not exist yet, has `needed` bytes free."""
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DiskFull(
            f"{parent}: the disk is full: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB "
            "are free; free some space"
        )
