"""The DRAM tier of a server: where the weights of its models lie in memory, for all of its workers.

    page cache      the pages that the kernel keeps of a packed file; room is the kernel's affair
    shared memory   a copy in a tmpfs, which nothing but an eviction removes

Both are mapped by workers with `open_checkpoint`, both outlive the process of the store, and both are locked in memory
as far as the system allows, so that other programs do not push them out. Which is the better one is found by trying:
pages that are huge make a start from DRAM independent of the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from loaders.arrival import Announcement
from loaders.doctor import examine_memory
from loaders.errors import CheckpointError
from loaders.manifest import Manifest
from loaders.model_copy import ModelCopy
from loaders.page_cache_tier import LookedAfter, PageCacheTier
from loaders.shared_memory_tier import SharedMemoryTier, default_root

KINDS = ("auto", "page-cache", "shared-memory")


class DramTier(Protocol):
    """One server's models in memory. `directory` is always that of the packed model on the SSD.

    Safe to use from several threads. What is in memory survives this object and its process.
    """

    @property
    def description(self) -> str:
        """Which kind this is and what backs it, as one sentence without a full stop."""
        ...

    @property
    def kind(self) -> str:
        """The same in a few words, which hold as long as this object does."""
        ...

    @property
    def weights_root(self) -> Path | None:
        """Where workers find models by `shared_memory_tier.key_of`; None: in the packed directories themselves."""
        ...

    def bring(
        self, directory: Path, *, before: Callable[[], None] | None = None, told: Announcement | None = None
    ) -> int:
        """Every byte is in memory and checked when this returns; how many. `before` is called before each chunk, `told`
        hears which file the bytes come to and of every chunk, unless all of it is there already; its end is the
        caller's.

        Raises CheckpointError for what is damaged, `NoRoom` where memory does not suffice.
        """
        ...

    def filling(self, manifest: Manifest, name: str) -> AbstractContextManager[ModelCopy | None]:
        """Memory of this tier for a fetch to put the weights of the model in the directory `name` into; None where
        it does not need to.

        Raises `NoRoom`, CheckpointError. What was not finished is gone after the block.
        """
        ...

    def adopt(self, directory: Path) -> bool:
        """Take what was just written to `directory`, every byte checked on the way, as being in memory, if it is."""
        ...

    def holds(self, directory: Path) -> bool:
        """Whether these very weights are in memory now, all of them, and were checked."""
        ...

    def release(self, directory: Path) -> int:
        """Let it go; how many bytes stay in memory because some process still has them mapped."""
        ...

    def forget_others(self, directories: Iterable[Path]) -> None:
        """These are all the packed models there are: let go of what a store before this one left of any other."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of the models that count as being in memory."""
        ...

    def look_after(self) -> LookedAfter:
        """Bring back what went away unasked."""
        ...


def choose_tier(kind: str, models: Path, *, server: str) -> DramTier:
    """The tier for the packed models in `models`: one of KINDS, or a directory in a tmpfs, as an absolute path.

    Raises CheckpointError for what is neither, or cannot be had here.
    """
    state = models.parent / f"dram-{server}"
    shared = default_root(state)
    if kind == "auto":
        kind = "shared-memory" if examine_memory(models).best == "shared memory" else "page-cache"
    if kind == "page-cache":
        SharedMemoryTier.remove(shared)
        return PageCacheTier(state)
    if kind == "shared-memory":
        return SharedMemoryTier(shared)
    if not kind.startswith("/"):
        raise CheckpointError(f"{kind!r} is no kind of DRAM tier: use auto, page-cache, shared-memory or /DIRECTORY")
    return SharedMemoryTier(Path(kind) / shared.name)
