"""Packing under faults: every create, write, fsync and rename fails once, by an error and by the end of the process.

Afterwards the destination holds the old checkpoint or the new one, whole, and the next packing succeeds and clears up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loaders import CheckpointError, Manifest, conversion, pack_checkpoint, storage, verify_checkpoint
from loaders.manifest import read_manifest
from loaders.source import SourceCheckpoint

OPERATIONS = ("make_directory", "create", "write", "sync", "rename", "exchange")


class Crash(BaseException):
    """The process is gone: nothing runs after it, no clearing up either."""


@pytest.fixture(autouse=True)
def quick_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads each source once: what fails here comes after it."""
    loaded: dict[Path, conversion.ModuleState] = {}
    real = conversion.load_module_state

    def load(source: SourceCheckpoint, examiner: conversion.Examiner | None = None) -> conversion.ModuleState:
        if source.directory not in loaded:
            loaded[source.directory] = real(source)
        return loaded[source.directory]

    monkeypatch.setattr(conversion, "load_module_state", load)


@contextmanager
def failing(at: int, kind: str, number: int = errno.EIO) -> Iterator[list[str]]:
    """Operation `at` of all fails; the names of those that were begun are the value."""
    begun: list[str] = []
    dead = False
    patch = pytest.MonkeyPatch()

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            nonlocal dead
            if dead:
                raise Crash
            if name in OPERATIONS:
                begun.append(name)
                if len(begun) - 1 == at:
                    dead = kind != "error"
                    if kind == "crash after":
                        real(*arguments)
                    if kind == "torn write" and name == "write":
                        descriptor, data, offset = arguments
                        real(descriptor, data[: len(data) // 2], offset)
                    raise Crash if dead else OSError(number, os.strerror(number))
            return real(*arguments)

        return operation

    for name in (*OPERATIONS, "remove"):
        patch.setattr(storage, name, wrap(name, getattr(storage, name)))
    try:
        yield begun
    finally:
        patch.undo()


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
@pytest.mark.parametrize("kind", ["error", "crash", "crash after", "torn write"])
def test_any_failure_leaves_the_old_state_or_the_new_one(
    kind: str, replaces: bool, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    destination = tmp_path / "out"
    old: Manifest | None = pack_checkpoint(sources("qwen3"), destination) if replaces else None
    with failing(-1, "error") as operations:
        new = pack_checkpoint(sources("gpt2"), tmp_path / "reference")
    assert len(operations) > 15
    points = 0
    while True:
        with failing(points, kind) as begun:
            try:
                pack_checkpoint(sources("gpt2"), destination)
                finished = True
            except (CheckpointError, Crash):
                finished = False
        if finished:
            break
        assert len(begun) >= points + 1
        if destination.exists():
            verify_checkpoint(destination)
        found = read_manifest(destination) if destination.exists() else None
        assert found in (old, new)
        if kind == "error":
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        if found == new:
            # Past the commit: back to the old state for the next point.
            if old is None:
                storage.remove(destination)
            else:
                pack_checkpoint(sources("qwen3"), destination)
        points += 1
    assert points == len(operations)
    verify_checkpoint(destination)
    assert read_manifest(destination) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "reference"]


def test_a_full_disk_is_called_so(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for point in (2, 6):
        with failing(point, "error", errno.ENOSPC), pytest.raises(CheckpointError, match="the disk is full"):
            pack_checkpoint(sources("gpt2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("loaders.destination.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"the disk is full: .* GB are needed"):
        pack_checkpoint(sources("gpt2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(
    sources: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packed: Callable[[str], tuple[Path, Manifest]],
) -> None:
    real = storage.write
    monkeypatch.setattr(storage, "write", lambda descriptor, data, offset: real(descriptor, data[:10_007], offset))
    pack_checkpoint(sources("gpt2"), tmp_path / "out", chunk_bytes=65_536)
    expected = packed("gpt2")[0] / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected.read_bytes()


def test_blocks_and_chunks_may_cross_anywhere(
    sources: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packed: Callable[[str], tuple[Path, Manifest]],
) -> None:
    # Smaller than the header, larger than it, and of no common multiple with a chunk.
    for number, block_bytes in enumerate((4096, 12_288, 1 << 20)):
        monkeypatch.setattr("loaders.packing._WRITE_BYTES", block_bytes)
        pack_checkpoint(sources("gpt2"), tmp_path / str(number), chunk_bytes=65_536)
        expected = packed("gpt2")[0] / "model.safetensors"
        assert (tmp_path / str(number) / "model.safetensors").read_bytes() == expected.read_bytes()


def test_of_two_packers_one_gets_a_clear_error(sources: Callable[[str], Path], tmp_path: Path) -> None:
    destination = tmp_path / "out"
    with storage.replacing_directory(destination) as temporary:
        with pytest.raises(CheckpointError, match="is being packed by another process"):
            pack_checkpoint(sources("gpt2"), destination)
        (temporary / "file").write_text("the first one wins")
    assert [path.name for path in destination.iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [destination]


def test_a_file_system_that_cannot_swap_leaves_the_old_state(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(first: Path, second: Path) -> None:
        raise OSError(errno.EINVAL, "no")

    old = pack_checkpoint(sources("qwen3"), tmp_path / "out")
    monkeypatch.setattr(storage, "exchange", cannot)
    with pytest.raises(CheckpointError, match="remove it first"):
        pack_checkpoint(sources("gpt2"), tmp_path / "out")
    assert read_manifest(tmp_path / "out") == old
    verify_checkpoint(tmp_path / "out")
