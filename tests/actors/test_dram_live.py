"""The DRAM of a real node: what its workers map, what is left when they die, what a node that starts again finds."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from live_cell import CELL, LiveCell, live_cell
from packed_sample import pack_sample

from actors.children import Child
from bus.contract import Record
from bus.log_reading import read_to_end
from bus.messages import (
    LeaseGranted,
    LeaseReturned,
    ModelLoaded,
    StoreStarted,
    WorkerStarted,
)
from bus.sentences import read_event
from bus.subjects import Subjects
from loaders.shared_memory_tier import SharedMemoryTier, default_root

pytestmark = pytest.mark.slow


class Node:
    """A node of one worker in a live cell, and what stands in the ledger of it."""

    def __init__(self, cell: LiveCell, data: Path, *arguments: str) -> None:
        self.cell = cell
        base = [
            "node",
            "--nats",
            cell.server.url,
            "--cell",
            CELL,
            "--server",
            "s1",
            "--data",
            str(data),
            "--health",
            "",
        ]
        self.child = Child(
            "node-s1", [*base, "--health", "", "--memory", "300MB", *arguments], cell.folder / "node-s1.log"
        )
        cell.nodes.append(self.child)
        self.records: list[Record] = []

    async def start(self) -> None:
        await self.child.start()

    async def found(self, kind: type[Any], count: int = 1) -> list[Any]:
        """All messages of this kind, once there are so many."""
        async with asyncio.timeout(30):
            while True:
                messages = [one for one in await self._messages() if isinstance(one, kind)]
                if len(messages) >= count:
                    return messages
                await asyncio.sleep(0.05)

    async def answer(self) -> list[int]:
        found: list[int] = []
        async with asyncio.timeout(30):
            async for chunk in self.cell.client.infer("tiny", prompt="The harbour", max_tokens=8, temperature=0.0):
                found += chunk.tokens
        return found

    async def _messages(self) -> list[Any]:
        records = await read_to_end(self.cell.bus.ledger)
        return [read_event(Subjects(CELL), record).message for record in records]


@pytest.mark.parametrize("tier", ["page-cache", "shared-memory"])
async def test_dram_outlives_its_workers_and_its_node(tier: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    packed = pack_sample(data / "models", "tiny")
    root = default_root(data / "dram-s1")
    try:
        async with live_cell(tmp_path, nodes=0) as cell:
            node = Node(cell, data, "--dram-tier", tier)
            await node.start()
            await node.found(WorkerStarted)
            undisturbed = await node.answer()
            assert undisturbed
            worker = (await node.found(WorkerStarted))[0].process
            shown = (await cell.status())["servers"]["s1"]
            assert shown["dram_tier"].startswith(tier.replace("-", " "))
            assert shown["dram_used_bytes"] == (packed / "model.safetensors").stat().st_size
            place = packed if tier == "page-cache" else root
            assert str(place) in Path(f"/proc/{worker}/maps").read_text()

            os.kill(worker, signal.SIGKILL)
            assert (await node.found(LeaseReturned))[0].model == "tiny", "a dead worker leaves no lease"
            await node.found(WorkerStarted, 2)
            assert await node.answer() == undisturbed

            node.child.signal(signal.SIGKILL)
            await node.child.wait()
            await node.start()
            again = (await node.found(StoreStarted, 2))[1]
            assert [(held.card.model, held.tier) for held in again.models] == [("tiny", "dram")]
            assert len(await node.found(ModelLoaded)) == 1, "it was read from the SSD once"
            assert "the DRAM of node s1: " in node.child.log.read_text()
    finally:
        SharedMemoryTier.remove(root)


async def test_what_is_larger_than_dram_is_streamed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pack_sample(data / "models", "tiny")
    async with live_cell(tmp_path, nodes=0) as cell:
        node = Node(cell, data, "--dram", "1MB")
        await node.start()
        await node.found(WorkerStarted)
        assert await node.answer()
        (granted,) = await node.found(LeaseGranted)
        assert granted.streamed and granted.tier == "ssd"
        assert not [one for one in await node._messages() if isinstance(one, ModelLoaded)]
