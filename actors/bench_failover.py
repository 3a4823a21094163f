"""`longshore bench failover`: what requests see of a death: of the control that publishes, and of a stream's leader.

Real processes: NATS servers, two controls, one node with stub engines, and this process as the client. Requests are
asked at a steady rate through the client library, before, during and after the SIGKILL. The gap of a request is the
longest time that it waits for its first chunk or for the next one; the gap of a round is that of the request that
waits longest, among all that were under way at the kill or were asked later.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from actors.children import Child
from actors.stub_node import MODEL
from actors.up import cell_status
from bus.answer import RequestFailed
from bus.client import Client
from bus.contract import Subscription
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.server import EmbeddedServer
from bus.server_cluster import EmbeddedCluster
from bus.subjects import Subjects

CELL = "bench"
WARM_SECONDS = 2.0
CONTROL_SECONDS = 4.0
LEADER_SECONDS = 14.0
"""How long requests are asked after a kill: longer than what is to be seen."""
UP_SECONDS = 60.0
MAX_TOKENS = 20
STEP_SECONDS = 0.01


@dataclass
class Load:
    """Requests at a steady rate; when each was asked, how long it waited at most, how it ended."""

    client: Client
    rate: float
    gaps: list[tuple[float, float, float]] = field(default_factory=list)
    """(asked, ended, longest wait) of each finished request, in seconds of `time.perf_counter`."""
    failed: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def ask_for(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        due = time.perf_counter()
        while due < until:
            self._tasks.append(asyncio.ensure_future(self._ask(len(self._tasks))))
            due += 1 / self.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks)

    async def _ask(self, number: int) -> None:
        asked = last = time.perf_counter()
        longest = 0.0
        answer = self.client.infer(MODEL, prompt=f"prompt {number}", max_tokens=MAX_TOKENS, temperature=0)
        try:
            async for _ in answer:
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
        except RequestFailed as failure:
            self.failed.append(f"{failure.code}: {failure.message}")
            return
        self.gaps.append((asked, last, longest))

    def gap_ms(self, since: float) -> float:
        """The longest wait of a request that was under way at `since` or asked later."""
        return round(max((gap for _, ended, gap in self.gaps if ended >= since), default=0.0) * 1000, 1)

    def usual_ms(self, before: float) -> float:
        """Median of the longest waits of requests that had ended `before`."""
        return round(statistics.median([gap for _, ended, gap in self.gaps if ended < before] or [0.0]) * 1000, 1)


class FailoverCell:
    """Two controls and a stub node at some addresses."""

    def __init__(self, folder: Path, url: str, replicas: int) -> None:
        self._folder = folder
        self._common = ["--nats", url, "--cell", CELL]
        self._replicas = replicas
        self._started = 0
        self.controls: list[Child] = []
        self.node = Child(
            "node",
            [*self._common, "--step-seconds", str(STEP_SECONDS)],
            folder / "node.log",
            module="actors.stub_node",
        )

    async def add_control(self) -> None:
        self._started += 1
        name = f"control-{self._started}"
        arguments = ["control", *self._common, "--replicas", str(self._replicas)]
        child = Child(name, arguments, self._folder / f"{name}.log")
        self.controls.append(child)
        await child.start()

    async def kill_publisher(self, bus: JetStreamBus) -> float:
        """SIGKILL for the control that published last; when."""
        subjects = Subjects(CELL)
        last = (await bus.ledger.usage()).last_sequence
        reader = await bus.ledger.read([subjects.said_prefix + ">"], start=max(1, last - 50))
        publisher = (await reader.batch())[-1].publisher
        await reader.close()
        victim = next((child for child in self.controls if publisher in child.log.read_text()), None)
        if victim is None:
            raise UserError(f"the bench found no control that calls itself {publisher}")
        at = time.perf_counter()
        victim.signal(signal.SIGKILL)
        await victim.wait()
        self.controls.remove(victim)
        return at

    async def up(self, bus: JetStreamBus) -> None:
        async with asyncio.timeout(UP_SECONDS):
            while True:
                status = await cell_status(bus, CELL)
                if status is not None and status["workers"] and MODEL in status["models"]:
                    return
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        for child in (self.node, *self.controls):
            await child.stop()


@asynccontextmanager
async def _cell(folder: Path, bus: JetStreamBus, url: str, replicas: int) -> AsyncIterator[FailoverCell]:
    cell = FailoverCell(folder, url, replicas)
    try:
        await cell.add_control()
        await cell.add_control()
        await cell.node.start()
        try:
            await cell.up(bus)
        except TimeoutError:
            raise UserError(
                f"the bench's cell did not come up; the end of its log:\n{cell.controls[0].last_words()}"
            ) from None
        yield cell
    finally:
        await cell.stop()


async def control_killed(*, rounds: int, rate: float, fsync: bool) -> dict[str, Any]:
    """One server; the publishing control is killed, and another one takes its place for the next round."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as name:
        folder = Path(name)
        server = EmbeddedServer(folder / "nats", fsync_always=fsync)
        await server.start_async()
        bus = await JetStreamBus.connect(server.url, CELL, name="longshore-bench", create=True)
        try:
            async with _cell(folder, bus, server.url, 1) as cell:
                for _ in range(rounds):
                    load = Load(Client(bus, CELL, name="bench"), rate)
                    await load.ask_for(WARM_SECONDS)
                    killed = await cell.kill_publisher(bus)
                    await load.ask_for(CONTROL_SECONDS)
                    await load.ended()
                    found.append(_round(load, killed))
                    await cell.add_control()
        finally:
            await bus.close()
            await asyncio.to_thread(server.stop)
    return _summary(found, reach_ms=1000)


