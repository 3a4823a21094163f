"""Bad input over HTTP: any bytes are answered in shape or by hanging up, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.stub_node import MODEL
from bus.client import Client
from tests.support.abuse import (
    begin_stream,
    gateway_here,
    many_files,
    narrow_socket,
    request_bytes,
    resident_bytes,
    status_and_body,
)
from tests.support.live_cell import CELL, LiveCell, live_cell
from tests.support.live_gateway import live_gateway

DISCONNECTS = int(os.environ.get("LONGSHORE_DISCONNECTS", "300"))
"""The full number is 10,000."""
AT_ONCE = int(os.environ.get("LONGSHORE_AT_ONCE", "800"))
"""The full number is 10,000."""
MIB = 1 << 20

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", f"/v1/models/{MODEL}", "/health"]
METHODS = ["POST", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"]
OTHER_FIELDS = (
    *("temperature", "top_p", "top_k", "seed", "stop", "n", "logprobs", "top_logprobs", "logit_bias", "dimensions"),
    *("presence_penalty", "min_tokens", "tools", "response_format", "user", "echo", "priority", "xyz"),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
any_json = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "tool"]) | any_json, "content": any_json}
)
near_bodies = st.fixed_dictionaries(
    {"model": st.just(MODEL) | any_json},
    optional={
        "prompt": st.text(max_size=5) | any_json,
        "input": st.text(max_size=5) | any_json,
        "messages": st.lists(message, max_size=3) | any_json,
        "max_tokens": st.integers(1, 3) | any_json,
        "stream": st.booleans() | any_json,
        "stream_options": any_json,
        **dict.fromkeys(OTHER_FIELDS, any_json),
    },
)
header_bytes = st.binary(max_size=20).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b""))


@st.composite
def whole_requests(draw: st.DrawFn) -> bytes:
    """Requests whose head is nearly right."""
    body = draw(st.binary(max_size=40) | (any_json | near_bodies).map(lambda value: json.dumps(value).encode()))
    path = draw(st.sampled_from(PATHS) | st.text(max_size=10).map(lambda text: "/" + text))
    lines = [f"{draw(st.sampled_from(METHODS))} {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close"]
    if draw(st.integers(0, 9)):
        lines.append(b"Content-Type: application/json")
    for name in draw(st.lists(st.sampled_from([b"Authorization", b"Idempotency-Key", b"Expect", b"X"]), max_size=2)):
        lines.append(name + b": " + draw(header_bytes))
    size = len(body) if draw(st.integers(0, 9)) else draw(st.integers(-1, 99))
    lines.append(b"Content-Length: %d" % size)
    return b"\r\n".join([*lines, b"", b""]) + body


async def test_any_bytes_are_answered_in_shape_or_by_hanging_up(tmp_path: Path) -> None:
    async with live_cell(tmp_path) as cell, live_gateway(cell.server, CELL, tmp_path) as (url, child):
        port = int(url.rpartition(":")[2])

        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.binary(max_size=200) | whole_requests() | whole_requests())
        def try_bytes(data: bytes) -> None:
            check_answer(exchange(port, data))

        await asyncio.to_thread(try_bytes)
        assert child.process is not None and child.process.returncode is None
        log = child.log.read_text()
        assert "Traceback" not in log and "an error of the gateway itself" not in log, log[-3000:]
        # It serves as before, and what the fuzzing began is over.
        status, _, _ = await status_and_body(port, {"model": MODEL, "prompt": "x", "max_tokens": 3})
        assert status == 200
        await cell.until(nobody_active)


def exchange(port: int, data: bytes) -> bytes:
    """What comes back until the gateway hangs up, at most for a moment: some heads promise more than they have."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        received = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(data)
            if b"\r\n\r\n" not in data:
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(0.5)
            while len(received) < 65536 and (part := connection.recv(65536)):
                received += part
        return received


def check_answer(received: bytes) -> None:
    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return
    status = int(head.split()[1])
    assert status != 500, received
    length = re.search(rb"content-length: (\d+)", head)
    if status >= 400 and body:
        assert length is not None, received
        error = json.loads(body[: int(length.group(1))])["error"]
        assert error["message"] and error["type"], received


def nobody_active(status: dict[str, Any]) -> bool:
    return not any(one["active"] for worker in status["workers"].values() for one in worker["instances"].values())


async def test_clients_that_stall_leave_or_dawdle(tmp_path: Path) -> None:
    """One cell and one gateway for all of them."""
    async with (
        live_cell(tmp_path, step_seconds=0.002) as cell,
        gateway_here(cell.server.url, CELL, stall_seconds=0.3, head_seconds=0.3, body_seconds=0.3) as (
            gateway,
            _,
            port,
        ),
    ):
        await one_that_never_reads(cell, port)
        await slow_heads_and_bodies(port)
        await gateway.exchanges.none()
        await gateway.canceller.idle()
        await cell.until(nobody_active)


