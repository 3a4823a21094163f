"""`longshore bench restart`: how long a control takes to start behind a long ledger.

The ledger is made here, on a real server: a cell in this process takes the facts as they stand there, its outputs are
appended, scripted drivers answer every effect. So facts, outputs and their times are those of a busy cell without
models. Then real control processes start: from the ledger's beginning, which ends with a snapshot, and from that
snapshot with as many facts behind it as may come before the next one.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any, cast

import msgspec

from actors.bench_replay import GIB, MODELS, SERVERS, SLOTS, WORKERS, scripted_answer
from actors.cell import DRIVER, Cell
from actors.cell_snapshots import BYTES_PER_FACT, SNAPSHOT_FACTS
from actors.children import Child
from actors.forked_capture import capture_in_a_copy
from actors.placement_state import PlacementState
from actors.up import cell_status
from bus.contract import Reader
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import (
    FactEnvelope,
    Generation,
    HeldModel,
    Message,
    ModelCard,
    RequestAccepted,
    StoreStarted,
    WorkerStarted,
    decode_said,
    decode_said_body,
    encode,
    extend_chain,
    kind_of,
    request_id,
)
from bus.server import EmbeddedServer
from bus.snapshots import SnapshotStore
from bus.subjects import Subjects

CELL = "bench"
AT_ONCE = 64
"""Requests that arrive together."""
START_SECONDS = 600.0
LIMIT_BYTES = 8 * GIB


class BusyLedger:
    """Fills the ledger of a real server as a busy cell would. `cell` is the state at its end."""

    def __init__(self, bus: JetStreamBus, reader: Reader) -> None:
        self.cell = Cell(CELL)
        self.facts = 0
        self._bus = bus
        self._reader = reader
        self._subjects = Subjects(CELL)
        self._epochs: dict[str, tuple[int, str, int, str]] = {}
        self._effects: deque[tuple[str, int, Message]] = deque()
        self._requests = 0
        self.messages = 0

    @classmethod
    async def open(cls, bus: JetStreamBus) -> BusyLedger:
        ledger = cls(bus, await bus.ledger.read([Subjects(CELL).facts()]))
        cards = [
            ModelCard(f"model-{i}", f"{i:064x}", 4 * GIB, 4096, 131_072, 32_000, "LlamaForCausalLM")
            for i in range(MODELS)
        ]
        for server in range(1, SERVERS + 1):
            held = tuple(HeldModel(card) for card in cards)
            await ledger._start(f"store/s{server}", StoreStarted(f"s{server}", 24 * GIB, held))
            for index in range(WORKERS):
                await ledger._start(f"gpu/s{server}/{index}", WorkerStarted(f"s{server}", index, 12 * GIB, SLOTS))
        return ledger

    async def fill(self, messages: int) -> None:
        """At least so many more messages, with every effect answered at the end."""
        until = self.messages + messages
        while self.messages < until or self._effects:
            facts = [self._answer(*effect) for effect in self._effects]
            self._effects.clear()
            if self.messages < until:
                facts += [self._request() for _ in range(AT_ONCE - self._waiting())]
            await self._take(facts)

    def _waiting(self) -> int:
        placement = self.cell.actors.get("placement")
        return min(AT_ONCE, cast(PlacementState, placement.state).waiting) if placement is not None else 0

    def _request(self) -> tuple[str, bytes]:
        self._requests += 1
        number = self._requests
        # Bursts: a model is asked for several times in a row, so most starts are running instances, as in life.
        model = f"model-{(number // 400 * 7) % MODELS}"
        generation = Generation(64, prompt="A crane moves what others cannot. " * 8, seed=number)
        request = RequestAccepted(request_id(CELL, str(number)), CELL, str(number), model, generation)
        return self._fact("requests", request, FactEnvelope("intake", msgspec.Raw(encode(request))))

    def _answer(self, driver: str, number: int, effect: Message) -> tuple[str, bytes]:
        message = scripted_answer(effect)
        body = encode(message)
        epoch, boot, count, chain = self._epochs[driver]
        chain = extend_chain(chain, body)
        self._epochs[driver] = (epoch, boot, count + 1, chain)
        return self._fact(
            driver, message, FactEnvelope(driver, msgspec.Raw(body), epoch, boot, count + 1, number, chain)
        )

    def _fact(self, actor: str, message: Message, envelope: FactEnvelope) -> tuple[str, bytes]:
        return self._subjects.fact(actor, kind_of(message)), encode(envelope)

    async def _start(self, driver: str, message: Message) -> None:
        boot = f"boot-{driver}"
        envelope = FactEnvelope(driver, msgspec.Raw(encode(message)), boot=boot)
        await self._take([self._fact(driver, message, envelope)])
        self._epochs[driver] = (self.cell.position, boot, 0, boot)

    async def _take(self, facts: list[tuple[str, bytes]]) -> None:
        """Append facts, take them as they stand in the ledger, append what that leads to."""
        sent = [self._bus.ledger.send(subject, payload, publisher=CELL) for subject, payload in facts]
        read = 0
        while read < len(facts):
            for record in await self._reader.batch():
                read += 1
                for step in self.cell.take(record):
                    for said in step.said:
                        sent.append(self._bus.ledger.send(said.subject, said.payload, publisher=CELL))
                        if said.receiver.startswith(DRIVER):
                            envelope = decode_said(said.payload)
                            effect = decode_said_body(envelope.body)
                            self._effects.append((said.receiver[len(DRIVER) :], envelope.number, effect))
        await asyncio.gather(*sent)
        self.facts += len(facts)
        self.messages += len(sent)


class _Controls:
    """Starts control processes, one at a time, and says how long each took until it answered as live."""

    def __init__(self, bus: JetStreamBus, url: str, folder: Path) -> None:
        self._bus = bus
        self._url = url
        self._folder = folder
        self._number = 0
        self._child: Child | None = None

    async def start(self, cell: str) -> float:
        self._number += 1
        arguments = ["control", "--nats", self._url, "--cell", cell, "--silence", "3600"]
        child = self._child = Child(f"control-{self._number}", arguments, self._folder / f"{self._number}.log")
        began = time.perf_counter()
        await child.start()
        while await cell_status(self._bus, cell) is None:
            await asyncio.sleep(0.005)
            if child.process is not None and child.process.returncode is not None:
                raise UserError(f"the bench's control ended: {child.last_words()}")
            if time.perf_counter() - began > START_SECONDS:
                raise UserError(f"the bench's control was not live after {START_SECONDS:g} s: {child.last_words()}")
        return time.perf_counter() - began

    async def kill(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)
            await self._child.wait()
            self._child = None


async def bench_restart(messages: int, rounds: int, say: Any) -> dict[str, Any]:
    """Seconds from the start of a control's process until it answers as live; the median of `rounds`."""
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as name:
        folder = Path(name)
        async with EmbeddedServer(folder / "nats") as server:
            bus = await JetStreamBus.connect(server.url, CELL, create=True, ledger_limit_bytes=LIMIT_BYTES)
            controls = _Controls(bus, server.url, folder)
            try:
                return await _measure(bus, controls, messages, rounds, say)
            finally:
                await controls.kill()
                await bus.close()


