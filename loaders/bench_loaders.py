"""Every way of loading that the bench compares, each as `prepare` (before the clock) and `load` (on the clock).

A peer is measured at its default and at its best setting; its version is told. Peers come with the extra `bench`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaders.direct import Way


@dataclass(frozen=True)
class Paths:
    """The same weights in every layout."""

    source: Path
    packed: Path
    torch_file: Path
    tensorizer_file: Path

    @property
    def shards(self) -> list[Path]:
        return sorted(self.source.glob("*.safetensors"))


@dataclass(frozen=True)
class Loader:
    """`prepare` imports and sets up, and returns what loads. `reads` names the layout."""

    prepare: Callable[[Paths], Callable[[], Any]]
    reads: str
    package: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    step: bool = False
    """Only a step of the ablation: nobody would load so."""

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package) if self.package else ""


HUGE_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def _pooled(paths: Paths, *, verify: bool = True) -> Callable[[], Any]:
    from loaders.load import load_checkpoint
    from loaders.memory import MemoryPool
    from loaders.plan import plan_load

    pool = MemoryPool(plan_load(paths.packed).memory_bytes)
    return lambda: load_checkpoint(paths.packed, pool=pool, verify=verify).tensors


def _pooled_then_checked(paths: Paths) -> Callable[[], Any]:
    """No pipeline: everything is read, then everything is checked, by as many threads."""
    from loaders.direct import best_way
    from loaders.load import READ_THREADS, CheckpointLoad
    from loaders.memory import MemoryPool
    from loaders.packed import checksum_of
    from loaders.plan import plan_load
    from loaders.read_threads import ReadThreads
    from loaders.targets import HostTarget

    plan = plan_load(paths.packed)
    block = MemoryPool(plan.memory_bytes).take(plan.memory_bytes)

    def load() -> Any:
        silent = plan_load(paths.packed, verify=False)
        target = HostTarget(silent, block, huge=True)
        reading = CheckpointLoad(silent, target, ways=map(best_way, plan.files))
        reading.finish()
        left = threading.Semaphore(0)
        damaged: list[int] = []
        threads = ReadThreads(READ_THREADS)

        def check(index: int) -> None:
            piece = plan.pieces[index]
            if checksum_of(block.memory[piece.place : piece.place + piece.count]) != piece.checksum:
                damaged.append(index)
            left.release()

        for index in range(len(plan.pieces)):
            threads.submit(0, functools.partial(check, index))
        threads.close()
        for _ in plan.pieces:
            left.acquire()
        assert not damaged
        return reading.tensors

    return load


def _fresh(paths: Paths) -> Callable[[], Any]:
    from loaders.load import load_checkpoint

    return lambda: load_checkpoint(paths.packed).tensors


def _step(paths: Paths, *, threads: int, way: Way) -> Callable[[], Any]:
    """Ours with small pages in fresh memory, as most loaders have them."""
    from loaders.load import load_checkpoint
    from loaders.memory import MemoryPool
    from loaders.plan import plan_load
    from loaders.read_threads import ReadThreads

    count = plan_load(paths.packed).memory_bytes

    def load() -> Any:
        pool = MemoryPool(count, populate=False, huge=False)
        return load_checkpoint(paths.packed, pool=pool, readers=ReadThreads(threads), way=way).tensors

    return load


def _plain(paths: Paths) -> Callable[[], Any]:
    from loaders.load import load_checkpoint

    return lambda: load_checkpoint(paths.source).tensors


def _mapped(paths: Paths) -> Callable[[], Any]:
    from loaders.checkpoint import open_checkpoint

    return lambda: open_checkpoint(paths.packed).tensors


def _from_pretrained_ours(paths: Paths) -> Callable[[], Any]:
    import transformers

    from loaders.hf import from_pretrained

    _ = transformers.LlamaForCausalLM
    return lambda: dict(from_pretrained(paths.packed).state_dict())


def _load_file(paths: Paths) -> Callable[[], Any]:
    from safetensors.torch import load_file

    return lambda: {name: tensor for shard in paths.shards for name, tensor in load_file(shard).items()}


def _safe_open(paths: Paths) -> Callable[[], Any]:
    import torch
    from safetensors import safe_open

    def load() -> Any:
        tensors = {}
        for shard in paths.shards:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    found = file.get_tensor(name)
                    tensors[name] = torch.empty_like(found).copy_(found)
        return tensors

    return load


def _torch_load(paths: Paths, *, mapped: bool = False) -> Callable[[], Any]:
    import torch

    return lambda: torch.load(paths.torch_file, mmap=mapped, weights_only=True)


def _runai(paths: Paths) -> Callable[[], Any]:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(shard) for shard in paths.shards])
            return dict(streamer.get_tensors())

    return load


def _fastsafetensors(paths: Paths, *, nogds: bool = True) -> Callable[[], Any]:
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load() -> Any:
        loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=nogds)
        loader.add_filenames({0: [str(shard) for shard in paths.shards]})
        buffer = loader.copy_files_to_device()
        return {name: buffer.get_tensor(name) for name in loader.get_keys()}

    return load


def _tensorizer(paths: Paths) -> Callable[[], Any]:
    from tensorizer import TensorDeserializer

    def load() -> Any:
        deserializer = TensorDeserializer(str(paths.tensorizer_file), device="cpu", lazy_load=False)
        return dict(deserializer.items())

    return load


def _from_pretrained(paths: Paths) -> Callable[[], Any]:
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _ = transformers.LlamaForCausalLM

    def load() -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(paths.source, dtype=torch.bfloat16)
        return dict(model.state_dict())

    return load


LOADERS: dict[str, Loader] = {
    "longshore, pool": Loader(_pooled, "packed"),
    "longshore, pool, no checksums": Loader(lambda paths: _pooled(paths, verify=False), "packed"),
    "longshore, fresh memory": Loader(_fresh, "packed"),
    "longshore, mapped": Loader(_mapped, "packed"),
    "longshore, plain directory": Loader(_plain, "source"),
    "longshore, from_pretrained": Loader(_from_pretrained_ours, "packed"),
    "longshore, one thread, buffered, small pages": Loader(
        lambda paths: _step(paths, threads=1, way="buffered"), "packed", step=True
    ),
    "longshore, one thread, direct, small pages": Loader(
        lambda paths: _step(paths, threads=1, way="direct"), "packed", step=True
    ),
    "longshore, direct, small pages": Loader(lambda paths: _step(paths, threads=8, way="direct"), "packed", step=True),
    "longshore, pool, checked afterwards": Loader(_pooled_then_checked, "packed", step=True),
    "safetensors load_file": Loader(_load_file, "source", "safetensors"),
    "safe_open + copy": Loader(_safe_open, "source", "safetensors"),
    "safe_open + copy, huge malloc": Loader(_safe_open, "source", "safetensors", HUGE_MALLOC),
    "torch.load": Loader(_torch_load, "torch", "torch"),
    "torch.load, mmap": Loader(lambda paths: _torch_load(paths, mapped=True), "torch", "torch"),
    "runai-model-streamer": Loader(_runai, "source", "runai-model-streamer"),
    "runai-model-streamer, 16 threads": Loader(
        _runai, "source", "runai-model-streamer", {"RUNAI_STREAMER_CONCURRENCY": "16"} | HUGE_MALLOC
    ),
    "fastsafetensors": Loader(_fastsafetensors, "source", "fastsafetensors"),
    "fastsafetensors, huge malloc": Loader(_fastsafetensors, "source", "fastsafetensors", HUGE_MALLOC),
    "tensorizer": Loader(_tensorizer, "tensorizer", "tensorizer"),
    "tensorizer, huge malloc": Loader(_tensorizer, "tensorizer", "tensorizer", HUGE_MALLOC),
    "from_pretrained": Loader(_from_pretrained, "source", "transformers"),
}
"""By the name in the table. Whatever the bench is told of by another name does not exist."""


def installed(loader: Loader) -> bool:
    if not loader.package:
        return True
    try:
        importlib.metadata.version(loader.package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needed_paths(loader: Loader, paths: Paths) -> list[Path]:
    """The large files that this loader reads."""
    if loader.reads == "packed":
        return [paths.packed / "model.safetensors"]
    if loader.reads == "torch":
        return [paths.torch_file]
    return [paths.tensorizer_file] if loader.reads == "tensorizer" else paths.shards
