"""Two worlds with one face, so that every contract test runs against both implementations of the bus."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Protocol
from unittest import mock

from bus import jetstream_reader
from bus.contract import Bus, Record
from bus.jetstream import JetStreamBus
from bus.jetstream_api import call
from bus.memory import MemoryBus, MemoryServer
from bus.memory_faults import FINE, AppendFate, NoFaults
from bus.server import EmbeddedServer
from bus.subjects import Subjects

MIB = 1024 * 1024
_cells = itertools.count(1)


class World(Protocol):
    """What a test may do to the world around its buses."""

    subjects: Subjects

    def running(self, *, ledger_limit_bytes: int = 64 * MIB) -> contextlib.AbstractAsyncContextManager[None]:
        """The cell exists inside of this."""
        ...

    async def bus(self, *, ack_timeout: float = 5.0) -> Bus: ...

    async def cut(self, bus: Bus) -> None:
        """The connection breaks, and no other comes about before `heal`."""
        ...

    async def deafen(self, bus: Bus) -> None:
        """What the server says does not arrive any more; what the bus says does. `heal` ends it by a reconnect."""
        ...

    async def heal(self, bus: Bus) -> None: ...

    async def recreate_ledger(self) -> None:
        """Delete the ledger, and create it anew, empty."""
        ...

    async def heard(self, bus: Bus) -> None:
        """Wait until readers of this bus know that they have all."""
        ...


class _Deaf(NoFaults):
    """Acknowledgements are lost while `deaf` is set."""

    deaf = False

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        return replace(FINE, acknowledged=False) if self.deaf else FINE


class MemoryTestWorld:
    def __init__(self) -> None:
        self._cell = f"m{next(_cells)}"
        self.subjects = Subjects(self._cell)
        self._server: MemoryServer | None = None
        self._faults: dict[int, _Deaf] = {}

    @contextlib.asynccontextmanager
    async def running(self, *, ledger_limit_bytes: int = 64 * MIB) -> AsyncIterator[None]:
        self._server = MemoryServer(self._cell, ledger_limit_bytes=ledger_limit_bytes)
        yield

    @property
    def server(self) -> MemoryServer:
        assert self._server is not None
        return self._server

    async def bus(self, *, ack_timeout: float = 5.0) -> MemoryBus:
        faults = _Deaf()
        bus = self.server.bus("test", faults=faults, ack_timeout=ack_timeout)
        self._faults[bus.number] = faults
        return bus

    async def cut(self, bus: MemoryBus) -> None:
        self.server.cut(bus)

    async def deafen(self, bus: MemoryBus) -> None:
        self._faults[bus.number].deaf = True

    async def heal(self, bus: MemoryBus) -> None:
        self._faults[bus.number].deaf = False
        self.server.cut(bus)
        self.server.heal(bus)

    async def recreate_ledger(self) -> None:
        self.server.ledger.recreate()

    async def heard(self, bus: MemoryBus) -> None:
        return None


class Proxy:
    """TCP between one client and the server. It can refuse connections, swallow what the server says, and be slow: each
    piece comes `delay` seconds late."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.refusing = False
        self.deaf = False
        self.delay = 0.0

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.close()
            return
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, up_writer]
        self._tasks += [
            asyncio.create_task(self._pump(reader, up_writer, False)),
            asyncio.create_task(self._pump(up_reader, writer, True)),
        ]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if not (from_server and self.deaf):
                    writer.write(data)
                    await writer.drain()
        writer.close()

    def drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        self.refusing = True
        self.drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()


class JetStreamTestWorld:
    def __init__(self, server: EmbeddedServer) -> None:
        self._cell = f"t{next(_cells)}"
        self.subjects = Subjects(self._cell)
        self._server = server
        self._limits: dict[str, Any] = {}
        self._admin: JetStreamBus | None = None
        self._proxies: dict[int, Proxy] = {}
        self._buses: list[JetStreamBus] = []

    @contextlib.asynccontextmanager
    async def running(self, *, ledger_limit_bytes: int = 64 * MIB) -> AsyncIterator[None]:
        self._limits = {"ledger_limit_bytes": ledger_limit_bytes}
        small = {"tokens_limit_bytes": 16 * MIB, "intake_limit_bytes": 16 * MIB, "parts_limit_bytes": 16 * MIB}
        self._admin = await JetStreamBus.connect(self._server.url, self._cell, create=True, **self._limits, **small)
        try:
            yield
        finally:
            await self._end()

    async def bus(self, *, ack_timeout: float = 5.0) -> JetStreamBus:
        proxy = Proxy(self._server.port)
        bus = await JetStreamBus.connect(await proxy.start(), self._cell, ack_timeout=ack_timeout)
        self._proxies[id(bus)] = proxy
        self._buses.append(bus)
        return bus

    async def cut(self, bus: Bus) -> None:
        proxy = self._proxies[id(bus)]
        proxy.refusing = True
        proxy.drop()
        await until(lambda: not bus.connected)

    async def deafen(self, bus: Bus) -> None:
        self._proxies[id(bus)].deaf = True

    async def heal(self, bus: Bus) -> None:
        proxy = self._proxies[id(bus)]
        before = bus.connections
        proxy.deaf = proxy.refusing = False
        proxy.drop()
        await until(lambda: bus.connections > before)

    async def recreate_ledger(self) -> None:
        assert self._admin is not None
        await call(self._admin.raw, f"STREAM.DELETE.{self.subjects.ledger_stream}")
        await self._admin.ensure_streams(**self._limits)

    async def heard(self, bus: Bus) -> None:
        """Heartbeats say so; that they come is what this waits for."""
        with mock.patch.object(jetstream_reader, "CLOCKS_NS", 0):
            await asyncio.sleep(2 * jetstream_reader.HEARTBEAT_SECONDS)

    async def _end(self) -> None:
        for bus in self._buses:
            await bus.close()
        for proxy in self._proxies.values():
            await proxy.stop()
        if self._admin is not None:
            for stream in (
                self.subjects.ledger_stream,
                self.subjects.tokens_stream,
                self.subjects.intake_stream,
                self.subjects.snapshots_stream,
                self.subjects.parts_stream,
            ):
                await call(self._admin.raw, f"STREAM.DELETE.{stream}")
            await self._admin.close()


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of two implementations, with no event in common
            await asyncio.sleep(0.005)


async def read_up_to(reader: Any, last: int, seconds: float = 20.0) -> list[Record]:
    """All that a reader yields up to a sequence."""
    records: list[Record] = []
    async with asyncio.timeout(seconds):
        while not records or records[-1].sequence < last:
            records += await reader.batch()
    return records
