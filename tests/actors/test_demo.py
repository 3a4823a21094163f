"""The main job, as a newcomer runs it: `longshore demo --json` from a fresh folder, real models, a real SIGKILL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_loses_nothing_and_its_recording_verifies(tmp_path: Path) -> None:
    recording = tmp_path / "demo.lsrec"
    command = [sys.executable, "-m", "bus.main", "demo", "--json", "--record", str(recording)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["requests"] == found["finished"] == 30
    assert found["positions_lost"] == found["positions_repeated"] == 0
    assert found["answers_on_killed_worker"] >= 1 and found["answers_moved"] >= 1
    assert found["starts_by_tier"]["ssd"] >= 1 and sum(found["starts_by_tier"].values()) == 30
    assert found["ttft_ms"]["p50"] > 0
    assert found["decisions_verified"] > 200 and found["divergences"] == 0
    replay = [sys.executable, "-m", "bus.main", "replay", str(recording), "--verify", "--json"]
    verdict = json.loads(subprocess.run(replay, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert verdict["verified"] == found["decisions_verified"] and verdict["difference"] is None
    assert list(tmp_path.iterdir()) == [recording], "nothing is left behind"
