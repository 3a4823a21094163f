"""The five rooms are ordinary names: whoever imports them, from wherever, must get ours and not another project's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("actors", "bus", "chaos", "loaders", "models")


def test_the_rooms_are_ours_from_anywhere(tmp_path: Path) -> None:
    program = (
        "import importlib, json, sys; "
        f"print(json.dumps({{name: importlib.import_module(name).__file__ for name in {ROOMS!r}}}))"
    )
    # -I: neither the working directory nor PYTHONPATH counts, only what is installed.
    result = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, f"run `make setup`: {result.stderr}"
    found = json.loads(result.stdout)
    assert found == {name: str(ROOT / name / "__init__.py") for name in ROOMS}


def test_the_rooms_say_that_they_are_typed() -> None:
    for name in ROOMS:
        assert (ROOT / name / "py.typed").exists()
    assert not (ROOT / "__init__.py").exists()
