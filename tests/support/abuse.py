"""HTTP clients that behave badly, and a gateway in this process, so that what it holds can be counted."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bus.gateway.process import bound_socket, serve
from bus.gateway.routes import Gateway
from bus.gateway.settings import GatewaySettings
from bus.jetstream import JetStreamBus


@asynccontextmanager
async def gateway_here(url: str, cell: str, **settings: Any) -> AsyncIterator[tuple[Gateway, JetStreamBus, int]]:
    """A gateway on a real socket in this event loop: itself, its bus, its port."""
    bus = await JetStreamBus.connect(url, cell, name="test-gateway")
    gateway = Gateway(bus, GatewaySettings(url, cell, **settings))
    ending, listening = asyncio.Event(), asyncio.Event()
    with bound_socket("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(serve(gateway, listener, ending, lambda _: listening.set()))
        try:
            await listening.wait()
            yield gateway, bus, listener.getsockname()[1]
        finally:
            ending.set()
            await serving
            await bus.close()


def request_bytes(path: str, body: Any, **headers: str) -> bytes:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(payload)}", "", ""]).encode() + payload


def narrow_socket(port: int) -> socket.socket:
    """A connected socket that takes as little as the system lets it before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    return connection


async def begin_stream(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a stream and read up to its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes("/v1/completions", body | {"stream": True}))
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        writer.transport.abort()
        raise ConnectionError(head.split(b"\r\n")[0].decode())
    await reader.readuntil(b"data: ")
    return reader, writer


async def status_and_body(port: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """One whole answer on a connection of its own: status, headers, body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes("/v1/completions", body, Connection="close"))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
    finally:
        writer.transport.abort()


def many_files() -> None:
    """Let this process have as many connections as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def resident_bytes(process: int) -> int:
    """Memory of a process."""
    with open(f"/proc/{process}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()
