"""One server as processes: a worker that dies is back at once, and nobody is left behind when the node ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packed_sample import pack_sample
from tiny_control import Listener, TinyControl

from bus.jetstream import JetStreamBus
from bus.messages import (
    CancelRequested,
    DriverLost,
    Generation,
    RequestEnded,
    SequenceFinished,
    WorkerStarted,
    decode_fact,
    decode_fact_body,
    kind_of,
)
from bus.server import EmbeddedServer

_cells = itertools.count(1)
RESTART_SECONDS = 3.0
"""Far more than a restart takes (0.1 s), far less than importing torch anew on a busy machine would."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("node")
    pack_sample(directory / "models", "tiny")
    return directory


@dataclass
class Node:
    process: asyncio.subprocess.Process
    control: TinyControl
    bus: JetStreamBus
    log: Path

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    async def worker(self, count: int = 1) -> WorkerStarted:
        """The count-th start of a worker."""
        started = await self.control.wait(WorkerStarted, count)
        assert isinstance(started, WorkerStarted)
        return started


@contextlib.asynccontextmanager
async def node(server: EmbeddedServer, data: Path, log: Path, *, workers: int = 1) -> AsyncIterator[Node]:
    cell = f"node{next(_cells)}"
    bus = await JetStreamBus.connect(
        server.url, cell, create=True, tokens_limit_bytes=1 << 26, ledger_limit_bytes=1 << 26
    )
    async with TinyControl(bus, cell) as control:
        arguments = ["node", "--nats", server.url, "--cell", cell, "--server", "s1", "--data", str(data), "--log-json"]
        arguments += ["--workers", str(workers), "--memory", "500MB", "--dram", "500MB", "--context", "512"]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bus.main", *arguments, stderr=output)
        try:
            yield Node(process, control, bus, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    await bus.close()


async def ask(node: Node, name: str, *, max_tokens: int = 20) -> Listener:
    listener = await Listener(node.bus).open()
    generation = Generation(max_tokens, tokens=(5, 6, 7, 8), temperature=0.0)
    await node.control.request(name, "tiny", generation, listener.reply)
    return listener


async def gone(descriptor: int) -> None:
    """Until the process of this descriptor has ended, however it did."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(10.0):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


async def last_words(bus: JetStreamBus, driver: str) -> DriverLost:
    record = await bus.ledger.last(bus.subjects.fact(driver, kind_of(DriverLost)))
    assert record is not None
    body = decode_fact_body(decode_fact(record.payload).body)
    assert isinstance(body, DriverLost)
    return body


SECOND = "another node of this cell calls itself s1, too: stop it, or give this one another --server"


@pytest.mark.slow
async def test_a_node_answers_restarts_its_worker_and_ends_cleanly(
    nats_server: EmbeddedServer, data: Path, tmp_path: Path
) -> None:
    async with node(nats_server, data, tmp_path / "log") as here:
        first = await here.worker()
        options = ["--nats", nats_server.url, "--cell", here.bus.subjects.cell, "--data", str(tmp_path / "other")]
        code, error = await asyncio.to_thread(complaint, *options, "--server", "s1")
        assert (code, error) == (2, f"longshore: {SECOND}")
        undisturbed = [token for chunk in await (await ask(here, "r1")).all() for token in chunk.tokens]
        assert len(undisturbed) == 20
        assert len(set(undisturbed)) > 3

        long = await ask(here, "r2", max_tokens=400)
        assert await long.chunk() is not None
        await here.control.state("requests", CancelRequested("r2"))
        assert (await long.all())[-1].end == "cancelled"

        loop = asyncio.get_running_loop()
        killed_at = loop.time()
        os.kill(first.process, signal.SIGKILL)
        second = await here.worker(2)
        assert loop.time() - killed_at < RESTART_SECONDS
        assert second.process != first.process
        # Its node has said so at once: nobody had to wait for a silence.
        said = await last_words(here.bus, "gpu/s1/0")
        assert "ended with -9" in said.reason and not said.leaving

        again = [token for chunk in await (await ask(here, "r3")).all() for token in chunk.tokens]
        assert again == undisturbed
        await here.control.wait(RequestEnded, request="r3")
        assert len(here.control.find(SequenceFinished)) == 3

        left = os.pidfd_open(second.process)
        here.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10.0):
            assert await here.process.wait() == 0
        await gone(left)
        for driver in ("gpu/s1/0", "store/s1"):
            assert (await last_words(here.bus, driver)).leaving, "an orderly end is no death"
        lines = here.logged()
        assert any(line.get("driver") == "gpu/s1/0" and line.get("epoch") for line in lines)
        assert any("ended with -9" in line["event"] for line in lines)
        assert not [line for line in lines if line["level"] == "error"]


@pytest.mark.slow
async def test_workers_die_with_their_node(nats_server: EmbeddedServer, data: Path, tmp_path: Path) -> None:
    async with node(nats_server, data, tmp_path / "log", workers=2) as here:
        workers = [await here.worker(1), await here.worker(2)]
        assert sorted(worker.index for worker in workers) == [0, 1]
        os.kill(workers[0].process, signal.SIGSTOP)
        left = [os.pidfd_open(worker.process) for worker in workers]
        here.process.kill()
        await here.process.wait()
        for descriptor in left:
            await gone(descriptor)


def complaint(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of `longshore node` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "bus.main", "node", *arguments], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr.strip()


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    code, error = complaint("--nats", "nats://127.0.0.1:9", "--data", str(tmp_path))
    assert code == 1
    assert "127.0.0.1:9" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--memory", "lots"], "--memory 'lots' is no size"),
        (["--server", "a.b"], "--server 'a.b' is no name of a server"),
        (["--cell", "a b"], "--cell 'a b' is no name of a cell"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--data", "/proc/nowhere"], "the data directory /proc/nowhere cannot be used"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    code, error = complaint("--data", str(tmp_path), *arguments)
    assert code == 2
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, error = complaint("--device", "cuda", "--data", str(tmp_path))
    assert code == 2
    assert error.endswith("--device cuda: torch finds no usable CUDA device here, use --device cpu")
