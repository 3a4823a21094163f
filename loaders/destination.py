"""Whether something may be written to a place: before the first byte, so that a refusal costs nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loaders.errors import CheckpointError, DiskFull
from loaders.manifest import MANIFEST_NAME
from loaders.reading import looking_at


def resolve_destination(destination: Path | str) -> Path:
    """The absolute path, which has a name. A link is refused: replacing it would leave what it points to."""
    destination = Path(destination)
    with looking_at(destination):
        if destination.is_symlink():
            raise CheckpointError(f"{destination} is a symbolic link; give the directory itself")
        return destination.resolve()


def check_replaceable(destination: Path) -> None:
    """CheckpointError unless `destination` is free, an empty directory, or a packed checkpoint, and may be written."""
    with looking_at(destination):
        parent = _nearest(destination.parent)
        if not parent.is_dir():
            raise CheckpointError(f"{parent} is a file, so nothing can be written below it; choose another destination")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError(f"{destination} cannot be written: this user may not write to {parent}")
        if not destination.exists():
            return
        if not destination.is_dir():
            raise CheckpointError(f"{destination} exists and is not a directory; choose another destination")
        if any(destination.iterdir()) and not (destination / MANIFEST_NAME).exists():
            raise CheckpointError(
                f"{destination} holds files that are no packed checkpoint; choose another destination"
            )


def check_space(parent: Path, needed: int) -> None:
    """DiskFull unless the file system of `parent`, which need not exist yet, has `needed` bytes free."""
    parent = _nearest(parent)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DiskFull(
            f"{parent}: the disk is full: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB "
            "are free; free some space"
        )


def _nearest(directory: Path) -> Path:
    """`directory`, or what is above it, whichever exists."""
    while not directory.exists():
        directory = directory.parent
    return directory
