"""`longshore bench load`: this room's loaders beside what people use, each load in a fresh process, the disk probed.

Rate = bytes of the tensors / (load returned + one byte of every 4 KiB page read). Share = rate / mean of two probes of
the disk around the run, direct reads of the loader's own files: the disk's rate drifts, the share compares. Loaders are
interleaved; what is told is the median.
Before a cold run the page cache is dropped (as root: all of it; otherwise the loader's files by fadvise); before every
run memory of twice the model's size (most loaders have the weights in the page cache and in tensors of their own) is
touched and freed, so that no loader pays for memory that the host has taken back.
On a virtual disk the host may still have the files in its own cache: all of them are read once before the first run, so
that every loader finds them there alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loaders.bench_checkpoint import make_checkpoint, make_packed
from loaders.bench_loaders import LOADERS, Paths, installed, needed_paths
from loaders.disk_probe import PROBE_BYTES, DiskProbe
from loaders.errors import CheckpointError
from loaders.mapping import drop_from_memory
from loaders.memory import MemoryPool
from loaders.room import memory_room

CHILD_SECONDS = 600
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class Run(msgspec.Struct, frozen=True):
    """One load. `share` is 0 for a warm one, which has no disk in it."""

    gigabytes_per_second: float
    share: float
    probe_before: float = 0.0
    probe_after: float = 0.0


class Row(msgspec.Struct, frozen=True):
    """One loader at one size: all of its runs, the package's version, and whether its tensors equalled the source."""

    loader: str
    version: str
    bytes: int
    cold: tuple[Run, ...]
    warm: tuple[Run, ...]
    equal: bool

    def median(self, which: str) -> float:
        runs = {"cold": [r.gigabytes_per_second for r in self.cold], "share": [r.share for r in self.cold]}
        runs["warm"] = [run.gigabytes_per_second for run in self.warm]
        return statistics.median(runs[which]) if runs[which] else 0.0


class LoadBench(msgspec.Struct, frozen=True):
    """`dropped` says how the files were made cold. Probes in GB/s: into huge pages, and into 4 KiB pages beside it."""

    dropped: str
    rows: tuple[Row, ...]
    probe: float = 0.0
    probe_small_pages: float = 0.0
    probe_bytes: int = 0
    failed: dict[str, str] = {}
    """Loaders of others that could not load, and why: they are left out from then on."""


def prepare_paths(folder: Path, tensor_bytes: int, loaders: Sequence[str], tell: Callable[[str], None]) -> Paths:
    """The same weights in every layout that these loaders read, below `folder`; what is there is used again."""
    name = f"{tensor_bytes / 1e9:g}gb"
    layouts = {LOADERS[loader].reads for loader in loaders}
    tell(f"making {tensor_bytes / 1e9:g} GB of weights in {folder}")
    source = make_checkpoint(folder / f"source-{name}", tensor_bytes)
    paths = Paths(source, folder / f"packed-{name}", folder / f"torch-{name}.pt", folder / f"tensors-{name}")
    make_packed(source, paths.packed)
    if "torch" in layouts and not paths.torch_file.exists():
        import torch
        from safetensors.torch import load_file

        state = {key: value for shard in paths.shards for key, value in load_file(shard).items()}
        torch.save(state, paths.torch_file)
    if "tensorizer" in layouts and not paths.tensorizer_file.exists():
        from safetensors.torch import load_file
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(paths.tensorizer_file))
        for shard in paths.shards:
            serializer.write_state_dict(load_file(shard))
        serializer.close()
    os.sync()
    return paths


def drop_cache(files: Sequence[Path]) -> str:
    """Make what comes cold; how it was done."""
    try:
        DROP_CACHES.write_text("1")
        return "the page cache was dropped"
    except OSError:
        for file in files:
            drop_from_memory(file)
        return "the files were dropped from the page cache (fadvise)"


def run_child(name: str, paths: Paths, *, check: bool, before: Callable[[], None]) -> dict[str, Any]:
    """One load in a fresh process; `before` is called when it is ready to begin."""
    arguments = [str(p) for p in (paths.source, paths.packed, paths.torch_file, paths.tensorizer_file)]
    environment = os.environ | LOADERS[name].environment | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "loaders.bench_child", name, *arguments, "check" if check else "no"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            line = child.stdout.readline()
            while line and line.strip() != "ready":
                line = child.stdout.readline()
            if line:
                before()
            output, errors = child.communicate("go\n", timeout=CHILD_SECONDS)
        except BaseException:
            child.kill()
            raise
        if child.returncode != 0:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"the loader {name!r} failed: {last}")
        answer: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return answer


