"""What a figure was measured on: a figure without its machine says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "safetensors",
    "transformers",
    "runai-model-streamer",
    "fastsafetensors",
    "tensorizer",
    "xxhash",
)
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def describe_machine(folder: Path) -> dict[str, Any]:
    """Processor, memory, kernel, versions, and what `folder` lies on; what the system does not tell is left out."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "root": os.geteuid() == 0,
        "versions": _versions(),
        "load_average": os.getloadavg()[0],
    }
    for name in ("enabled", "shmem_enabled"):
        if (_HUGE_PAGES / name).exists():
            # The chosen word stands in brackets.
            words = (_HUGE_PAGES / name).read_text().split()
            found[f"huge_pages_{name}"] = next((word.strip("[]") for word in words if word.startswith("[")), "")
    found |= _mount_of(folder)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]} ({platform.machine()})" if named else platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _mount_of(folder: Path) -> dict[str, str]:
    """Device and kind of the file system that `folder` lies on."""
    try:
        lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return {}
    place = folder.resolve()
    below = [words for words in lines if len(words) > 2 and place.is_relative_to(words[1])]
    if not below:
        return {}
    best = max(below, key=lambda words: len(words[1]))
    return {"device": best[0], "file_system": best[2]}
