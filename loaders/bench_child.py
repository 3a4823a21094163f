"""One load in a process of its own: prepares, says `ready`, waits for a line, loads, touches, tells as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from loaders.bench_loaders import LOADERS, Paths

PAGE_BYTES = 4096


def touch(tensors: dict[str, Any]) -> tuple[int, int]:
    """(bytes of all tensors, a sum over one byte of every page of them): then every page is there."""
    import torch

    total, seen = 0, 0
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        total += flat.numel()
        seen += int(flat[::PAGE_BYTES].sum())
    return total, seen


def digests(tensors: dict[str, Any]) -> dict[str, str]:
    """xxh3 of each tensor's bytes, by name."""
    import torch
    import xxhash

    found = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = xxhash.xxh3_64_hexdigest(memoryview(flat.numpy()))
    return found


def main(arguments: list[str]) -> None:
    name, *paths, check = arguments
    loader = LOADERS[name]
    load = loader.prepare(Paths(*map(Path, paths)))
    import torch

    # Touching is the bench's, not the loader's: its first use must not be on the clock.
    touch({"": torch.zeros(10_000, dtype=torch.bfloat16)})
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    tensors = load()
    loaded = time.perf_counter()
    total, _ = touch(tensors)
    touched = time.perf_counter()
    answer: dict[str, Any] = {
        "seconds": touched - began,
        "load_seconds": loaded - began,
        "bytes": total,
        "tensors": len(tensors),
        "version": loader.version,
    }
    if check == "check":
        answer["digests"] = digests(tensors)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