def expected_digests(paths: Paths) -> dict[str, str]:
    from safetensors.torch import load_file

    from loaders.bench_child import digests

    found: dict[str, str] = {}
    for shard in paths.shards:
        found |= digests(load_file(shard))
    return found


def bench_load(
    folder: Path,
    tensor_bytes: int,
    *,
    loaders: Sequence[str] = (),
    runs: int = 5,
    warm_too: bool = True,
    tell: Callable[[str], None] = lambda sentence: None,
) -> LoadBench:
    """All `loaders` (by default those that are installed) in turn, `runs` times cold and, if wanted, as often warm."""
    chosen = [name for name in loaders or LOADERS if installed(LOADERS[name])]
    folder.mkdir(parents=True, exist_ok=True)
    paths = prepare_paths(folder, tensor_bytes, chosen, tell)
    probe = DiskProbe(min(PROBE_BYTES, tensor_bytes))
    small = DiskProbe(probe.bytes, huge=False)
    small_rates = [small.measure(paths.shards) for _ in range(3)]
    del small
    expected = expected_digests(paths)
    cold: dict[str, list[Run]] = {name: [] for name in chosen}
    warm: dict[str, list[Run]] = {name: [] for name in chosen}
    versions, equal = dict.fromkeys(chosen, ""), dict.fromkeys(chosen, True)
    sizes = dict.fromkeys(chosen, 0)
    dropped = ""
    for name in chosen:  # what was never read before comes slower from the host: not counted
        read_through(needed_paths(LOADERS[name], paths))
    failed: dict[str, str] = {}

    def measure_one(name: str, number: int) -> None:
        nonlocal dropped
        files = needed_paths(LOADERS[name], paths)
        measured: list[float] = []

        def before_cold() -> None:
            nonlocal dropped
            dropped = drop_cache(files)
            measured.append(probe.measure(files))
            warm_for_load(tensor_bytes)

        answer = run_child(name, paths, check=number == 0, before=before_cold)
        measured.append(probe.measure(files))
        rate = answer["bytes"] / answer["seconds"] / 1e9
        cold[name].append(Run(rate, rate / statistics.mean(measured), *measured))
        versions[name], sizes[name] = answer["version"], answer["bytes"]
        if number == 0:
            equal[name] = all(answer["digests"].get(key) == digest for key, digest in expected.items())
        if not warm_too:
            return

        def before_warm() -> None:
            read_through(files)
            warm_for_load(tensor_bytes)

        answer = run_child(name, paths, check=False, before=before_warm)
        warm[name].append(Run(answer["bytes"] / answer["seconds"] / 1e9, 0.0))

    for number in range(runs):
        for name in chosen:
            if name in failed:
                continue
            tell(f"{tensor_bytes / 1e9:g} GB, run {number + 1} of {runs}: {name}")
            try:
                measure_one(name, number)
            except CheckpointError as error:
                if not LOADERS[name].package:  # ours has to work; what others cannot do here is told
                    raise
                failed[name] = str(error)
    chosen = [name for name in chosen if name not in failed]
    rows = (
        Row(name, versions[name], sizes[name], tuple(cold[name]), tuple(warm[name]), equal[name]) for name in chosen
    )
    probes = [rate for runs_of in cold.values() for run in runs_of for rate in (run.probe_before, run.probe_after)]
    return LoadBench(
        dropped, tuple(rows), statistics.median(probes), statistics.median(small_rates), probe.bytes, failed
    )


def warm_memory(count: int) -> None:
    """Memory that was touched just now costs nothing extra to get; memory that lay idle may be with the host."""
    MemoryPool(count)


def warm_for_load(weight_bytes: int) -> None:
    """Memory for the weights twice: most loaders have them in the page cache and in tensors of their own.

    As much as there is, where that is less.
    """
    room = memory_room()
    warm_memory(max(1, min(2 * weight_bytes, room.bytes if room is not None else weight_bytes)))


def read_through(files: Sequence[Path]) -> None:
    block = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
