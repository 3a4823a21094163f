"""`longshore up` keeps its processes: what is killed is started again, what gives up is named."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from actors.children import Child
from actors.up import CellProcesses, UpOptions
from bus.errors import UserError
from bus.server import EmbeddedServer
from tests.support.bus_worlds import until


async def test_what_is_killed_is_started_again(tmp_path: Path) -> None:
    cell = CellProcesses(UpOptions(data=tmp_path))
    server = cell.server = EmbeddedServer(tmp_path / "nats")
    child = Child("web", ["0"], tmp_path / "web.log", module="http.server")
    cell.controls.append(child)
    await server.start_async()
    await child.start()
    url, killed = server.url, (child.pid, server.pid)
    told: list[str] = []
    watching = asyncio.ensure_future(cell.watch(told.append))
    try:
        for process in killed:
            os.kill(process, signal.SIGKILL)
        await until(lambda: child.pid != killed[0] and server.running and server.pid != killed[1])
        assert server.url == url
        assert sorted(told) == [
            f"the NATS server at {url} has ended: starting it again",
            "web was ended by signal 9: starting it again",
        ]
    finally:
        watching.cancel()
        await cell.stop()


async def test_what_gives_up_ends_the_cell_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "zen.log"
    log.write_text("words of an earlier process\n")
    cell = CellProcesses(UpOptions(data=tmp_path))
    cell.controls.append(Child("zen", [], log, module="this"))
    await cell.controls[0].start()
    with pytest.raises(UserError, match="zen ended with code 0") as caught:
        await cell.watch(print)
    assert "do more of those!" in str(caught.value)
    assert "earlier" not in str(caught.value)


async def test_a_node_that_leaves_is_started_again(tmp_path: Path) -> None:
    cell = CellProcesses(UpOptions(data=tmp_path))
    cell.nodes.append(Child("node-s1", [], tmp_path / "node.log", module="this"))
    await cell.nodes[0].start()
    told: list[str] = []
    watching = asyncio.ensure_future(cell.watch(told.append))
    try:
        await until(lambda: len(told) >= 2)
        assert set(told) == {"node-s1 was drained or told to end, and has left: starting it again"}
    finally:
        watching.cancel()
        await cell.stop()
