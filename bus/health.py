"""Whether a process lives and can serve, for whoever starts and watches it: HTTP on a port of its own, and systemd.

    GET /livez    200 while the event loop turns; 503, or no answer at all, when it hangs: start the process again
    GET /readyz   200 while the process can really serve; 503 with the reasons, as JSON: send it nothing

The process's own event loop looks around twice a second and leaves what it found; a thread with a loop of its own
answers from that. So an answer costs the process nothing, and a loop that hangs is told of instead of hanging, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bus.errors import UserError
from bus.systemd import Systemd

LOOK_SECONDS = 0.5
READY_SECONDS = 3.0
"""What was found may be so old and still say that the process is ready."""
LIVE_SECONDS = 10.0
"""A loop that has not turned for so long hangs."""
HEAD_LIMIT_BYTES = 8192
CONNECTION_SECONDS = 2.0
CONNECTIONS_LIMIT = 64

Reasons = Callable[[], list[str]]


@dataclass(frozen=True, slots=True)
class _Found:
    at: float
    reasons: tuple[str, ...]
    facts: dict[str, str]


class Health:
    """What a process says of itself. `reasons` gives sentences that say why it cannot serve now; none: it can."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reasons: Reasons = lambda: ["it is starting"]
        self.details: dict[str, str] = {}
        """What else is told to whoever asks."""
        self.facts: Callable[[], dict[str, str]] = dict
        """The same, of what changes; asked as often as the reasons."""
        self._found = _Found(time.monotonic(), ("it is starting",), {})
        self._systemd = Systemd.from_environment()

    def look(self) -> None:
        """Leave what is so now. Called by the loop whose life this is about."""
        found = _Found(time.monotonic(), tuple(self.reasons()), self.facts())
        if found.reasons != self._found.reasons:
            self._systemd.status("; ".join(found.reasons) or "ready")
        self._found = found
        if not found.reasons:
            self._systemd.ready()
        self._systemd.alive()

    async def keep_looking(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def live(self) -> list[str]:
        """Why the process is to be started again. Any thread may ask."""
        silent = time.monotonic() - self._found.at
        return [f"the event loop has not turned for {silent:.0f} s"] if silent > LIVE_SECONDS else []

    def ready(self) -> list[str]:
        """Why it cannot serve. Any thread may ask."""
        found = self._found
        silent = time.monotonic() - found.at
        late = [f"the event loop has not turned for {silent:.0f} s"] if silent > READY_SECONDS else []
        return [*late, *found.reasons]

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and JSON body for a path."""
        if path not in ("/livez", "/readyz"):
            return 404, b'{"error":"use /livez or /readyz"}\n'
        reasons = self.live() if path == "/livez" else self.ready()
        word = "live" if path == "/livez" else "ready"
        body = {"process": self.name, word: not reasons, "reasons": reasons, **self.details, **self._found.facts}
        return 503 if reasons else 200, json.dumps(body).encode() + b"\n"

    @asynccontextmanager
    async def kept(self, address: str = "") -> AsyncIterator[Health]:
        """Looks around while the block lasts, and answers on `address` (HOST:PORT) where one is given.

        Raises `UserError` where nobody can listen there.
        """
        server = HealthServer(self, address) if address else None
        looking = asyncio.ensure_future(self.keep_looking())
        try:
            yield self
        finally:
            self._systemd.stopping()
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
            if server is not None:
                server.stop()


class HealthServer:
    """Answers over HTTP from a thread of its own. `port` is where it listens."""

    def __init__(self, health: Health, address: str) -> None:
        self._health = health
        self._connections = 0
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, int(port)), family=family, backlog=CONNECTIONS_LIMIT)
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"--health {address}: cannot listen there: {getattr(error, 'strerror', None) or error}; "
                "use HOST:PORT of this machine that is free"
            ) from None
        self.port = int(self._socket.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        serving = asyncio.start_server(self._serve, sock=self._socket, limit=HEAD_LIMIT_BYTES)
        server = self._loop.run_until_complete(serving)
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONNECTION_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > CONNECTIONS_LIMIT:
                return
            async with asyncio.timeout(CONNECTION_SECONDS):
                line = await reader.readline()
                while (await reader.readline()).strip():
                    pass  # headers say nothing that matters here
                writer.write(self._respond(line))
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass
        finally:
            self._connections -= 1
            writer.close()

    def _respond(self, line: bytes) -> bytes:
        words = line.split()
        if len(words) < 2 or words[0] not in (b"GET", b"HEAD"):
            status, body = 405, b'{"error":"use GET"}\n'
        else:
            status, body = self._health.answer(words[1].partition(b"?")[0].decode("latin-1"))
        reason = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}[status]
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if words[:1] == [b"HEAD"] else body)
