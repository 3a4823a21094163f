"""Liveness and readiness: told from beside the event loop, so that one that hangs is told of, too."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest

from bus import health as health_module
from bus.config_fields import Field
from bus.errors import UserError
from bus.health import Health, HealthServer
from bus.systemd import Systemd


def ask(port: int, request: bytes = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[int, dict[str, object]]:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(4096):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body else {}


async def test_ready_with_reasons_and_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "CONNECTION_SECONDS", 0.2)
    health = Health("control")
    server = HealthServer(health, "127.0.0.1:0")
    try:
        here = server.port
        assert await asyncio.to_thread(ask, here) == (
            503,
            {"process": "control", "ready": False, "reasons": ["it is starting"]},
        )
        reasons = ["the ledger is silent for 9 s"]
        health.reasons = lambda: reasons
        health.look()
        assert (await asyncio.to_thread(ask, here))[1]["reasons"] == reasons
        reasons = []
        health.look()
        live = b"GET /livez?verbose HTTP/1.0\r\n\r\n"
        assert await asyncio.to_thread(ask, here) == (200, {"process": "control", "ready": True, "reasons": []})
        assert await asyncio.to_thread(ask, here, live) == (200, {"process": "control", "live": True, "reasons": []})
        for request, status in (
            (b"GET /metrics HTTP/1.1\r\n\r\n", 404),
            (b"POST /readyz HTTP/1.1\r\n\r\n", 405),
            (b"\x16\x03\x01\r\n\r\n", 405),
            (b"HEAD /readyz HTTP/1.1\r\n\r\n", 200),
        ):
            assert (await asyncio.to_thread(ask, here, request))[0] == status
        with socket.create_connection(("127.0.0.1", here)) as slow:  # who says nothing is hung up
            slow.sendall(b"GET /readyz")
            assert await asyncio.to_thread(slow.recv, 100) == b""
        with pytest.raises(UserError, match=f"--health 127.0.0.1:{here}: cannot listen there"):
            HealthServer(health, f"127.0.0.1:{here}")
    finally:
        server.stop()


async def test_a_loop_that_hangs_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "LIVE_SECONDS", 0.6)
    monkeypatch.setattr(health_module, "READY_SECONDS", 0.3)
    monkeypatch.setattr(health_module, "LOOK_SECONDS", 0.05)
    health = Health("node s1")
    health.reasons = list
    async with health.kept():
        server = HealthServer(health, "127.0.0.1:0")
        try:
            await asyncio.sleep(0)
            live = b"GET /livez HTTP/1.1\r\n\r\n"
            assert ask(server.port, live)[0] == ask(server.port)[0] == 200
            time.sleep(0.4)  # noqa: ASYNC251 - the loop of this test hangs
            assert (ask(server.port, live)[0], ask(server.port)[0]) == (200, 503)
            time.sleep(0.4)  # noqa: ASYNC251
            status, body = ask(server.port, live)
            assert status == 503 and body["reasons"] == ["the event loop has not turned for 1 s"]
            await asyncio.sleep(0.1)
            assert ask(server.port, live)[0] == ask(server.port)[0] == 200
        finally:
            server.stop()


async def test_systemd_hears_that_it_is_ready_lives_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        monkeypatch.setattr(health_module, "LOOK_SECONDS", 0.02)
        loop = asyncio.get_running_loop()

        async def said() -> str:
            async with asyncio.timeout(5):
                return (await loop.sock_recv(listener, 1000)).decode()

        health = Health("control")
        async with health.kept():
            assert [await said(), await said()] == ["WATCHDOG=1", "WATCHDOG=1"]
            health.reasons = lambda: ["it reads\nthe ledger"]
            assert "STATUS=it reads the ledger" in [await said(), await said()]
            health.reasons = list
            heard = [await said()]
            while heard[-1] != "READY=1":
                heard.append(await said())
            assert "STATUS=ready" in heard
        last = await said()
        while last == "WATCHDOG=1":
            last = await said()
        assert last == "STOPPING=1"


def test_a_watchdog_for_another_process_is_none_of_ours() -> None:
    assert Systemd.from_environment({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}).watchdog_seconds == 0
    assert Systemd.from_environment({"WATCHDOG_USEC": "5000000"}).watchdog_seconds == 5
    assert Systemd.from_environment({}).address == ""


def test_what_did_not_get_through_is_said_again(tmp_path: Path) -> None:
    systemd = Systemd(str(tmp_path / "notify"))
    systemd.ready()  # a socket that is not there is no error
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(systemd.address)
        listener.setblocking(False)
        systemd.ready()
        systemd.ready()
        assert listener.recv(100) == b"READY=1"
        with pytest.raises(BlockingIOError):
            listener.recv(100)


def test_the_address_is_checked_with_the_other_options() -> None:
    field = Field("control.health", "health", str, "", "", "HOST:PORT")
    for good in ("", "0.0.0.0:8081", "[::1]:1", "localhost:80", ":8081"):
        assert field.check(good) == good
    for bad in ("8081", "a:b", "a:99999", "http://a:1", "a b:1"):
        with pytest.raises(ValueError):
            field.check(bad)
