"""`longshore bench start --cold`: a real start of a tiny model, and how its starts take turns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packed_sample import pack_sample

from actors import bench_cold_start
from actors.bench_cold_start import TOKENS, WAYS, cold_start, measure
from actors.bench_start import MODEL
from loaders.mapping import is_tmpfs


@pytest.mark.slow
async def test_a_start_begins_on_the_ssd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_tmpfs(tmp_path):
        pytest.skip("a tmpfs has no cold start")
    monkeypatch.setattr(bench_cold_start, "SETTLE_SECONDS", 0.0)
    packed = pack_sample(tmp_path / "models", MODEL, dtype="bfloat16")
    start = await cold_start(tmp_path, "early", 1, "page-cache")
    assert len(start["tokens"]) == TOKENS and start["prompt_tokens"] >= bench_cold_start.PROMPT_WORDS
    # Whoever begins early has its first token when all was loaded, too.
    assert start["first_chunk_ms"] > start["load_ms"] > 0
    assert start["dram_tier"].startswith("page cache")
    bench_cold_start.forget(tmp_path, "page-cache")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("nats", "dram"))) == []
    assert packed.is_dir(), "the model itself stays"


async def test_the_ways_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = {"early": [100.0, 300.0, 200.0], "after the load": [900.0, 700.0, 800.0]}
    asked: list[str] = []

    async def start(folder: Path, way: str, threads: int, tier: str) -> dict[str, Any]:
        asked.append(way)
        number = asked.count(way) - 1
        tokens = [1, 2] if (way, number) != ("early", 2) else [1, 3]
        wait = {"first_chunk_ms": waits[way][number], "load_ms": 5.0, "prefill_ms": 1.0}
        return wait | {"tokens": tokens, "dram_tier": tier, "prompt_tokens": 120}

    monkeypatch.setattr(bench_cold_start, "cold_start", start)
    told: list[str] = []
    found = await measure(tmp_path, 3, 1, "page-cache", told.append)
    first, second = WAYS
    assert asked == [first, second, second, first, first, second], "a drift of the machine meets both alike"
    assert told[0] == "round 1 of 3, beginning early" and len(told) == 6
    assert {way: row["first_chunk_ms"] for way, row in found["ways"].items()} == {first: 200.0, second: 800.0}
    assert found["ways"]["early"]["first_chunk_min_ms"] == 100.0 and not found["tokens_equal"]


def test_a_tier_without_cold_is_refused() -> None:
    command = [sys.executable, "-m", "bus.main", "bench", "start", "--dram-tier", "page-cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode and "--dram-tier is for --cold" in done.stderr and "Traceback" not in done.stderr
