"""One server of a cell: the storage driver in this process, and a worker process per device, supervised.

Workers are forked from a process that has imported everything they need and has a single thread (the fork server of
`multiprocessing`). It ends when this process does, and the workers end with it (`actors.fork_server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import multiprocessing
import os
import secrets
import signal
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from actors.driver import HEARTBEAT_SECONDS, DriverShell, state_lost
from actors.local_storage import DEFAULT_CONTEXT, LocalStorage
from actors.model_server import ModelServer
from actors.node_leaving import until_drained
from actors.store_driver import StoreDriver
from actors.worker_settings import WorkerSettings, start_worker
from bus.credentials import ConnectionOptions
from bus.errors import UserError
from bus.health import Health
from bus.jetstream import JetStreamBus
from bus.messages import DriverLost
from bus.sizes import show_size
from bus.tasks import Tasks
from loaders import CheckpointError
from loaders.dram_tier import DramTier, choose_tier

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
STEADY_SECONDS = 10.0
"""A worker that lived this long was no failed start: it is restarted at once again."""
STOP_SECONDS = 5.0
SERVING_SECONDS = 3.0
"""What a worker said of itself counts for so long."""

LOOK_AFTER_SECONDS = 10.0
"""So often is looked whether what counts as lying in DRAM does."""

_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""For the workers: no thread may exist before the fork, and nothing is fetched from anywhere."""

REPLACED_LIMIT = 3
REPLACED_SECONDS = 60.0
"""So often in so long another process may start under this server's name: more is no restart, but a second node."""

logger = logging.getLogger("longshore.node")


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What a node is told at its start. `memory_bytes` and `threads` are per worker.

    `ssd_bytes`: what packed models may take of its disk, 0 for no bound; `serve_models`: where other servers may fetch
    them, empty for nowhere.
    """

    nats: ConnectionOptions
    cell: str
    server: str
    data: Path
    workers: int
    memory_bytes: int
    dram_bytes: int
    slots: int
    device: str
    threads: int
    context: int = DEFAULT_CONTEXT
    dram_tier: str = "auto"
    log_json: bool = False
    health: str = ""
    ssd_bytes: int = 0
    serve_models: str = ""
    catch_up: bool = True
    start_early: bool = True

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def arrivals(self) -> Path:
        """Where the store tells its workers what it is bringing to DRAM."""
        return self.data / f"arriving-{self.server}"


async def run_node(options: NodeOptions) -> None:
    """Until SIGTERM or SIGINT, then everything is ended in order. Raises `Unreachable` where there is no server."""
    loop = asyncio.get_running_loop()
    lock = _take_server(options)
    bus = await JetStreamBus.connect(options.nats, options.cell, name=f"longshore store/{options.server}")
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    served = ModelServer(options.models, options.serve_models) if options.serve_models else None
    tier = await asyncio.to_thread(_choose_tier, options)
    storage = LocalStorage(options.models, context_limit=options.context, tier=tier, arrivals=options.arrivals)
    driver = StoreDriver(
        options.server,
        dram_bytes=options.dram_bytes,
        storage=storage,
        process=os.getpid(),
        ssd_bytes=options.ssd_bytes,
        address=served.address if served is not None else "",
        dram_tier=tier.kind,
    )
    shell = DriverShell(bus, bus.subjects, driver, boot=lambda: secrets.token_hex(8))
    context = _context()
    try:
        await _first_of_its_name(bus, options.server)
    except BaseException:
        await bus.close()
        raise
    logger.info("the DRAM of node %s: %s", options.server, tier.description)
    settings = [worker_settings(options, index, tier.weights_root) for index in range(options.workers)]
    workers = [WorkerProcess(context, one, bus) for one in settings]
    tasks = Tasks()
    try:
        async with Health(f"node {options.server}").kept(options.health) as health:
            store = tasks.start(shell.run(), "store")
            supervisors = [tasks.start(worker.supervise(), worker.name) for worker in workers]
            tasks.start(_until(ending), "ending")
            tasks.start(_leave(bus, options.server), "leaving")
            tasks.start(_look_after(storage, driver), "looking after")
            tasks.start(_alone(shell, options.server), "alone")
            health.reasons = lambda: obstacles(bus, shell, workers)
            health.facts = lambda: {"dram": describe_dram(tier, options.dram_bytes)}
            if served is not None:
                health.details["models"] = served.address
            with contextlib.suppress(_Ending):
                await tasks.wait()
            # Workers first: nobody starts one again, each says that it leaves, and the store goes last.
            for supervisor in supervisors:
                supervisor.cancel()
            await asyncio.gather(*(worker.stop() for worker in workers))
            await shell.leave(store, "its node was told to end")
    finally:
        await tasks.stop()
        await asyncio.gather(*(worker.stop() for worker in workers))
        if served is not None:
            await asyncio.to_thread(served.stop)
        await bus.close()
        os.close(lock)
    logger.info("node %s has ended", options.server)


def _choose_tier(options: NodeOptions) -> DramTier:
    try:
        return choose_tier(options.dram_tier, options.models, server=options.server)
    except CheckpointError as error:
        raise UserError(f"--dram-tier {options.dram_tier}: {error}") from None


def describe_dram(tier: DramTier, budget: int) -> str:
    """Which memory it is, and how much of the budget is taken."""
    return f"{tier.description}; {show_size(tier.held_bytes)} of {show_size(budget)} are taken"


async def _look_after(storage: LocalStorage, driver: StoreDriver) -> None:
    while True:
        await asyncio.sleep(LOOK_AFTER_SECONDS)
        if lost := await storage.look_after():
            driver.begin_anew(lost)


def _take_server(options: NodeOptions) -> int:
    """A descriptor that holds this server's name in this data directory. Raises `UserError` where another node does."""
    path = options.data / f"node-{options.server}.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UserError(
            f"server {options.server} of data directory {options.data} is in use by another node: stop it, or give "
            "this one another --server or --data"
        ) from None
    return lock


