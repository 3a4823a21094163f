"""`longshore bench recovery`: what readers see when a worker is killed under load.

Real processes: nats-server, one control, nodes with workers of one thread each, and a sample model in float64, whose
answers do not depend on what is computed beside them. Readers ask one answer after the other through the client
library; once all of them read, the worker with the most of them gets SIGKILL. The gap of a kill is the longest time in
which any reader, of an answer under way or of one asked later, waited for a chunk. Its phases are those of the answer
that waited longest of all that the dead worker held, by the ledger's and the pages' own times:

    killed ─▶ lost ─▶ sealed ─▶ (attached) ─▶ placed and told to start ─▶ first page ─▶ its chunk

Every answer is compared with the one that the same prompt had before the first kill.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from actors.up import CellProcesses, UpOptions, cell_status
from actors.watch import SILENCE_SECONDS
from bus.answer import RequestFailed
from bus.client import Client
from bus.contract import Record
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import (
    DriverLost,
    FactEnvelope,
    Message,
    ModelAttached,
    RequestPlaced,
    RequestsConfigured,
    SealTokens,
    SequencesSealed,
    StartSequence,
    WorkerStarted,
    decode_fact,
    decode_fact_body,
    decode_said,
    decode_said_body,
    encode,
    kind_of,
)
from bus.pages import Page, decode_page
from bus.subjects import FactSubject, Subjects, escape_model

CELL = "bench"
MODEL = "llama"
CONTEXT = 2048
NODES, WORKERS = 2, 2
SLOTS = 4
PROMPT_TOKENS = 64
DEATHS_LIMIT = 1_000_000
"""Kills are what is measured: no request of the bench is a dead letter because of them."""
KILL_SECONDS = 60.0
FACTS = (DriverLost, WorkerStarted, SequencesSealed, ModelAttached)
SAID = (SealTokens, RequestPlaced, StartSequence)
PHASES = ("silence until lost", "seal", "attach", "placed anew", "prefill", "first new chunk")
_MILLION = 1_000_000


@dataclass
class Asked:
    """One answer as its reader sees it; times are nanoseconds of the wall clock, the first that of the question."""

    request: str
    times: list[int]
    positions: list[int] = field(default_factory=list)
    """How many positions there were after each chunk."""
    tokens: list[int] = field(default_factory=list)
    over: bool = False


@dataclass
class Counts:
    """What must not happen, and how many answers it did not happen to."""

    finished: int = 0
    unfinished: int = 0
    lost: int = 0
    changed: int = 0
    repeated: int = 0
    failures: list[str] = field(default_factory=list)


class Reader:
    """Reads answers to one prompt, one after the other, until it is told to end."""

    def __init__(self, client: Client, prompt: list[int], max_tokens: int, counts: Counts) -> None:
        self._client, self._prompt, self._max, self._counts = client, prompt, max_tokens, counts
        self.expected: list[int] = []
        self.asked: list[Asked] = []
        self.moved = asyncio.Event()

    @property
    def current(self) -> Asked | None:
        return self.asked[-1] if self.asked and not self.asked[-1].over else None

    async def one(self) -> Asked:
        answer = self._client.infer(
            MODEL, tokens=self._prompt, max_tokens=self._max, min_tokens=self._max, temperature=0, seed=1
        )
        asked = Asked(answer.request_id, [time.time_ns()])
        self.asked.append(asked)
        counts = self._counts
        try:
            async for chunk in answer:
                have = len(asked.tokens)
                counts.lost += max(0, chunk.position - have)
                counts.repeated += max(0, have - chunk.position)
                asked.tokens += chunk.tokens
                if chunk.tokens:
                    asked.times.append(time.time_ns())
                    asked.positions.append(len(asked.tokens))
                self.moved.set()
            counts.finished += 1
            counts.lost += max(0, self._max - len(asked.tokens))
        except RequestFailed as failure:
            counts.unfinished += 1
            counts.failures.append(f"{failure.code}: {failure.message}")
        finally:
            asked.over = True
            self.moved.set()
        pairs = zip(asked.tokens, self.expected, strict=False)
        counts.changed += sum(one != other for one, other in pairs)
        return asked

    async def read(self, ending: asyncio.Event) -> None:
        while not ending.is_set():
            await self.one()
            del self.asked[:-3]

    async def warm(self) -> None:
        self.expected = (await self.one()).tokens


class Followed:
    """What the ledger and the pages say, as it comes: (time in nanoseconds, who, what)."""

    def __init__(self, bus: JetStreamBus) -> None:
        self._bus, self._subjects = bus, Subjects(CELL)
        self.said: list[tuple[int, str, Message]] = []
        self.pages: dict[tuple[str, int], int] = {}
        """When the first page of each attempt was durable."""
        self.moved = asyncio.Event()

    async def ledger(self) -> None:
        subjects = self._subjects
        filters = [subjects.fact("*", kind_of(kind)) for kind in FACTS]
        filters += [subjects.said("*", "*", kind_of(kind)) for kind in SAID]
        reader = await self._bus.ledger.read(filters, start=(await self._bus.ledger.usage()).last_sequence + 1)
        try:
            while True:
                self.said += [self._read(record) for record in await reader.batch()]
                self.moved.set()
        finally:
            await reader.close()

    def _read(self, record: Record) -> tuple[int, str, Message]:
        subject = self._subjects.parse(record.subject)
        if isinstance(subject, FactSubject):
            return record.timestamp, subject.actor, decode_fact_body(decode_fact(record.payload).body)
        assert subject is not None
        return record.timestamp, subject.receiver, decode_said_body(decode_said(record.payload).body)

    async def tokens(self) -> None:
        start = (await self._bus.tokens.usage()).last_sequence + 1
        reader = await self._bus.tokens.read([self._subjects.tokens_filter], start=start)
        try:
            while True:
                for record in await reader.batch():
                    page = decode_page(record.payload)
                    for one in page.sequences if isinstance(page, Page) else ():
                        self.pages.setdefault((one.request, one.attempt), record.timestamp)
        finally:
            await reader.close()

    async def first(self, wanted: Callable[[int, str, Message], bool]) -> tuple[int, str, Message]:
        """The first that is wanted since the last `forget`."""
        at = 0
        while True:
            for found in self.said[at:]:
                at += 1
                if wanted(*found):
                    return found
            self.moved.clear()
            await self.moved.wait()

    def forget(self) -> None:
        self.said.clear()
        self.pages.clear()


async def bench_recovery(
    kills: int, readers: int, max_tokens: int, parameters: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """`say` is told how far it is."""
    from loaders import pack_checkpoint
    from models.sample import make_sample

    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as name:
        folder = Path(name)
        say("making the model")
        sample = await asyncio.to_thread(
            make_sample,
            folder / "sample",
            arch="llama",
            parameters=parameters,
            seed=7,
            dtype="float64",
            context=CONTEXT,
        )
        (folder / "models").mkdir()
        await asyncio.to_thread(pack_checkpoint, folder / "sample", folder / "models" / escape_model(MODEL))
        node = ("--threads", "1", "--context", str(CONTEXT))
        options = UpOptions(
            data=folder, cell=CELL, nodes=NODES, workers=WORKERS, memory="1GB", dram="1GB", slots=SLOTS,
            node_arguments=node,
        )  # fmt: skip
        async with CellProcesses(options) as cell:
            bus = await JetStreamBus.connect(cell.url, CELL, name="longshore-bench", create=True)
            try:
                say("starting the cell")
                await cell.ready(bus)
                bench = _Bench(bus, readers, max_tokens, sample.vocabulary)
                return {"parameters": sample.parameters, "readers": readers} | await bench.run(kills, say)
            finally:
                await bus.close()


class _Bench:
    def __init__(self, bus: JetStreamBus, readers: int, max_tokens: int, vocabulary: int) -> None:
        self._bus = bus
        self._counts = Counts()
        random = Random(7)
        prompts = [[random.randrange(8, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(readers)]
        client = Client(bus, CELL, name="bench")
        self._readers = [Reader(client, prompt, max_tokens, self._counts) for prompt in prompts]
        self._followed = Followed(bus)

    async def run(self, kills: int, say: Callable[[str], None]) -> dict[str, Any]:
        await self._allow_deaths()
        say("reading the undisturbed answers")
        await asyncio.gather(*(reader.warm() for reader in self._readers))
        ending = asyncio.Event()
        tasks = [asyncio.ensure_future(work) for work in (self._followed.ledger(), self._followed.tokens())]
        reading = [asyncio.ensure_future(reader.read(ending)) for reader in self._readers]
        found: list[dict[str, Any]] = []
        began = time.perf_counter()
        try:
            for number in range(1, kills + 1):
                try:
                    async with asyncio.timeout(KILL_SECONDS):
                        found.append(await self._kill())
                except TimeoutError:
                    raise UserError(f"kill {number} of the bench was not recovered in {KILL_SECONDS:g} s") from None
                say(f"kill {number} of {kills}: a gap of {found[-1]['gap_ms']:.0f} ms")
            seconds = time.perf_counter() - began
            ending.set()
            await asyncio.gather(*reading)
        finally:
            for task in (*tasks, *reading):
                task.cancel()
            await asyncio.gather(*tasks, *reading, return_exceptions=True)
        return _summed(found, self._counts, seconds)

    async def _allow_deaths(self) -> None:
        message = RequestsConfigured(deaths_limit=DEATHS_LIMIT)
        payload = encode(FactEnvelope("intake", msgspec.Raw(encode(message))))
        await self._bus.ledger.append(self._bus.subjects.fact("requests", kind_of(message)), payload)

    async def _kill(self) -> dict[str, Any]:
        victim, process, epoch = await self._choose()
        self._followed.forget()
        killed = time.time_ns()
        os.kill(process, signal.SIGKILL)
        followed = self._followed

        def is_closed(at: int, who: str, what: Message) -> bool:
            lost = isinstance(what, DriverLost) and what.epoch == epoch
            return who == victim and (lost or isinstance(what, WorkerStarted))

        closed, _, _ = await followed.first(is_closed)
        _, _, order = await followed.first(
            lambda at, who, what: isinstance(what, SealTokens) and (what.worker, what.epoch) == (victim, epoch)
        )
        sealed, _, _ = await followed.first(
            lambda at, who, what: isinstance(what, SequencesSealed) and (what.worker, what.epoch) == (victim, epoch)
        )
        assert isinstance(order, SealTokens)
        rows = []
        for key in order.sequences:
            request, _, attempt = key.rpartition("/")
            row = await self._recovered(request, int(attempt), killed, closed, sealed)
            rows += [row] if row is not None else []
        gap = max(self._gap(reader, killed) for reader in self._readers)
        longest: dict[str, Any] = max(rows, key=lambda row: row["total"], default={"phases": {}})
        return {"worker": victim, "held": len(order.sequences), "gap_ms": gap / _MILLION, "phases": longest["phases"]}

    async def _choose(self) -> tuple[str, int, int]:
        """The worker that holds most answers, once all workers are up and every reader reads; process and epoch."""
        while True:
            status = await cell_status(self._bus, CELL)
            reading = all(reader.current is not None and reader.current.positions for reader in self._readers)
            if status is not None and reading and len(status["workers"]) == NODES * WORKERS:
                workers = status["workers"]
                held = {name: sum(i["active"] for i in one["instances"].values()) for name, one in workers.items()}
                name = max(held, key=lambda one: held[one])
                if held[name]:
                    return name, workers[name]["process"], workers[name]["epoch"]
            await asyncio.sleep(0.02)

    async def _recovered(
        self, request: str, attempt: int, killed: int, closed: int, sealed: int
    ) -> dict[str, Any] | None:
        """When its next attempt got how far; None where it had ended already, or ended without one."""
        reader = next((one for one in self._readers if any(a.request == request for a in one.asked)), None)
        if reader is None:
            return None
        asked = next(one for one in reader.asked if one.request == request)
        placed = starting = None
        while starting is None:
            for at, _, what in self._followed.said:
                if isinstance(what, RequestPlaced) and what.request == request and what.attempt > attempt:
                    placed = placed or (at, what.worker)
                if isinstance(what, StartSequence) and what.request == request and what.attempt > attempt:
                    starting = starting or (at, what)
            if starting is None:
                if asked.over:
                    return None
                await _any(self._followed.moved, reader.moved)
        start = starting[1]
        while not asked.over and (not asked.positions or asked.positions[-1] <= start.position):
            reader.moved.clear()
            await reader.moved.wait()
        shown = next(
            (at for at, have in zip(asked.times[1:], asked.positions, strict=False) if have > start.position), 0
        )
        page = self._followed.pages.get((request, start.attempt), 0)
        if not shown or not page or placed is None:
            return None
        ready = [at for at, who, what in self._followed.said
                 if isinstance(what, ModelAttached) and who == placed[1] and sealed < at <= placed[0]]  # fmt: skip
        attached = max(ready, default=sealed)
        marks = [killed, closed, sealed, attached, starting[0], page, shown]
        spans = [(later - before) / _MILLION for before, later in itertools.pairwise(marks)]
        return {"total": shown - killed, "phases": dict(zip(PHASES, spans, strict=True))}

    @staticmethod
    def _gap(reader: Reader, killed: int) -> int:
        """The longest wait for a chunk, in nanoseconds, that was not over when the worker was killed."""
        waits = []
        for asked in reader.asked:
            times = asked.times if asked.over else [*asked.times, time.time_ns()]
            waits += [later - before for before, later in itertools.pairwise(times) if later > killed]
        return max(waits, default=0)


async def _any(*events: asyncio.Event) -> None:
    for event in events:
        event.clear()
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def _summed(kills: list[dict[str, Any]], counts: Counts, seconds: float) -> dict[str, Any]:
    gaps = sorted(one["gap_ms"] for one in kills)
    phases = {}
    for name in PHASES:
        spans = sorted(one["phases"][name] for one in kills if one["phases"])
        phases[name] = _spread(spans)
    reach = (SILENCE_SECONDS + 0.5) * 1000
    wrong = counts.unfinished + counts.lost + counts.changed + counts.repeated
    return {
        "kills": len(kills),
        "seconds_per_kill": round(seconds / len(kills), 2),
        "heartbeat_limit_ms": SILENCE_SECONDS * 1000,
        "gap_ms": _spread(gaps),
        "phases_ms": phases,
        "held": statistics.mean(one["held"] for one in kills),
        "requests": counts.finished + counts.unfinished,
        "unfinished": counts.unfinished,
        "positions_lost": counts.lost,
        "positions_changed": counts.changed,
        "positions_repeated": counts.repeated,
        "first_failure": counts.failures[0] if counts.failures else "",
        "reach_ms": reach,
        "reached": _at(gaps, 0.5) <= reach and not wrong,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {name: round(_at(values, part), 1) for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def _at(values: list[float], part: float) -> float:
    """The value that this part of them does not exceed; they are sorted."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else 0.0