async def leader_killed(*, rounds: int, rate: float, fsync: bool) -> dict[str, Any]:
    """Three servers, three replicas; the server that leads the ledger is killed, and comes back for the next round."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as name:
        folder = Path(name)
        async with EmbeddedCluster(folder / "nats", fsync_always=fsync) as cluster:
            bus = await JetStreamBus.connect(cluster.url, CELL, name="longshore-bench", create=True, replicas=3)
            stream = bus.subjects.ledger_stream
            try:
                async with _cell(folder, bus, cluster.url, 3) as cell:
                    for _ in range(rounds):
                        await cell.up(bus)
                        load = Load(Client(bus, CELL, name="bench"), rate)
                        await load.ask_for(WARM_SECONDS)
                        leader = await cluster.leader(bus, stream)
                        elected: dict[str, float] = {}
                        told = await bus.subscribe("$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.*")
                        elections = asyncio.ensure_future(_elections(told, elected))
                        killed = time.perf_counter()
                        leader.kill()
                        await load.ask_for(LEADER_SECONDS)
                        await load.ended()
                        elections.cancel()
                        await told.close()
                        times = {one: round((at - killed) * 1000) for one, at in elected.items()}
                        found.append(_round(load, killed) | {"elected_ms": times})
                        await leader.start_async()
                        await cluster.followed(bus, stream)
            finally:
                await bus.close()
    return _summary(found, reach_ms=8000)


async def _elections(told: Subscription, elected: dict[str, float]) -> None:
    """Note when each stream of the cell gets a leader again."""
    while True:
        delivery = await told.next()
        with suppress(msgspec.DecodeError, KeyError, TypeError):
            elected[msgspec.json.decode(delivery.payload)["stream"]] = time.perf_counter()


def _round(load: Load, killed: float) -> dict[str, Any]:
    return {
        "gap_ms": load.gap_ms(killed),
        "usual_ms": load.usual_ms(killed),
        "requests": len(load.gaps) + len(load.failed),
        "failed": len(load.failed),
        "first_failure": load.failed[0] if load.failed else "",
    }


def _summary(rounds: list[dict[str, Any]], *, reach_ms: int) -> dict[str, Any]:
    gaps = [one["gap_ms"] for one in rounds]
    return {
        "gap_ms": {"median": statistics.median(gaps), "max": max(gaps)},
        "reach_ms": reach_ms,
        "reached": max(gaps) <= reach_ms,
        "failed": sum(one["failed"] for one in rounds),
        "rounds": rounds,
    }
