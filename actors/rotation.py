"""A control has a generation made when the ledger is filled so far: `longshore ledger rotate` in a process of its own.

Recording and verifying take seconds to minutes of one core; a control that did so itself would stand still. Only the
control that leads does it. Two at once would do no harm.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import structlog

from actors.control import Control
from bus.credentials import ConnectionOptions
from bus.lifeline import ending_with_parent

LOOK_SECONDS = 5.0
AGAIN_SECONDS = 60.0
"""Between two attempts: what held the last one back may take a while."""
LEAST_PERCENT = 10
"""Of the ledger; for less a recording is not worth its while."""

log = structlog.get_logger("longshore.rotation")


async def rotate_when_due(
    control: Control, nats: ConnectionOptions, cell: str, folder: Path, percent: int, *, keep: float
) -> None:
    """For ever. Whatever goes wrong is logged and tried again; the ledger is whole in any case."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        leads = control.replica is not None and control.replica.leading
        if not leads or control.intake.filled_percent < percent:
            continue
        control.want_snapshot()
        await _rotate(nats, cell, folder, keep)
        await asyncio.sleep(AGAIN_SECONDS)


async def _rotate(nats: ConnectionOptions, cell: str, folder: Path, keep: float) -> None:
    arguments = ["ledger", "rotate", "--to", str(folder), "--keep", f"{keep:g}", "--least", str(LEAST_PERCENT)]
    ending = ending_with_parent()

    def prepare() -> None:
        os.nice(10)
        if ending is not None:
            ending()

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bus.main", *arguments, "--cell", cell, "--nats", nats.url,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        preexec_fn=prepare,
        env={**os.environ, **nats.variables()},
    )  # fmt: skip
    try:
        out, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    lines = out.decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "it said nothing"
    if process.returncode == 0:
        log.info("generation made", said=said)
    else:
        log.warning("no generation made", code=process.returncode, said=said)
