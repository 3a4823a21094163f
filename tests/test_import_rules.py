"""Rooms import only what they may (the contracts in pyproject.toml), and what decides takes nothing but messages.

A deciding file that reads a clock, or knows a bus, cannot be replayed; so this is not a matter of taste.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("actors", "bus", "chaos", "loaders", "models")
DECIDING = ("requests", "placement", "migration", "store", "gpu", "cell", "replica")
MAY_IMPORT = ("bus.messages", "bus.ordering", "bus.subjects", "bus.contract")
WORLDLY = frozenset(
    {
        "asyncio",
        "concurrent",
        "ctypes",
        "datetime",
        "http",
        "io",
        "logging",
        "multiprocessing",
        "nats",
        "numpy",
        "os",
        "pathlib",
        "platform",
        "random",
        "secrets",
        "select",
        "shutil",
        "signal",
        "socket",
        "subprocess",
        "sys",
        "tempfile",
        "threading",
        "time",
        "torch",
        "transformers",
        "urllib",
        "uuid",
        "zoneinfo",
    }
)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*ROOMS, include_external_packages=True)


def deciding_modules(graph: grimp.ImportGraph) -> dict[str, str]:
    """All that the deciding files of `actors` import within `actors`, each with the file through which it came."""
    reached = {f"actors.{name}": "itself" for name in DECIDING if f"actors.{name}" in graph.modules}
    waiting = list(reached)
    while waiting:
        module = waiting.pop()
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if imported.startswith("actors.") and imported not in reached:
                reached[imported] = module
                waiting.append(imported)
    return reached


def test_rooms_import_what_they_may() -> None:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_deciding_files_take_nothing_but_messages(graph: grimp.ImportGraph) -> None:
    found = deciding_modules(graph)
    if not found:
        pytest.skip("there are no deciding files yet")
    wrong = []
    for module, through in found.items():
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if imported.split(".")[0] not in ROOMS or imported.startswith("actors."):
                continue
            if not any(imported == allowed or imported.startswith(allowed + ".") for allowed in MAY_IMPORT):
                wrong.append(f"{module} (imported by {through}) imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_deciding_files_and_messages_know_no_world(graph: grimp.ImportGraph) -> None:
    messages = [m for m in graph.modules if m == "bus.messages" or m.startswith("bus.messages.")]
    wrong = []
    for module in [*deciding_modules(graph), *sorted(messages)]:
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if imported.split(".")[0] in WORLDLY:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)
