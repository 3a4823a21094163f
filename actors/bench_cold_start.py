"""`longshore bench start --cold`: a model that lies on the SSD alone, an idle worker, and a request for it.

What a worker gains by beginning with a model while the store brings it. Real processes: each start is a new cell of one
node with one worker that has seen nothing; before the request the packed files are dropped from the page cache. The way
that begins early and the way that begins when all is in DRAM take turns in one run, and who is first changes, so that
a drift of the machine meets both alike. A first start counts for neither.

The page cache of a virtual machine's host is not dropped: the files were written just before, and lie there for both.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.bench_start import CELL, MODEL, SETTLE_SECONDS, WORDS_SECONDS, make_model
from actors.up import CellProcesses, UpOptions
from bus.client import Client
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import ModelLoaded, SequenceFinished
from bus.sentences import read_event
from bus.subjects import Subjects, escape_model
from loaders.bench_load import warm_memory
from loaders.mapping import cached_bytes, drop_from_memory
from loaders.packed import WEIGHTS_NAME
from loaders.shared_memory_tier import SharedMemoryTier, default_root

WAYS = {"early": "--start-early", "after the load": "--no-start-early"}
SERVER = "s1"
PROMPT_WORDS = 120
TOKENS = 4
WARM_SHARE = 0.05
"""More than this share of the weights in the page cache is no cold start; headers may be there."""

_WORDS = ("harbour", "quiet", "ship", "moon", "water", "stone")


async def bench_cold_start(
    parameters: int, rounds: int, threads: int, tier: str, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """One size. Makes the model under `folder`, which takes its bytes twice for a while; `tier` as `node` takes it."""
    packed = await make_model(folder, parameters, say)
    try:
        say("a first start, which does not count")
        await cold_start(folder, "early", threads, tier)
        return await measure(folder, rounds, threads, tier, say) | {
            "parameters": parameters,
            "bytes": (packed / WEIGHTS_NAME).stat().st_size,
        }
    finally:
        forget(folder, tier)


async def measure(folder: Path, rounds: int, threads: int, tier: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Both ways in turn, with the packed model that lies in `folder`."""
    starts: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS)[:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {rounds}, beginning {way}")
            starts[way].append(await cold_start(folder, way, threads, tier))
    every = [one for ones in starts.values() for one in ones]
    return {
        "rounds": rounds,
        "threads": threads,
        "dram_tier": every[0]["dram_tier"],
        "prompt_tokens": every[0]["prompt_tokens"],
        "ways": {way: summary(ones) for way, ones in starts.items()},
        "tokens_equal": all(one["tokens"] == every[0]["tokens"] for one in every),
        "starts": starts,
    }


def summary(starts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds: medians, and the range of what the caller waited."""
    waits = [one["first_chunk_ms"] for one in starts]
    names = ("first_chunk_ms", "load_ms", "prefill_ms")
    medians = {name: round(statistics.median(one[name] for one in starts), 1) for name in names}
    return medians | {"first_chunk_min_ms": min(waits), "first_chunk_max_ms": max(waits)}


async def cold_start(folder: Path, way: str, threads: int, tier: str) -> dict[str, Any]:
    """One start in a cell of its own. Raises `UserError` where it would not have been a cold one."""
    forget(folder, tier)
    weights = _packed(folder) / WEIGHTS_NAME
    weight_bytes = weights.stat().st_size
    size = str(weight_bytes + weight_bytes // 4 + (1 << 30))
    of_node = (WAYS[way], *(("--threads", str(threads)) if threads else ()))
    options = UpOptions(
        data=folder, cell=CELL, nodes=1, workers=1, memory=size, dram=size, dram_tier=tier, node_arguments=of_node
    )
    async with CellProcesses(options) as cell:
        bus = await JetStreamBus.connect(cell.url, CELL, name="longshore-bench", create=True)
        try:
            kind = (await cell.ready(bus))["servers"][SERVER]["dram_tier"]
            await asyncio.sleep(SETTLE_SECONDS)
            # Memory that lay idle is slow to get: as for every load that is measured, it is touched first.
            await asyncio.to_thread(warm_memory, weight_bytes)
            _drop(_packed(folder))
            if cached_bytes(weights) > WARM_SHARE * weight_bytes:
                raise UserError(
                    f"{weights} stays in the page cache: there is no cold start in a tmpfs, nor of a file that another "
                    "process has mapped; name another directory with --folder"
                )
            last = (await bus.ledger.usage()).last_sequence
            waited, tokens = await _ask(bus)
            load, finish = await _said(bus, last)
        finally:
            await bus.close()
    return {
        "first_chunk_ms": round(waited, 1),
        "load_ms": round(load.duration_ns / 1e6, 1),
        "prefill_ms": round(finish.prefill_ns / 1e6, 1),
        "prompt_tokens": finish.prompt_tokens,
        "tokens": tokens,
        "dram_tier": kind,
    }


async def _ask(bus: JetStreamBus) -> tuple[float, list[int]]:
    """Milliseconds from publishing the request to its first chunk, and all tokens of the answer."""
    client = Client(bus, CELL, name="longshore-bench")
    prompt = " ".join(_WORDS[number % len(_WORDS)] for number in range(PROMPT_WORDS))
    first = 0.0
    tokens: list[int] = []
    began = time.perf_counter()
    async for chunk in client.infer(MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0.0, timeout=WORDS_SECONDS):
        first = first or (time.perf_counter() - began) * 1000
        tokens += chunk.tokens
    return first, tokens


async def _said(bus: JetStreamBus, after: int) -> tuple[ModelLoaded, SequenceFinished]:
    """What the ledger has of the load and of the end of the answer. Raises `UserError` where there was no load."""
    load: ModelLoaded | None = None
    reader = await bus.ledger.read(start=after + 1)
    try:
        async with asyncio.timeout(WORDS_SECONDS):
            while True:
                for record in await reader.batch():
                    message = read_event(Subjects(CELL), record).message
                    if isinstance(message, ModelLoaded):
                        load = message
                    if isinstance(message, SequenceFinished):
                        if load is None:
                            raise UserError("the model was in DRAM before it was asked for: this was no cold start")
                        return load, message
    finally:
        await reader.close()


def forget(folder: Path, tier: str) -> None:
    """Nothing of the last cell in `folder` is left but its packed models, on the SSD alone."""
    state = folder / f"dram-{SERVER}"
    root = default_root(state)
    SharedMemoryTier.remove(Path(tier) / root.name if tier.startswith("/") else root)
    for left in (state, folder / "nats", folder / "generations"):
        shutil.rmtree(left, ignore_errors=True)
    _drop(_packed(folder))


def _packed(folder: Path) -> Path:
    return folder / "models" / escape_model(MODEL)


def _drop(directory: Path) -> None:
    for file in directory.iterdir():
        drop_from_memory(file)
