"""A real gateway in front of a live cell, as a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from actors.children import Child
from bus.server import EmbeddedServer


@asynccontextmanager
async def live_gateway(
    server: EmbeddedServer, cell: str, folder: Path, *arguments: str, name: str = "gateway"
) -> AsyncIterator[tuple[str, Child]]:
    """Its address, once it listens, and its process."""
    log = folder / f"{name}.log"
    base = ["gateway", "--nats", server.url, "--cell", cell, "--port", "0"]
    child = Child(name, [*base, *arguments], log)
    await child.start()
    try:
        yield await _address(child, log), child
    except BaseException:
        print(f"== {name}\n{child.last_words(40)}")
        raise
    finally:
        await child.stop()


async def _address(child: Child, log: Path) -> str:
    async with asyncio.timeout(20):
        while True:
            assert child.process is not None
            if child.process.returncode is not None:
                raise AssertionError(f"the gateway ended: {child.last_words(20)}")
            for line in log.read_text().splitlines():
                if line.startswith("listening on "):
                    return line.split()[-1]
            await asyncio.sleep(0.02)
