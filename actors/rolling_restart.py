"""A restart of every server of a busy cell, one after the other, that no request notices.

Per server: drained (its answers move elsewhere), left, started again by whatever keeps it (systemd, compose,
`longshore up`), and up: its store and as many workers as before have new epochs. Only then the next one. Wherever this
ends early, the server that it was at is in service: taken back if it had not left yet, and otherwise by its next start.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.draining import order, until_told
from actors.up import cell_status
from bus.contract import BusError
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import DrainRequested, MoveEnded, decode_said, decode_said_body

LOOK_SECONDS = 0.1
UNDO_SECONDS = 5.0
MOVES_SECONDS = 0.5
"""For the ledger to tell of moves: it says nothing where nothing has moved."""


class Stopped(Exception):
    """It does not go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long moving away from a server may take, and how long until it is back, in milliseconds."""

    deadline_ms: int
    return_ms: int


async def servers_to_restart(bus: JetStreamBus, cell: str, wanted: list[str]) -> list[str]:
    """All that are up, by name, or those that are wanted, in that order. Raises `UserError` or `Stopped`."""
    status = await _status(bus, cell)
    up = {name: True for name, server in status["servers"].items() if server["up"]}
    for name in wanted:
        if name not in up:
            state = "is not up" if name in status["servers"] else "is not known here"
            raise UserError(f"--server {name}: it {state}; up are {', '.join(up) or 'none'}")
    if not up:
        raise Stopped(f"no server of cell {cell!r} is up: `longshore status` shows the cell")
    return list(dict.fromkeys(wanted)) or sorted(up)


async def restart_server(
    bus: JetStreamBus, cell: str, server: str, limits: Limits, say: Callable[[str], None]
) -> dict[str, Any]:
    """Drain it, wait until it is back; what that took. Raises `Stopped`."""
    loop = asyncio.get_running_loop()
    before = _epochs(await _status(bus, cell), server)
    if not before:
        raise Stopped(f"{server} is not up any more: start its node, `longshore status` shows when it is back")
    say("its answers move away")
    began = loop.time()
    try:
        # Within: an order that is interrupted may have been stored.
        fact = await order(bus, bus.subjects, DrainRequested(server, limits.deadline_ms, leave=True))
        told = await until_told(bus, bus.subjects, server, fact, limits.deadline_ms)
    except BaseException as error:
        await asyncio.shield(_take_back(bus, server))
        if isinstance(error, TimeoutError):
            sentence = f"no control said that {server} is drained, so it was taken back: `longshore status` shows why"
            raise Stopped(sentence) from None
        raise
    if told.reason:
        raise Stopped(f"{server} was not drained: {told.reason}")
    drained = loop.time()
    say("it has left and is to start again" if not told.left else f"it has left {told.left} answers to recovery")
    await _until_back(bus, cell, server, before, limits)
    moved = await _moved(bus, server, fact)
    return {
        "server": server,
        "moved": moved,
        "left": told.left,
        "drained_seconds": round(drained - began, 2),
        "ready_seconds": round(loop.time() - drained, 2),
    }


async def _until_back(bus: JetStreamBus, cell: str, server: str, before: dict[str, int], limits: Limits) -> None:
    """Until its store and as many workers as before have epochs that are new."""
    missing = list(before)
    try:
        async with asyncio.timeout(limits.return_ms / 1000):
            while missing:
                await asyncio.sleep(LOOK_SECONDS)
                status = await cell_status(bus, cell)
                if status is not None:
                    now = _epochs(status, server)
                    missing = [name for name, epoch in before.items() if now.get(name, 0) <= epoch]
    except TimeoutError:
        raise Stopped(
            f"{server} has left and is not back after {limits.return_ms / 1000:g} s ({', '.join(missing)} missing): "
            "look at the log of its node and start it (systemctl start longshore-node, docker compose start node); "
            "it is in service once it is up, then go on with the servers that are left"
        ) from None


async def _take_back(bus: JetStreamBus, server: str) -> None:
    with contextlib.suppress(BusError, TimeoutError):
        async with asyncio.timeout(UNDO_SECONDS):
            await order(bus, bus.subjects, DrainRequested(server, undo=True))


async def _moved(bus: JetStreamBus, server: str, fact: int) -> int:
    """How many answers have moved away from this server since that fact."""
    last = (await bus.ledger.usage()).last_sequence
    reader = await bus.ledger.read([bus.subjects.said("migration", "record", "move.ended")], start=fact)
    moved: set[tuple[str, int]] = set()
    try:
        async with asyncio.timeout(MOVES_SECONDS):
            while True:
                for record in await reader.batch():
                    ended = decode_said_body(decode_said(record.payload).body)
                    if isinstance(ended, MoveEnded) and ended.moved and ended.source.startswith(f"gpu/{server}/"):
                        moved.add((ended.request, ended.attempt))
                    if record.sequence >= last or not record.pending:
                        return len(moved)
    except TimeoutError:  # nothing has moved at all
        return len(moved)
    finally:
        await reader.close()


async def _status(bus: JetStreamBus, cell: str) -> dict[str, Any]:
    status = await cell_status(bus, cell)
    if status is None:
        raise Stopped(f"no control of cell {cell!r} answers: start one with `longshore control`")
    return status


def _epochs(status: dict[str, Any], server: str) -> dict[str, int]:
    """Of its store and its workers; empty where it is not up."""
    found = status["servers"].get(server)
    if found is None or not found["up"]:
        return {}
    workers = {name: one["epoch"] for name, one in status["workers"].items() if one["server"] == server}
    return {f"store/{server}": found["epoch"], **workers}
