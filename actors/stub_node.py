"""A server without models, as a process of its own: real drivers over NATS, stub engines. For benches and tests.

python -m actors.stub_node --nats URL --cell NAME [--workers 1] [--models 1] [--step-seconds 0] [--slots 64]
    [--memory-mib 100] [--load-seconds 0] [--full]

With --directory DIR its models are packed files that lie there, as those of a real server; only its engines are stubs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
from pathlib import Path

from actors.driver import DriverShell
from actors.node_leaving import until_drained
from actors.store_driver import Storage, StoreDriver
from actors.stub_runtime import VOCABULARY, StubRuntime
from actors.stub_storage import StubStorage
from actors.worker_driver import WorkerDriver
from bus.credentials import ConnectionOptions
from bus.jetstream import JetStreamBus
from bus.messages import ModelCard
from bus.options import connection
from bus.subjects import Subjects
from bus.tasks import Tasks

MODEL = "stub"
MIB = 1 << 20


def stub_card(model: str = MODEL) -> ModelCard:
    return ModelCard(
        model,
        "0" * 64,
        10 * MIB,
        context=8192,
        kv_bytes_per_token=1,
        vocabulary=VOCABULARY,
        architecture="Stub",
        chat=True,
    )


async def run_stub_node(
    nats: ConnectionOptions | str,
    cell: str,
    *,
    server: str = "stub",
    workers: int = 1,
    step_seconds: float = 0.0,
    slots: int = 64,
    models: int = 1,
    memory_mib: int = 100,
    directory: str = "",
    load_seconds: float = 0.0,
    full: bool = False,
) -> None:
    """Until SIGTERM. The models are `stub`, `stub-1`, `stub-2` and so on, or those of the directory."""
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    bus = await JetStreamBus.connect(nats, cell, name=f"longshore-stub-{server}")
    subjects = Subjects(cell)
    tasks = Tasks()
    cards = tuple(stub_card(f"{MODEL}-{number}" if number else MODEL) for number in range(models))
    rate = int(cards[0].weight_bytes / load_seconds) if load_seconds else 0
    storage: Storage = StubStorage(cards, bytes_per_second=rate)
    if directory:
        from actors.local_storage import LocalStorage

        Path(directory).mkdir(parents=True, exist_ok=True)
        storage = LocalStorage(Path(directory))
    store = StoreDriver(server, dram_bytes=1000 * MIB, storage=storage, process=os.getpid())
    drivers = [DriverShell(bus, subjects, store, boot=lambda: secrets.token_hex(8))]
    for index in range(workers):
        worker = WorkerDriver(
            bus,
            subjects,
            server,
            index,
            memory_bytes=memory_mib * MIB,
            max_slots=slots,
            runtime=StubRuntime(step_seconds=step_seconds, full=full),
            process=os.getpid(),
        )
        drivers.append(DriverShell(bus, subjects, worker, boot=lambda: secrets.token_hex(8)))
    running = [tasks.start(driver.run(), "stub driver") for driver in drivers]
    leaving = tasks.start(until_drained(bus, subjects, server), "leaving")
    leaving.add_done_callback(lambda done: ending.set())
    await ending.wait()
    leaving.cancel()
    for driver, task in reversed([*zip(drivers, running, strict=True)]):
        await driver.leave(task, "its node was told to end")
    await tasks.stop()
    await bus.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--cell", required=True)
    parser.add_argument("--server", default="stub")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--memory-mib", type=int, default=100)
    parser.add_argument("--directory", default="")
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    import uvloop

    uvloop.run(
        run_stub_node(
            connection(options.nats),
            options.cell,
            server=options.server,
            workers=options.workers,
            step_seconds=options.step_seconds,
            slots=options.slots,
            models=options.models,
            memory_mib=options.memory_mib,
            directory=options.directory,
            load_seconds=options.load_seconds,
            full=options.full,
        )
    )


if __name__ == "__main__":
    main()
