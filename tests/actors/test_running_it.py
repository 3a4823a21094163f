"""One file runs control, node and gateway; they say when they can serve; one id runs through all their logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from packed_sample import pack_sample

from actors.children import Child
from bus.client import Client
from bus.credentials import ConnectionOptions
from bus.jetstream import JetStreamBus
from bus.server import EmbeddedServer

PASSWORD = "hush-4711"
PROMPT = "The quick brown harbour pilot"

CONFIGURATION = """
cell: ops
nats:
  url: {url}
  user: ops
  password: {password}
log:
  json: true
control:
  health: 127.0.0.1:{control}
  queue_limit: 77
node:
  server: s1
  data: {data}
  memory: 500MB
  dram: 500MB
  context: 512
  health: 127.0.0.1:{node}
gateway:
  port: {gateway}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def listening(path: Path) -> socket.socket:
    """What systemd would have there."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    found.bind(str(path))
    found.setblocking(False)
    return found


def get(url: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any], dict[str, str]]:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)
    except OSError:
        return 0, {}, {}


async def until(port: int, path: str, status: int) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            found = await asyncio.to_thread(get, f"http://127.0.0.1:{port}{path}")
            if found[0] == status:
                return found[1]
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def processes(folder: Path, file: Path) -> AsyncIterator[dict[str, Child]]:
    names = ("control", "node", "gateway")
    children = {
        name: Child(
            name,
            [name, "--config", str(file)],
            folder / f"{name}.log",
            environment={"NOTIFY_SOCKET": str(folder / f"{name}.notify"), "WATCHDOG_USEC": "4000000"},
        )
        for name in names
    }
    try:
        for child in children.values():
            await child.start()
        yield children
    except BaseException:
        for child in children.values():
            print(f"== {child.name}\n{child.last_words(40)}")
        raise
    finally:
        for child in children.values():
            child.signal(signal.SIGCONT)
            await child.stop()


@pytest.mark.slow
async def test_one_file_health_and_one_id_through_all_logs(tmp_path: Path) -> None:
    await asyncio.to_thread(pack_sample, tmp_path / "data" / "models", "tiny")
    ports = {name: free_port() for name in ("control", "node", "gateway")}
    login = f"authorization {{ user: ops, password: {PASSWORD} }}"
    server = EmbeddedServer(tmp_path / "nats", extra=login)
    await server.start_async()
    file = tmp_path / "longshore.yaml"
    values = {"url": server.url, "password": PASSWORD, "data": tmp_path / "data"} | ports
    file.write_text(CONFIGURATION.format(**values))
    login_of_test = ConnectionOptions(server.url, user="ops", password=PASSWORD)
    notified = {name: listening(tmp_path / f"{name}.notify") for name in ports}
    said: dict[str, list[str]] = {name: [] for name in ports}
    for name, socket_ in notified.items():  # read at once, as systemd does: the kernel keeps ten of them
        asyncio.get_running_loop().add_reader(
            socket_, lambda socket_=socket_, to=said[name]: to.append(socket_.recv(1000).decode())
        )
    bus = await JetStreamBus.connect(login_of_test, "ops", create=True)
    try:
        async with processes(tmp_path, file) as children:
            early = await until(ports["node"], "/readyz", 503)
            # Whether the control has found out yet that nobody is there is a matter of milliseconds.
            early_words = ("it is starting", "no worker is known to the cell")
            assert any(words in str(early["reasons"]) for words in early_words), early
            assert (await until(ports["node"], "/livez", 200))["process"] == "node s1"
            for name in ("control", "node"):
                assert (await until(ports[name], "/readyz", 200))["reasons"] == []
            await until(ports["gateway"], "/health", 200)

            client = Client(bus, "ops", name="test")
            await client.add_model("tiny")
            async with asyncio.timeout(10):
                while not await client.models():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            url = f"http://127.0.0.1:{ports['gateway']}/v1/completions"
            status, answer, headers = await asyncio.to_thread(get, url, {"model": "tiny", "prompt": PROMPT})
            assert status == 200 and answer["usage"]["completion_tokens"] > 0
            dram = (await until(ports["node"], "/readyz", 200))["dram"]
            assert any(kind in dram for kind in ("page cache", "shared memory")) and " are taken" in dram
            assert all({"READY=1", "WATCHDOG=1"} <= set(one) for one in said.values()), said
            request = {name.lower(): value for name, value in headers.items()}["x-request-id"]

            children["control"].signal(signal.SIGSTOP)
            silent = await asyncio.to_thread(get, f"http://127.0.0.1:{ports['node']}/readyz")
            assert silent[0] == 200, "a node does not need a control to be ready"
            children["control"].signal(signal.SIGCONT)
            await asyncio.to_thread(server.stop)
            lost = await until(ports["control"], "/readyz", 503)
            assert "there is no connection to the NATS server" in lost["reasons"]
            await until(ports["node"], "/readyz", 503)
            assert (await until(ports["control"], "/livez", 200))["live"], "a lost connection is no reason to restart"
            await server.start_async()
            for name in ("control", "node"):
                await until(ports[name], "/readyz", 200)
    finally:
        await bus.close()
        await asyncio.to_thread(server.stop)
        for socket_ in notified.values():
            asyncio.get_running_loop().remove_reader(socket_)
            socket_.close()

    events = {}
    for name in ports:
        text = (tmp_path / f"{name}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        events[name] = [line["event"] for line in lines if line.get("request") == request]
        assert events[name], f"{name} says nothing about request {request}:\n{text}"
        assert all({"timestamp", "level", "event", "process"} <= set(line) for line in lines)
        assert PASSWORD not in text and "harbour pilot" not in text
    assert "request accepted" in events["control"]
    assert {"sequence taken", "sequence ended"} <= set(events["node"])
