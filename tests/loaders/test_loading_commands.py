"""`longshore load`, `fetch`, `doctor memory` and `bench load`, as a person and as a program meet them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loaders import Manifest

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
    chosen = ["longshore, pool"]
    done = longshore(*arguments, *(word for name in chosen for word in ("--loader", name)))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["0.05 GB"]["load"]["rows"]
    assert [row["loader"] for row in rows] == chosen
    assert all(row["equal"] and row["cold"][0]["share"] > 0 for row in rows)
