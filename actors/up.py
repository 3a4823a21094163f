"""A whole cell on one machine: an embedded NATS server (or an external one), controls and nodes, each a process.

What is in the data directory:
    nats/      the embedded server's streams
    models/    packed checkpoints, shared by the servers of this machine
    logs/      one file per process
    generations/  recordings of what the ledger has dropped
    lock       held by the `longshore up` that uses the directory
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from actors.children import Child
from bus.contract import BusError
from bus.credentials import ConnectionOptions
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.server import EmbeddedServer
from bus.subjects import Subjects

READY_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class UpOptions:
    """`nats` without an address: embed a server, on `port` (0: any free one).

    Sizes are texts such as 2GB, as `node` takes them.
    """

    data: Path
    cell: str = "main"
    nodes: int = 2
    workers: int = 2
    controls: int = 1
    device: str = "cpu"
    nats: ConnectionOptions = field(default_factory=ConnectionOptions)
    port: int = 0
    fsync_always: bool = False
    memory: str = ""
    dram: str = ""
    dram_tier: str = "auto"
    slots: int = 0
    config: Path | None = None
    log_json: bool = False
    control_arguments: tuple[str, ...] = ()
    node_arguments: tuple[str, ...] = ()


class CellProcesses:
    """Starts and ends the processes of a cell. Use as an asynchronous context manager."""

    def __init__(self, options: UpOptions) -> None:
        self.options = options
        self.server: EmbeddedServer | None = None
        self.controls: list[Child] = []
        self.nodes: list[Child] = []
        self.connection = options.nats.without_secrets_in_url()
        self._lock: int | None = None

    @property
    def url(self) -> str:
        return self.connection.address

    @property
    def models_directory(self) -> Path:
        return self.options.data / "models"

    async def __aenter__(self) -> CellProcesses:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start(self) -> None:
        options = self.options
        self._take_data()
        (options.data / "logs").mkdir(exist_ok=True)
        self.models_directory.mkdir(exist_ok=True)
        if not options.nats.url:
            self.server = EmbeddedServer(options.data / "nats", port=options.port, fsync_always=options.fsync_always)
            await self.server.start_async()
            self.connection = ConnectionOptions(url=self.server.url)
        common = ["--nats", self.url, "--cell", options.cell]
        common += ["--config", str(options.config)] if options.config is not None else []
        common += ["--log-json"] if options.log_json else []
        for number in range(1, options.controls + 1):
            arguments = ["control", *common, "--health", "", "--generations", str(options.data / "generations")]
            arguments += options.control_arguments
            self.controls.append(self._child(f"control-{number}", arguments))
        for number in range(1, options.nodes + 1):
            arguments = ["node", *common, "--server", f"s{number}", "--data", str(options.data), "--health", ""]
            # They share the directory of the models, so that there is nothing to fetch from each other.
            arguments += ["--serve-models", ""]
            arguments += ["--workers", str(options.workers), "--device", options.device]
            arguments += ["--dram", options.dram or str(_share(options.nodes)), "--dram-tier", options.dram_tier]
            memory = options.memory or (str(_share(options.nodes * options.workers)) if options.device == "cpu" else "")
            arguments += ["--memory", memory] if memory else []
            arguments += ["--slots", str(options.slots)] if options.slots else []
            arguments += options.node_arguments
            self.nodes.append(self._child(f"node-s{number}", arguments))
        for child in self.children:
            await child.start()

    def _child(self, name: str, arguments: list[str]) -> Child:
        log = self.options.data / "logs" / f"{name}.log"
        return Child(name, arguments, log, environment=self.connection.variables())

    @property
    def children(self) -> list[Child]:
        return [*self.controls, *self.nodes]

    async def ready(self, bus: JetStreamBus, *, seconds: float = READY_SECONDS) -> dict[str, Any]:
        """Wait until every worker is up; the cell's status. Raises `UserError` where a process ends before that."""
        wanted = self.options.nodes * self.options.workers
        loop = asyncio.get_running_loop()
        limit = loop.time() + seconds
        while True:
            status = await cell_status(bus, self.options.cell)
            if status is not None and len(status["workers"]) >= wanted and len(status["servers"]) >= self.options.nodes:
                return status
            for child in self.children:
                if child.process is not None and child.process.returncode is not None:
                    raise UserError(
                        f"{child.name} ended with code {child.process.returncode} during the start; "
                        f"the end of {child.log}:\n{child.last_words()}"
                    )
            if loop.time() > limit:
                have = len(status["workers"]) if status is not None else 0
                logs = self.options.data / "logs"
                raise UserError(f"{have} of {wanted} workers were up after {seconds:g} s; see the logs in {logs}")
            await asyncio.sleep(0.1)

    async def watch(self, tell: Callable[[str], None]) -> None:
        """For ever: start again what was killed, and `tell` of it. Raises `UserError` for a process that gave up."""
        keepers = [asyncio.ensure_future(self._keep(child, tell)) for child in self.children]
        if self.server is not None:
            keepers.append(asyncio.ensure_future(self._keep_server(self.server, tell)))
        try:
            done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for keeper in keepers:
                keeper.cancel()
        done.pop().result()

    async def _keep(self, child: Child, tell: Callable[[str], None]) -> None:
        pauses = _Pauses()
        while (code := await child.wait()) < 0 or (code == 0 and child in self.nodes):
            await pauses.take()
            why = f"was ended by signal {-code}" if code else "was drained or told to end, and has left"
            tell(f"{child.name} {why}: starting it again")
            await child.start()
        raise UserError(f"{child.name} ended with code {code}; the end of {child.log}:\n{child.last_words()}")

    async def _keep_server(self, server: EmbeddedServer, tell: Callable[[str], None]) -> None:
        pauses = _Pauses()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not server.running:
                await pauses.take()
                tell(f"the NATS server at {server.url} has ended: starting it again")
                await server.start_async()

    async def stop(self) -> None:
        """Nodes first, so that they say good-bye; then controls; the server last."""
        await asyncio.gather(*(child.stop() for child in self.nodes))
        await asyncio.gather(*(child.stop() for child in self.controls))
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_data(self) -> None:
        data = self.options.data
        try:
            data.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"the data directory {data} cannot be used: {error.strerror}; name another with --data"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            self._lock = None
            raise UserError(
                f"the data directory {data} is in use by process {owner}: stop it, or name another one with --data"
            ) from None
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)


class _Pauses:
    """Before a process is started again: none at first, then longer ones, until it ran for longer than the longest."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since = asyncio.get_running_loop().time()

    async def take(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - self._since > _LONGEST_PAUSE_SECONDS:
            self._seconds = 0.0
        await asyncio.sleep(self._seconds)
        self._seconds = min(_LONGEST_PAUSE_SECONDS, 2 * self._seconds or 0.5)
        self._since = loop.time()


def _share(parts: int) -> int:
    """Bytes for one of so many parts: together they get 40 % of this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, memory * 2 // 5 // parts)


async def cell_status(bus: JetStreamBus, cell: str) -> dict[str, Any] | None:
    """What control says of the cell; None while no control answers."""
    with contextlib.suppress(BusError, msgspec.DecodeError):
        delivery = await bus.request(Subjects(cell).admin("status"), b"", timeout=1.0)
        status = msgspec.json.decode(delivery.payload)
        if isinstance(status, dict) and status.get("live"):
            return status
    return None
