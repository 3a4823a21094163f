"""Processes of a simulated world: each has a connection and a main task; it may die at any moment, and comes back.

`die` is SIGKILL: what it sent and has not arrived vanishes, no call of it returns, and its tasks run no further than
their own cleaning up, of which nobody hears.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from bus.contract import BusError, Inbox, Log, Subscription
from bus.memory import MemoryBus
from chaos.faults import SeededFaults

Published = Callable[[str, str, bytes], None]


class WatchedBus:
    """A `bus.contract.Bus` that tells of everything its process publishes, as it does so."""

    def __init__(self, bus: MemoryBus, faults: SeededFaults, published: Published) -> None:
        self.memory = bus
        self.faults = faults
        self._published = published
        self._late: dict[asyncio.Task[None], None] = {}

    @property
    def ledger(self) -> Log:
        return self.memory.ledger

    @property
    def tokens(self) -> Log:
        return self.memory.tokens

    @property
    def snapshots(self) -> Log:
        return self.memory.snapshots

    @property
    def parts(self) -> Log:
        return self.memory.parts

    @property
    def connected(self) -> bool:
        return self.memory.connected

    @property
    def connections(self) -> int:
        return self.memory.connections

    def wall(self) -> int:
        return self.memory.wall()

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        if not self.memory.dead:
            self._published(self.memory.name, subject, payload)
        stalled = self.faults.stalled()
        if not stalled:
            await self.memory.publish(subject, payload, reply=reply, headers=headers)
            return

        async def late() -> None:
            await asyncio.sleep(stalled)
            await self.memory.publish(subject, payload, reply=reply, headers=headers)

        task = asyncio.get_running_loop().create_task(late(), name="late")
        self._late[task] = None
        task.add_done_callback(lambda done: self._late.pop(done, None))

    async def subscribe(self, subject: str, *, queue: str = "") -> Subscription:
        return await self.memory.subscribe(subject, queue=queue)

    async def request(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, timeout: float = 2.0
    ) -> Any:
        return await self.memory.request(subject, payload, headers=headers, timeout=timeout)

    def new_inbox(self) -> str:
        return self.memory.new_inbox()

    async def open_inbox(self, *, limit: int, limit_bytes: int) -> Inbox:
        return await self.memory.open_inbox(limit=limit, limit_bytes=limit_bytes)

    async def close(self) -> None:
        await self.memory.close()


Connect = Callable[[str], WatchedBus]
Main = Callable[[WatchedBus, str], Awaitable[None]]


class Process:
    """One process, over all its lives. `main` gets a bus and the name of this life."""

    def __init__(
        self,
        name: str,
        main: Main,
        connect: Connect,
        failed: Callable[[str, BaseException], None],
        note: Callable[[str], None],
    ) -> None:
        self.name = name
        self.lives = 0
        self.bus: WatchedBus | None = None
        self._main = main
        self._connect = connect
        self._failed = failed
        self._note = note
        self._task: asyncio.Task[None] | None = None
        self._dying: list[asyncio.Task[None]] = []
        self._restart: asyncio.TimerHandle | None = None

    @property
    def up(self) -> bool:
        return self.bus is not None

    def start(self) -> None:
        """Begin a life, unless one is under way."""
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self.up:
            return
        self.lives += 1
        self.bus = self._connect(self.name)
        life = f"{self.name.replace('/', '-')}.{self.lives}"
        self._task = asyncio.get_running_loop().create_task(self._live(self.bus, life), name=life)

    async def _live(self, bus: WatchedBus, life: str) -> None:
        try:
            await self._main(bus, life)
            self._note(f"{life} ended")
        except BusError as error:
            self._note(f"{life} ended: {type(error).__name__}: {error}")
        except Exception as error:
            self._failed(life, error)
        if self.bus is bus:
            self.die(0.2)

    def die(self, back_after: float) -> None:
        """End this life now; the next one begins after some seconds."""
        if self.bus is None or self._task is None:
            return
        self.bus.memory.server.kill(self.bus.memory)
        self._task.cancel()
        self._dying = [task for task in self._dying if not task.done()]
        self._dying.append(self._task)
        self.bus = self._task = None
        self._restart = asyncio.get_running_loop().call_later(back_after, self.start)

    async def stop(self) -> None:
        """End for good, and clean up what earlier lives left."""
        self.die(1e9)
        if self._restart is not None:
            self._restart.cancel()
        for task in self._dying:
            for _ in range(100):
                if task.done():
                    break
                task.cancel()
                await asyncio.sleep(0)
