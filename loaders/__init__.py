"""How weights move: the packed checkpoint layout, its verification, and the tiers.

The public names are loaded when they are first used, so that `import loaders` costs nothing, and only those that make
tensors bring torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.checkpoint import MappedCheckpoint, open_checkpoint
    from loaders.errors import CheckpointError
    from loaders.fetch import FetchReport, fetch_checkpoint
    from loaders.load import LoadedCheckpoint, LoadReport, load_checkpoint, start_load
    from loaders.manifest import CompanionFile, Manifest, read_manifest
    from loaders.memory import MemoryPool
    from loaders.packing import pack_checkpoint
    from loaders.staging import StagingRing
    from loaders.verification import (
        Report,
        populate_checkpoint,
        release_checkpoint,
        resident_bytes,
        verify_checkpoint,
    )

__all__ = [
    "CheckpointError",
    "CompanionFile",
    "FetchReport",
    "LoadReport",
    "LoadedCheckpoint",
    "Manifest",
    "MappedCheckpoint",
    "MemoryPool",
    "Report",
    "StagingRing",
    "fetch_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "pack_checkpoint",
    "populate_checkpoint",
    "read_manifest",
    "release_checkpoint",
    "resident_bytes",
    "start_load",
    "verify_checkpoint",
]

_HOMES = {
    "CheckpointError": "loaders.errors",
    "CompanionFile": "loaders.manifest",
    "FetchReport": "loaders.fetch",
    "LoadReport": "loaders.load",
    "LoadedCheckpoint": "loaders.load",
    "Manifest": "loaders.manifest",
    "MappedCheckpoint": "loaders.checkpoint",
    "MemoryPool": "loaders.memory",
    "Report": "loaders.verification",
    "StagingRing": "loaders.staging",
    "fetch_checkpoint": "loaders.fetch",
    "load_checkpoint": "loaders.load",
    "open_checkpoint": "loaders.checkpoint",
    "pack_checkpoint": "loaders.packing",
    "populate_checkpoint": "loaders.verification",
    "read_manifest": "loaders.manifest",
    "release_checkpoint": "loaders.verification",
    "resident_bytes": "loaders.verification",
    "start_load": "loaders.load",
    "verify_checkpoint": "loaders.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
