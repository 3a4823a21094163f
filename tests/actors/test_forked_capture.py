"""A capture in a copy of the process is the state as it was at the call; what goes wrong there stays there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.bench_replay import CELL, make_ledger
from actors.cell import Cell
from actors.forked_capture import CaptureFailed, capture_in_a_copy

LEDGER = make_ledger(2000)


def children() -> list[str]:
    """Process ids of this process's children, ended ones that nobody waited for included."""
    return sorted(" ".join(one.read_text() for one in Path("/proc/self/task").glob("*/children")).split())


async def test_it_is_the_state_at_the_call_whatever_comes_after() -> None:
    before = children()
    cell, half = Cell(CELL), Cell(CELL)
    for record in LEDGER[:1000]:
        cell.take(record)
        half.take(record)
    capturing = asyncio.ensure_future(capture_in_a_copy(cell))
    await asyncio.sleep(0)
    for record in LEDGER[1000:]:
        cell.take(record)
    assert b"".join(await capturing) == half.snapshot() != cell.snapshot()
    assert children() == before


async def test_a_copy_that_fails_is_told_and_leaves_nothing() -> None:
    before = children()

    class Broken(Cell):
        def capture(self) -> list[bytes]:
            raise RuntimeError("planted")

    class Slow(Cell):
        def capture(self) -> list[bytes]:
            while True:
                pass

    with pytest.raises(CaptureFailed, match="code 1"):
        await capture_in_a_copy(Broken(CELL))
    capturing = asyncio.ensure_future(capture_in_a_copy(Slow(CELL)))
    await asyncio.sleep(0.05)
    capturing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await capturing
    assert children() == before