async def _longest_pause(cell: Cell) -> tuple[float, list[bytes]]:
    """How long a control can do nothing else while its state is captured."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0.01)
    longest = 0.0
    parts = await capture_in_a_copy(cell)
    await asyncio.sleep(0.01)
    ticking.cancel()
    return longest, parts


async def _measure(bus: JetStreamBus, controls: _Controls, messages: int, rounds: int, say: Any) -> dict[str, Any]:
    empty = await controls.start("empty")
    await controls.kill()
    say(f"filling the ledger with {messages:,} messages")
    ledger = await BusyLedger.open(bus)
    await ledger.fill(messages)
    filled = await bus.ledger.usage()
    say("starting a control from the ledger's beginning")
    beginning = await controls.start(CELL)
    store = SnapshotStore(bus.snapshots, Subjects(CELL))
    async with asyncio.timeout(START_SECONDS):
        while True:
            found = await store.manifests()
            if found and found[0].facts >= ledger.cell.facts:
                break
            await asyncio.sleep(0.1)
    await controls.kill()
    snapshot = found[0]
    # As many facts as come before a control that leads takes the next one.
    until = snapshot.facts + max(SNAPSHOT_FACTS, snapshot.bytes // BYTES_PER_FACT)
    say(f"adding {until - ledger.cell.facts:,} facts behind the snapshot, and what they lead to")
    while ledger.cell.facts < until:
        await ledger.fill(1000)
    usage = await bus.ledger.usage()
    pause, parts = await _longest_pause(ledger.cell)
    say("starting controls from the snapshot")
    starts = []
    for _ in range(rounds):
        starts.append(await controls.start(CELL))
        await controls.kill()
    seconds = statistics.median(starts)
    return {
        "messages": filled.last_sequence,
        "tail_messages": usage.last_sequence - snapshot.position,
        "ledger_bytes": usage.stored_bytes,
        "facts": ledger.cell.facts,
        "snapshot_bytes": snapshot.bytes,
        "capture_pause_ms": round(1000 * pause, 1),
        "captured_bytes": sum(map(len, parts)),
        "empty_start_seconds": round(empty, 2),
        "from_beginning_seconds": round(beginning, 2),
        "start_seconds": round(seconds, 2),
        "min_start_seconds": round(min(starts), 2),
        "max_start_seconds": round(max(starts), 2),
        "rounds": rounds,
    }