async def _first_of_its_name(bus: JetStreamBus, server: str) -> None:
    """Raises `UserError` where a node of this name is alive: who comes second must not disturb it."""
    heartbeats = await bus.subscribe(bus.subjects.heartbeat(f"store/{server}"))
    try:
        async with asyncio.timeout(3 * HEARTBEAT_SECONDS):
            await heartbeats.next()
    except TimeoutError:
        return
    finally:
        await heartbeats.close()
    raise _second(server)


def _second(server: str) -> UserError:
    return UserError(
        f"another node of this cell calls itself {server}, too: stop it, or give this one another --server"
    )


async def _alone(shell: DriverShell, server: str) -> None:
    """Raises `UserError` where a second node keeps starting under the same name elsewhere."""
    while True:
        before = shell.replaced
        for _ in range(int(REPLACED_SECONDS)):
            await asyncio.sleep(1)
            if shell.replaced - before >= REPLACED_LIMIT:
                raise _second(server)


def obstacles(bus: JetStreamBus, shell: DriverShell, workers: list[WorkerProcess]) -> list[str]:
    """Why this node cannot serve now, one sentence each; none: it can, if only with some of its workers."""
    found = [] if bus.connected else ["there is no connection to the NATS server"]
    if not shell.epoch:
        found.append(
            "the store is not known to the cell yet" if not shell.endings else f"the store: {shell.last_ending}"
        )
    if not any(worker.serving for worker in workers):
        found.append("no worker is known to the cell: see their lines in the log")
    return found


def worker_settings(options: NodeOptions, index: int, dram: Path | None = None) -> WorkerSettings:
    return WorkerSettings(
        nats=options.nats,
        cell=options.cell,
        server=options.server,
        index=index,
        models=str(options.models),
        dram=str(dram or ""),
        arrivals=str(options.arrivals) if options.start_early else "",
        memory_bytes=options.memory_bytes,
        max_slots=options.slots,
        device=f"cuda:{index}" if options.device == "cuda" else options.device,
        threads=options.threads,
        log_json=options.log_json,
        catch_up=options.catch_up,
    )


class WorkerProcess:
    """One worker, started again whenever it ends. That its process is gone is said in the ledger at once."""

    def __init__(self, context: ForkServerContext, settings: WorkerSettings, bus: JetStreamBus) -> None:
        self.settings = settings
        self._bus = bus
        self.name = f"gpu/{settings.server}/{settings.index}"
        self._context = context
        self._process: ForkServerProcess | None = None
        self._beat = context.RawArray("d", 2)

    @property
    def serving(self) -> bool:
        """Whether the worker has an epoch and a connection, as it said itself a moment ago."""
        return bool(time.monotonic() - self._beat[0] < SERVING_SECONDS)

    async def supervise(self) -> None:
        """For ever; `stop` ends the process that is left."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_SECONDS
        while True:
            began = loop.time()
            process = await self._start()
            logger.info("%s is process %d", self.name, process.pid, extra={"driver": self.name})
            await _ended(process)
            process.join()
            logger.warning(
                "%s (process %d) ended with %s", self.name, process.pid, process.exitcode, extra={"driver": self.name}
            )
            await self._say_over(f"its process ended with {process.exitcode}")
            if loop.time() - began >= STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _say_over(self, reason: str) -> None:
        """The epoch of a process that is gone is over, whatever watch has heard of it."""
        epoch, self._beat[1] = int(self._beat[1]), 0
        if epoch and self._bus.connected:
            await state_lost(self._bus, self._bus.subjects, DriverLost(self.name, epoch, reason))

    async def _start(self) -> ForkServerProcess:
        process = self._context.Process(
            target=start_worker, args=(self.settings, self._beat), name=self.name, daemon=True
        )
        # The first start waits until the fork server has imported everything; the event loop does not. The thread
        # goes on where this task is cancelled, so the process is noted first.
        self._process = process
        await asyncio.shield(asyncio.to_thread(process.start))
        return process

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for what does not end in time."""
        process = self._process
        if process is None or process.pid is None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await _ended(process)
        except TimeoutError:
            process.kill()
            await _ended(process)
        process.join()


async def _ended(process: ForkServerProcess) -> None:
    """Until the process is gone."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        if not gone.done():
            gone.set_result(None)

    # A descriptor of our own: the loop must not hold on to one that a closed process object has given back.
    descriptor = os.dup(process.sentinel)
    loop.add_reader(descriptor, ready)
    try:
        await gone
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _context() -> ForkServerContext:
    """Where workers are forked; what they need is being imported there when this returns."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["actors.fork_server"])
    # From this thread, the main one: the fork server ends with the thread that made it.
    forkserver.ensure_running()
    return context


class _Ending(Exception):
    """Somebody asked this node to end."""


async def _leave(bus: JetStreamBus, server: str) -> None:
    await until_drained(bus, bus.subjects, server)
    logger.info("node %s was drained and leaves", server)
    raise _Ending


async def _until(ending: asyncio.Event) -> None:
    await ending.wait()
    raise _Ending
