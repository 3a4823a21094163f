"""The process of one worker: forked by its node, one device, one connection, one driver."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import torch
import uvloop

from actors.driver import DriverShell
from actors.local_runtime import LocalRuntime
from actors.worker_driver import WorkerDriver
from actors.worker_settings import Beat, WorkerSettings
from bus.contract import BusError
from bus.jetstream import JetStreamBus
from bus.lifeline import end_with_parent
from bus.logs import configure_logs

SAY_SECONDS = 0.1
"""How often the node hears of the epoch: what dies before it was told counts as silent instead."""

logger = logging.getLogger("longshore.worker")


def run_worker(settings: WorkerSettings, beat: Beat) -> None:
    """The whole life of the process. Ends with exit code 0 on SIGTERM, and dies with the process that forked it."""
    end_with_parent()
    configure_logs(as_json=settings.log_json, process=f"gpu/{settings.server}/{settings.index}")
    torch.set_num_threads(settings.threads)
    # What was imported stays: a full collection (at every detach) then looks at the models alone. It holds the
    # interpreter for most of a second otherwise, and a worker that sends no heartbeat for a second is lost.
    gc.freeze()
    try:
        uvloop.run(serve_worker(settings, beat))
    except BusError as error:
        logger.error("worker %s/%d ends: %s", settings.server, settings.index, error)
        _leave(1)
    _leave(0)


async def serve_worker(settings: WorkerSettings, beat: Beat) -> None:
    """Run the driver until SIGTERM. Raises `BusError` where there is no server."""
    loop = asyncio.get_running_loop()
    name = f"gpu/{settings.server}/{settings.index}"

    def give_up() -> None:
        logger.error("%s hangs in a step or an attach and ends, to be started again", name)
        _leave(1)

    runtime = LocalRuntime(
        Path(settings.models),
        device=settings.device,
        dram=Path(settings.dram) if settings.dram else None,
        arrivals=Path(settings.arrivals) if settings.arrivals else None,
        give_up=give_up,
    )
    bus = await JetStreamBus.connect(settings.nats, settings.cell, name=f"longshore {name}")
    driver = WorkerDriver(
        bus,
        bus.subjects,
        settings.server,
        settings.index,
        memory_bytes=settings.memory_bytes,
        max_slots=settings.max_slots,
        runtime=runtime,
        process=os.getpid(),
        catch_up=settings.catch_up,
    )
    shell = DriverShell(bus, bus.subjects, driver, boot=lambda: secrets.token_hex(8))
    running = loop.create_task(shell.run())
    saying = loop.create_task(_say(beat, bus, shell))
    preparing = loop.create_task(runtime.keep_prepared())
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # of the terminal: the node ends its workers itself
    try:
        ending = loop.create_task(told.wait())
        await asyncio.wait([running, ending], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        await shell.leave(running, "its process was told to end")
        beat[1] = 0
    finally:
        saying.cancel()
        preparing.cancel()
        runtime.close()
        await bus.close()


async def _say(beat: Beat, bus: JetStreamBus, shell: DriverShell) -> None:
    """Tell the node that this worker serves, for as long as it does, and in which epoch."""
    while True:
        beat[1] = shell.epoch
        if shell.epoch and bus.connected:
            beat[0] = time.monotonic()
        await asyncio.sleep(SAY_SECONDS)


def _leave(code: int) -> None:
    """End without waiting for a step that still computes in its thread."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
