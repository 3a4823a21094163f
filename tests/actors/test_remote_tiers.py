"""Real processes: a model that lies at an address only is fetched, served, passed on, and never left half-written."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from range_server import Handler, range_server

from actors.children import Child
from actors.up import cell_status
from actors.warm_cli import warm
from bus.client import Client
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import Message, ModelLoaded, decode_fact, decode_fact_body
from bus.options import Failure
from bus.server import EmbeddedServer
from bus.subjects import FactSubject
from loaders import pack_checkpoint, verify_checkpoint
from loaders.packed import read_packed_header
from models.sample import make_sample

pytestmark = pytest.mark.slow

_cells = itertools.count(1)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packed model `tiny`, of many small chunks, which no server has."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_sample(folder / "source", arch="llama", parameters=1_500_000, seed=1, dtype="float32", context=512)
    pack_checkpoint(folder / "source", folder / "tiny", chunk_bytes=1 << 18)
    return folder


class RemoteCell:
    def __init__(self, server: EmbeddedServer, cell: str, bus: JetStreamBus, folder: Path) -> None:
        self.server, self.cell, self.bus, self.folder = server, cell, bus, folder
        self.children: list[Child] = []

    async def start(self, name: str, *arguments: str) -> Child:
        common = ["--nats", self.server.url, "--cell", self.cell]
        child = Child(name, [arguments[0], *common, *arguments[1:]], self.folder / f"{name}.log")
        self.children.append(child)
        await child.start()
        return child

    async def node(self, name: str) -> Child:
        sizes = ["--memory", "500MB", "--dram", "500MB", "--ssd", "1GB", "--context", "256"]
        data = ["--server", name, "--data", str(self.folder / name), "--serve-models", "127.0.0.1:0"]
        return await self.start(f"node-{name}", "node", *data, *sizes)

    async def stub_node(self, name: str) -> Child:
        """Its storage is real, its engines are not: it is up at once."""
        arguments = ["--nats", self.server.url, "--cell", self.cell, "--server", name]
        arguments += ["--directory", str(self.models(name))]
        child = Child(f"node-{name}", arguments, self.folder / f"node-{name}.log", module="actors.stub_node")
        self.children.append(child)
        await child.start()
        return child

    def models(self, name: str) -> Path:
        return self.folder / name / "models"

    async def command(self, *arguments: str) -> str:
        common = ["--nats", self.server.url, "--cell", self.cell]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bus.main", *arguments, *common, stdout=-1, stderr=-1
        )
        out, error = await process.communicate()
        assert process.returncode == 0, error.decode()
        return out.decode()

    async def warm(self, capsys: pytest.CaptureFixture[str], model: str, server: str = "") -> dict[str, Any]:
        """What the command says, as an object."""
        capsys.readouterr()
        await warm(model, server=server, wait=True, nats=self.server.url, cell=self.cell, json=True)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    async def until(self, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(40):
            while True:
                found = await cell_status(self.bus, self.cell)
                if found is not None and reached(found):
                    return found
                await asyncio.sleep(0.05)

    async def facts(self, kind: type[Message]) -> list[Any]:
        """Every fact of this kind that stands in the ledger now."""
        reader = await self.bus.ledger.read()
        last, found = (await self.bus.ledger.usage()).last_sequence, []
        try:
            while True:
                for record in await reader.batch():
                    if isinstance(self.bus.subjects.parse(record.subject), FactSubject):
                        message = decode_fact_body(decode_fact(record.payload).body)
                        found += [message] if isinstance(message, kind) else []
                    if record.sequence >= last:
                        return found
        finally:
            await reader.close()


@asynccontextmanager
async def remote_cell(server: EmbeddedServer, folder: Path) -> AsyncIterator[RemoteCell]:
    name = f"remote{next(_cells)}"
    bus = await JetStreamBus.connect(server.url, name, create=True, ledger_limit_bytes=1 << 26)
    cell = RemoteCell(server, name, bus, folder)
    try:
        await cell.start("control", "control")
        yield cell
    except BaseException:
        for child in cell.children:
            print(f"== {child.name}\n{child.last_words(40)}")
        raise
    finally:
        for child in cell.children:
            await child.stop()
        await bus.close()


async def answer(cell: RemoteCell) -> str:
    reading = Client(cell.bus, cell.cell).infer("tiny", "once upon", max_tokens=4, temperature=0.0)
    return "".join([chunk.text async for chunk in reading])


def tiers(status: dict[str, Any]) -> dict[str, str]:
    return {name: server["models"].get("tiny", "") for name, server in status["servers"].items()}


async def test_a_model_at_an_address_is_served_and_passed_on(
    nats_server: EmbeddedServer, origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with remote_cell(nats_server, tmp_path) as cell:
        for name in ("a", "b"):
            await cell.node(name)
        await cell.until(lambda found: len(found["workers"]) == 2)
        with range_server(origin) as elsewhere:
            said = json.loads(await cell.command("model", "add", "tiny", "--from", f"{elsewhere.url}/tiny", "--json"))
            assert said["served"]
            await cell.until(lambda found: tiers(found) == {"a": "remote", "b": "remote"})
            assert not any((cell.models(name) / "tiny").exists() for name in ("a", "b"))
            warmed = await cell.warm(capsys, "tiny")
            assert warmed["in_dram"] and not warmed["reason"]
        first, second = sorted(("a", "b"), key=lambda name: name != warmed["server"])
        await cell.until(lambda found: tiers(found) == {first: "dram", second: "remote"})
        text = await answer(cell)
        verify_checkpoint(cell.models(first) / "tiny")
        await cell.command("drain", first, "--stay")
        assert await answer(cell) == text, "the source is away: only the other server can have given it"
        verify_checkpoint(cell.models(second) / "tiny")
        assert [load.tier for load in await cell.facts(ModelLoaded)] == ["remote", "remote"]
        assert (await cell.warm(capsys, "tiny", second))["in_dram"], "it is there already"
        for model, server, reason in (("other", "", "no model 'other'"), ("tiny", "c", "no server 'c'")):
            with pytest.raises(UserError, match=reason):
                await cell.warm(capsys, model, server)
        with pytest.raises(Failure, match=f"server {first} is being drained"):
            await warm("tiny", server=first, nats=cell.server.url, cell=cell.cell)
        shown = json.loads(await cell.command("model", "list", "--json"))
        assert shown[0]["servers"] == {first: "dram", second: "dram"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_node_that_ends_in_the_middle_leaves_nothing_half_and_goes_on_with_it(
    nats_server: EmbeddedServer, origin: Path, tmp_path: Path, number: signal.Signals
) -> None:
    half, over = threading.Event(), threading.Event()
    pieces = itertools.count()

    def hang(handler: Handler, name: str, number: int) -> bool:
        if not name.endswith(WEIGHTS) or next(pieces) < 10 or over.is_set():
            return False
        half.set()
        over.wait(30)
        handler.close_connection = True
        return True

    async with remote_cell(nats_server, tmp_path) as cell:
        node = await cell.stub_node("a")
        await cell.until(lambda found: len(found["workers"]) == 1)
        with range_server(origin, hang) as elsewhere:
            await Client(cell.bus, cell.cell).add_model("tiny", f"{elsewhere.url}/tiny")
            await cell.until(lambda found: tiers(found) == {"a": "remote"})
            asked = asyncio.ensure_future(answer(cell))
            assert await asyncio.to_thread(half.wait, 20)
            assert node.process is not None
            os.kill(node.pid, number)
            await node.process.wait()
            assert [path.name for path in cell.models("a").iterdir() if not path.name.startswith(".")] == []
            over.set()
            came = len(elsewhere.seen)
            await node.start()
            assert await asked
            fetched = [span for name, span in elsewhere.seen[came:] if name.endswith(WEIGHTS)]
        chunks = len(read_packed_header(origin / "tiny" / WEIGHTS).checksums)
        assert chunks // 3 < len(fetched) < 3 + chunks, "what had come was not asked for again"
        assert sorted(path.name for path in cell.models("a").iterdir()) == ["tiny"]
        verify_checkpoint(cell.models("a") / "tiny")
