"""How much more memory may be taken for good before the system ends a process for want of it.

What counts is what the kernel says is available, the limit of every control group above this process, and the size of
the tmpfs. A reserve stays free: workers need memory, too, and an eviction of theirs is worse than a refusal here.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

RESERVE_BYTES = 256 << 20
RESERVE_SHARE = 0.02
"""Of the machine's memory, whichever is more."""


class Room(msgspec.Struct, frozen=True):
    """`bytes` may be taken (negative: none, and the reserve is used); `free` are left; `limit` says what sets it."""

    bytes: int
    free: int
    limit: str


def memory_room() -> Room | None:
    """The tightest of the machine's memory and the control groups of this process; None where nothing is told."""
    found = [room for room in (_machine(), _group()) if room is not None]
    return min(found, key=lambda room: room.bytes, default=None)


def memory_ceiling() -> Room | None:
    """More than these bytes cannot be had by any eviction of pages of files: who takes more is ended by the system.

    None where nothing is told.
    """
    found = [room for room in (_machine(swap=True), _group(active=True)) if room is not None]
    return min(found, key=lambda room: room.free, default=None)


def room_in(directory: Path) -> Room:
    """The same for a directory in a tmpfs, whose own size counts as well."""
    told = os.statvfs(directory)
    free = told.f_bavail * told.f_frsize
    own = Room(free, free, f"the tmpfs at {directory}")
    memory = memory_room()
    return own if memory is None or own.bytes <= memory.bytes else memory


def has_swap() -> bool:
    """Whether the kernel may move pages of a tmpfs out of memory."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False


def _machine(*, swap: bool = False) -> Room | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        free = values["MemAvailable"] + (values.get("SwapFree", 0) if swap else 0)
        return Room(free - _reserve(values["MemTotal"]), free, "the memory of this machine")
    except (OSError, ValueError, IndexError, KeyError):
        return None


def _reserve(total: int) -> int:
    return max(RESERVE_BYTES, int(total * RESERVE_SHARE)) if total > 4 * RESERVE_BYTES else total // 8


def _group(*, active: bool = False) -> Room | None:
    """`active`: pages of files that were used lately count as free, too."""
    tightest: Room | None = None
    for path in _groups():
        limit = _number(path / "memory.max") or _number(path / "memory.limit_in_bytes")
        used = _number(path / "memory.current") or _number(path / "memory.usage_in_bytes")
        # A limit that is no limit is near 2**63 in the first version.
        if not limit or limit > 1 << 60:
            continue
        free = limit - used + _reclaimable(path / "memory.stat", active=active)
        room = Room(free - _reserve(limit), free, f"the memory limit of the control group {path}")
        if tightest is None or room.bytes < tightest.bytes:
            tightest = room
    return tightest


def _groups() -> list[Path]:
    """The directories of this process's groups and of those above them, of both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        path = top / name.lstrip("/")
        found += [one for one in (path, *path.parents) if one == top or top in one.parents]
    return found


def _number(path: Path) -> int:
    """0 where there is none, or where it is the word `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _reclaimable(path: Path, *, active: bool) -> int:
    """Bytes of files that the kernel drops before it ends a process."""
    try:
        values = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    kinds = ("inactive_file", "active_file") if active else ("inactive_file",)
    return sum(int(values.get(f"total_{kind}") or values.get(kind) or 0) for kind in kinds)