async def one_that_never_reads(cell: LiveCell, port: int) -> None:
    before = resident_bytes(os.getpid())
    stalled = [narrow_socket(port) for _ in range(8)]
    try:
        for connection in stalled:
            connection.sendall(
                request_bytes("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 8000, "stream": True})
            )
        await cell.until(lambda found: not nobody_active(found))
        for _ in range(5):  # others are served meanwhile
            status, _, _ = await status_and_body(port, {"model": MODEL, "prompt": "x", "max_tokens": 20})
            assert status == 200
        await cell.until(nobody_active)
        counts = (await cell.status())["requests"]
        assert counts.get("cancelled") == 8, counts
        assert resident_bytes(os.getpid()) - before < 64 * MIB
    finally:
        for connection in stalled:
            connection.close()


async def slow_heads_and_bodies(port: int) -> None:
    table: list[tuple[bytes, bytes]] = [
        (b"", b""),  # says nothing
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 408 "),
        (b"POST /v1/completions HTTP/1.1\r\nX: " + b"x" * 40_000, b"HTTP/1.1 431 "),
        (request_bytes("/v1/completions", b"{}")[:-1], b"HTTP/1.1 408 "),
        (request_bytes("/v1/completions", b"x" * MIB, Authorization="x")[: MIB // 2], b"HTTP/1.1 408 "),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 "),
    ]

    async def ask(sent: bytes, answer: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        async with asyncio.timeout(10):
            received = await reader.read()
        assert received.startswith(answer) and (answer or not received), (sent[:80], received)
        writer.transport.abort()

    await asyncio.gather(*(ask(*row) for row in table))


@pytest.mark.slow
async def test_clients_that_leave_in_mid_stream_leave_nothing_behind(tmp_path: Path) -> None:
    many_files()
    async with (
        live_cell(tmp_path, step_seconds=0.02) as cell,
        gateway_here(cell.server.url, CELL) as (gateway, bus, port),
    ):

        async def leave() -> None:
            _, writer = await begin_stream(port, {"model": MODEL, "prompt": "x", "max_tokens": 4000})
            writer.transport.abort()

        async def settled() -> dict[str, Any]:
            await gateway.exchanges.none()
            await gateway.canceller.idle()
            status = await cell.until(nobody_active)
            gc.collect()
            return status

        async def leave_often(times: int) -> None:
            for _ in range(times // 50):
                await asyncio.gather(*(leave() for _ in range(50)))

        await leave_often(100)
        await settled()
        subscriptions, tasks = len(bus.raw._subs), len(asyncio.all_tasks())
        memory = resident_bytes(os.getpid())
        async with asyncio.timeout(600):
            await leave_often(DISCONNECTS)
            status = await settled()
        assert status["requests"] == {"cancelled": DISCONNECTS + 100} and status["waiting"] == 0
        assert len(bus.raw._subs) == subscriptions and not bus.raw._inboxes
        assert len(asyncio.all_tasks()) <= tasks + 2
        assert resident_bytes(os.getpid()) - memory < 16 * MIB
        print(f"{DISCONNECTS} disconnects: {(resident_bytes(os.getpid()) - memory) / MIB:.1f} MiB more")


@pytest.mark.slow
async def test_many_requests_at_once(tmp_path: Path) -> None:
    """Over HTTP and over NATS: what finds no room is told when to come again, the rest finishes, nobody dies."""
    many_files()
    queue = max(10, AT_ONCE // 10)
    async with (
        live_cell(tmp_path, step_seconds=0.002, control=("--queue-limit", str(queue))) as cell,
        live_gateway(cell.server, CELL, tmp_path, "--requests", str(AT_ONCE // 2)) as (url, child),
    ):
        port = int(url.rpartition(":")[2])
        asked = {"model": MODEL, "prompt": "x", "max_tokens": 4}
        async with asyncio.timeout(300):
            answers = await asyncio.gather(*(status_and_body(port, asked) for _ in range(AT_ONCE)))
        refused = [headers for status, headers, _ in answers if status == 429]
        assert refused and len(refused) + sum(status == 200 for status, _, _ in answers) == AT_ONCE
        assert all(int(headers["retry-after"]) >= 1 for headers in refused)
        assert len(answers) - len(refused) >= queue
        assert resident_bytes(child.pid) < 512 * MIB

        client = Client(cell.bus, CELL)
        async with asyncio.timeout(300):
            texts = await asyncio.gather(
                *(client.infer(MODEL, prompt="x", max_tokens=4).text() for _ in range(AT_ONCE)), return_exceptions=True
            )
        codes = [
            (getattr(one, "code", ""), getattr(one, "retry_ms", 0) > 0) for one in texts if not isinstance(one, str)
        ]
        assert codes and set(codes) == {("queue_full", True)}
        assert all(one.count("tok") == 4 for one in texts if isinstance(one, str)) and len(texts) - len(codes) >= queue
        await cell.until(lambda found: nobody_active(found) and found["waiting"] == 0)
        assert all(one.process is not None and one.process.returncode is None for one in (*cell.controls, *cell.nodes))
        assert resident_bytes(cell.controls[0].pid) < 512 * MIB
