"""Same facts, same messages: across processes with other hash seeds; and what the deciding files may not use."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECIDING = [
    "actors/actor.py", "actors/cell.py", "actors/gpu.py", "actors/gpu_state.py", "actors/placement.py",
    "actors/dead_letters.py", "actors/learning.py", "actors/migration.py",
    "actors/placement_books.py", "actors/placement_drain.py", "actors/placement_warming.py",
    "actors/placement_exchange.py", "actors/placement_exchanges.py",
    "actors/placement_moves.py", "actors/placement_pump.py", "actors/placement_spread.py",
    "actors/resume_times.py",
    "actors/placement_start.py",
    "actors/placement_state.py", "actors/request_moves.py",
    "actors/request_state.py", "actors/requests.py", "actors/rules.py", "actors/store.py",
    "actors/placement_sources.py", "actors/store_room.py", "actors/store_state.py",
    "bus/ordering.py",
]  # fmt: skip
ALLOWED = {
    "__future__", "typing", "collections", "hashlib", "msgspec", "bus.messages", "bus.contract", "bus.ordering",
    "bus.subjects", "actors.actor", "actors.gpu", "actors.gpu_state", "actors.placement",
    "actors.dead_letters", "actors.learning", "actors.migration",
    "actors.placement_books", "actors.placement_drain", "actors.placement_warming",
    "actors.placement_exchange", "actors.placement_exchanges",
    "actors.placement_moves", "actors.placement_pump", "actors.placement_spread",
    "actors.resume_times",
    "actors.placement_start",
    "actors.placement_state", "actors.request_moves",
    "actors.request_state", "actors.requests", "actors.rules", "actors.store",
    "actors.placement_sources", "actors.store_room", "actors.store_state",
}  # fmt: skip
FORBIDDEN_CALLS = {"hash", "id", "set", "frozenset", "open", "print", "input", "vars", "repr", "eval", "exec", "float"}

WORLD = """
import hashlib, random, sys
sys.path[:0] = [{root!r}, {here!r}]
from actors.rules import KNOWN_RULES
from world import World
from bus.messages import encode
digest, versions = hashlib.sha256(), {{1: 0}}
for seed in range(16):
    world = World(random.Random(seed).randbytes(1500))
    put = world.cell.take
    def take(record):
        steps = put(record)
        versions[world.cell.rules] = versions.get(world.cell.rules, 0) + len(steps)
        for step in steps:
            for one in step.said:
                digest.update(one.subject.encode() + one.payload)
        return steps
    world.cell.take = take
    world.chaos()
    world.heal()
    digest.update(world.cell.digest().encode())
assert sorted(versions) == list(KNOWN_RULES) and min(versions.values()) > 50, versions
print(digest.hexdigest())
"""


def test_the_same_facts_give_the_same_messages_under_any_hash_seed() -> None:
    code = WORLD.format(root=str(ROOT), here=str(Path(__file__).parent))
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1", "2")
    ]
    answers = [run.communicate(timeout=60) for run in runs]
    assert all(run.returncode == 0 for run in runs), answers
    assert len({out for out, _ in answers}) == 1


@pytest.mark.parametrize("path", DECIDING)
def test_deciding_files_use_nothing_that_differs_between_replicas(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert all(alias.name in ALLOWED for alias in node.names), where
        elif isinstance(node, ast.ImportFrom):
            assert node.module in ALLOWED, where
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            # A frozen set at the head of a file is asked whether it contains, and never walked.
            assert name not in FORBIDDEN_CALLS or (name == "frozenset" and node.col_offset), where
            assert name != "frozenset" or _only_asked(tree, node), where
        elif isinstance(node, (ast.Set, ast.SetComp, ast.Global, ast.Nonlocal, ast.AsyncFunctionDef)):
            assert isinstance(node, ast.Set) and _inside_frozenset(tree, node), where
        elif isinstance(node, ast.Constant):
            assert not isinstance(node.value, float), f"{where}: integers"
        elif isinstance(node, ast.Div):
            raise AssertionError(f"{where}: integers are divided by //")


def _inside_frozenset(tree: ast.AST, wanted: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "frozenset"
        and any(inner is wanted for inner in ast.walk(node))
        for node in ast.walk(tree)
    )  # fmt: skip


def _only_asked(tree: ast.Module, call: ast.Call) -> bool:
    """The frozen set is a constant of the module that is used on the right of `in` (or sorted) alone."""
    names = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and node.value is call
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    if len(names) != 1:
        return False
    asked = [
        other
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn))
        for other in node.comparators
    ]
    asked += [
        argument
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sorted"
        for argument in node.args
    ]
    uses = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == names[0] and isinstance(node.ctx, ast.Load)
    ]
    return all(any(use is one for one in asked) for use in uses)
