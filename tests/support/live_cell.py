"""A real cell of real processes for tests: nats-server, controls, nodes with stub engines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actors.children import Child
from actors.up import cell_status
from bus.client import Client
from bus.jetstream import JetStreamBus
from bus.server import EmbeddedServer

CELL = "live"


class LiveCell:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = EmbeddedServer(folder / "nats")
        self.controls: list[Child] = []
        self.nodes: list[Child] = []
        self.bus: JetStreamBus

    @property
    def client(self) -> Client:
        return Client(self.bus, CELL, name="test")

    async def add_control(self, *arguments: str) -> Child:
        number = len(self.controls) + 1
        base = ["control", "--nats", self.server.url, "--cell", CELL]
        child = Child(f"control-{number}", [*base, *arguments], self.folder / f"control-{number}.log")
        self.controls.append(child)
        await child.start()
        return child

    async def add_node(
        self,
        server: str,
        *,
        workers: int = 1,
        step_seconds: float = 0.0,
        slots: int = 64,
        models: int = 1,
        memory_mib: int = 100,
        nats: str = "",
        load_seconds: float = 0.0,
        full: bool = False,
    ) -> Child:
        base = ["--nats", nats or self.server.url, "--cell", CELL, "--server", server, "--workers", str(workers)]
        arguments = [*base, "--step-seconds", str(step_seconds), "--slots", str(slots), "--models", str(models)]
        arguments += ["--memory-mib", str(memory_mib), "--load-seconds", str(load_seconds)]
        arguments += ["--full"] if full else []
        child = Child(f"node-{server}", arguments, self.folder / f"node-{server}.log", module="actors.stub_node")
        self.nodes.append(child)
        await child.start()
        return child

    async def told(self, *arguments: str) -> Any:
        """What a command of ours says with `--json`; it has to succeed."""
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "bus.main", *arguments, "--nats", self.server.url, "--cell", CELL, "--json"],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await process.communicate()
        assert process.returncode == 0, error
        return json.loads(out)

    async def status(self) -> dict[str, Any]:
        return await self.until(lambda found: True)

    async def until(self, reached: Callable[[dict[str, Any]], bool], *, seconds: float = 30.0) -> dict[str, Any]:
        """Wait until the cell's status is as wanted."""
        async with asyncio.timeout(seconds):
            while True:
                found = await cell_status(self.bus, CELL)
                if found is not None and reached(found):
                    return found
                await asyncio.sleep(0.02)

    def logs(self) -> str:
        return "\n".join(f"== {child.name}\n{child.last_words(40)}" for child in (*self.controls, *self.nodes))


@asynccontextmanager
async def live_cell(
    folder: Path,
    *,
    controls: int = 1,
    nodes: int = 1,
    workers: int = 1,
    models: int = 1,
    step_seconds: float = 0.0,
    slots: int = 64,
    control: tuple[str, ...] = (),
    ledger_limit_bytes: int = 1 << 30,
    create: bool = True,
) -> AsyncIterator[LiveCell]:
    """Up, with every worker known, when the block begins; nothing of it is left when it ends.

    `create` false: without streams, which are for the test to make.
    """
    cell = LiveCell(folder)
    await cell.server.start_async()
    cell.bus = await JetStreamBus.connect(
        cell.server.url, CELL, name="test", create=create, ledger_limit_bytes=ledger_limit_bytes
    )
    try:
        for _ in range(controls):
            await cell.add_control(*control)
        for number in range(nodes):
            await cell.add_node(f"n{number}", workers=workers, step_seconds=step_seconds, slots=slots, models=models)
        if nodes:
            await cell.until(lambda found: len(found["workers"]) == nodes * workers and len(found["models"]) == models)
        yield cell
    except BaseException:
        print(cell.logs())
        raise
    finally:
        await cell.bus.close()
        for child in (*cell.nodes, *cell.controls):
            await child.stop()
        await asyncio.to_thread(cell.server.stop)
