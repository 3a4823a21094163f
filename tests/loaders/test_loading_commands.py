"""`longshore load`, `fetch`, `doctor memory` and `bench load`, as a person and as a program meet them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders import Manifest, bench_cli
from loaders.bench_load import LoadBench, Row, Run
from loaders.bench_summary import Figure, summarise

Packed = Callable[[str], tuple[Path, Manifest]]


def longshore(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bus.main", *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def test_load_says_how_long_each_stage_took(packed: Packed) -> None:
    directory, manifest = packed("llama")
    shown = longshore("load", str(directory))
    assert shown.returncode == 0 and "the limit was: " in shown.stdout
    report = json.loads(longshore("load", str(directory), "--json").stdout)
    assert report["bytes"] <= manifest.bytes and report["verified"] and set(report["stages"]) == {"read", "checksum"}


def test_fetch_gives_a_directory_that_verifies(packed: Packed, tmp_path: Path) -> None:
    directory, _ = packed("llama")
    report = json.loads(longshore("fetch", str(directory), str(tmp_path / "copy"), "--json").stdout)
    assert report["limit"] in report["stages"]
    assert longshore("verify", str(tmp_path / "copy")).returncode == 0
    refused = longshore("fetch", "ftp://x/y", str(tmp_path / "other"))
    assert refused.returncode == 1 and "no place to load from" in refused.stderr and "Traceback" not in refused.stderr


def test_doctor_memory_names_the_best_kind_of_memory(tmp_path: Path) -> None:
    report = json.loads(longshore("doctor", "memory", "--data", str(tmp_path), "--json").stdout)
    assert report["best"] in {finding["kind"] for finding in report["findings"]}
    assert all(
        finding["huge_pages"] or finding.get("advice") or finding["kind"].startswith("reserved")
        for finding in report["findings"]
    )
    assert not list(tmp_path.iterdir())
    missing = longshore("doctor", "memory", "--data", str(tmp_path / "none"))
    assert missing.returncode == 1 and "cannot be tried" in missing.stderr


def test_bench_load_measures_and_compares(tmp_path: Path) -> None:
    arguments = ["bench", "load", "--folder", str(tmp_path), "--size", "0.05", "--runs", "1", "--json"]
    arguments += ["--part", "load", "--part", "together"]
    chosen = ["longshore, pool"]
    done = longshore(*arguments, *(word for name in chosen for word in ("--loader", name)))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["machine"]["kernel"] and told["machine"]["versions"]["torch"]
    share = next(one for one in told["0.05 GB"]["figures"] if one["what"] == "longshore, pool, share of the disk")
    assert share["reach"] == 0.95 and isinstance(share["reached"], bool) and not told["0.05 GB"]["load"]["failed"]
    assert "dropped" in told["0.05 GB"]["load"]["dropped"]
    assert "two loads at once, run 1 of 1" in done.stderr, "long work shows progress"
    rows = told["0.05 GB"]["load"]["rows"]
    assert [row["loader"] for row in rows] == chosen
    assert all(row["equal"] and row["cold"][0]["share"] > 0 for row in rows)


def test_bench_load_says_what_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(2.0, 0.96, 2.1, 2.1)
    rows = [Row("longshore, pool", "", 1, (run,), (), True), Row("tensorizer", "2", 1, (Run(1.0, 0.5),), (), False)]
    bench = LoadBench("the page cache was dropped", tuple(rows), 2.1, 1.5, 1, {"torch.load": "it failed"})
    figures = summarise({"load": bench})
    bench_cli._show("2 GB", {"load": bench, "http": None, "figures": figures}, ablation=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "share of the disk: 0.960 (at least 0.95: reached)" in shown
    assert "the others here (tensorizer): 1.92 (at least 1.1: reached)" in shown
    assert "torch.load: it failed; left out" in shown and "touched and freed" in shown and "nginx" in shown


def test_figures_know_their_bounds() -> None:
    assert Figure("rate", 0.9, 0.9).reached and not Figure("rate", 0.89, 0.9).reached
    assert Figure("time", 60, 60, at_most=True).reached and not Figure("time", 61, 60, at_most=True).reached
    assert Figure("told", 5).reached
    assert str(Figure("time", 61.2, 60, at_most=True, unit="ms")) == "time: 61 ms (at most 60 ms: NOT REACHED)"
