"""The process `longshore gateway`: uvicorn and a connection to NATS, ended in order.

On SIGTERM it stops to listen and calls itself not ready; open answers get `grace_seconds`, then streams end with an
error event and the rest with status 503. Another gateway answers whoever repeats a request with its idempotency key.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable

import structlog
import uvicorn

from bus.errors import UserError
from bus.gateway.protocol import protocol_with
from bus.gateway.routes import Gateway
from bus.gateway.settings import GatewaySettings
from bus.jetstream import JetStreamBus
from bus.tasks import Tasks

BACKLOG = 4096
SEND_BUFFER_BYTES = 128 * 1024
LAST_WORDS_SECONDS = 5.0
"""What is left for the last events after the grace is over, and for cancels."""
_FILES_BESIDE = 64

log = structlog.get_logger("longshore.gateway")


class _Server(uvicorn.Server):
    """Signals belong to `run_gateway`."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def run_gateway(settings: GatewaySettings, *, listening: Callable[[str], None] = lambda _: None) -> None:
    """Until SIGTERM or SIGINT; `listening` is told the address. Raises `Unreachable` or `UserError`."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    _allow_files(settings.connections + _FILES_BESIDE)
    bus = await JetStreamBus.connect(settings.nats, settings.cell, name="longshore-gateway")
    try:
        with bound_socket(settings.host, settings.port) as listener:
            await serve(Gateway(bus, settings), listener, ending, listening)
    finally:
        await bus.close()


async def serve(
    gateway: Gateway, listener: socket.socket, ending: asyncio.Event, listening: Callable[[str], None] = lambda _: None
) -> None:
    """Serve on a bound socket until `ending` is set; then end in order."""
    settings = gateway.settings
    server = _Server(
        uvicorn.Config(
            gateway.app,
            http=protocol_with(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=int(settings.idle_seconds),
            timeout_graceful_shutdown=int(LAST_WORDS_SECONDS),
        )
    )
    tasks = Tasks()
    serving = tasks.start(server.serve([listener]), "gateway serves")
    tasks.start(gateway.canceller.run(), "gateway cancels")
    try:
        while not server.started:
            if serving.done():
                serving.result()
            await asyncio.sleep(0.01)
        listening(address_of(listener))
        failed = asyncio.ensure_future(tasks.wait())
        stop = asyncio.ensure_future(ending.wait())
        await asyncio.wait([failed, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if failed.done():
            failed.result()
        failed.cancel()
        await _end(gateway, server, settings)
        server.should_exit = True
        await serving
    finally:
        await tasks.stop()


async def _end(gateway: Gateway, server: _Server, settings: GatewaySettings) -> None:
    log.info("stopping", open=len(gateway.exchanges), cancels=gateway.canceller.pending)
    gateway.readiness.stopping = True
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(settings.grace_seconds):
            await gateway.exchanges.none()
    gateway.exchanges.break_off()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await gateway.exchanges.none()
            await gateway.canceller.idle()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket to listen on. Raises `UserError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted connections inherit it. The system's own would grow to megabytes for each reader that stalls.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {host}:{port}: {reason}; choose another one with --host and --port"
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_files(wanted: int) -> None:
    """Each connection is an open file; many systems allow 1,024 unless asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            log.warning("fewer files may be open than connections are allowed", files=allowed, wanted=wanted)
