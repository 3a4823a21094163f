"""`longshore bench replay`: how many recorded messages per second are read and verified.

The recording is made here: a cell with scripted drivers serves requests over several models and workers, with starts,
evictions and finished sequences, until it has the wanted number of messages. Reading, decoding, stepping, encoding and
comparing all count.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from actors.cell import DRIVER, Cell
from actors.replay import verify
from bus.contract import Record
from bus.messages import (
    AttachModel,
    DetachModel,
    EvictModel,
    FactEnvelope,
    Generation,
    HeldModel,
    LoadModel,
    Message,
    ModelAttached,
    ModelCard,
    ModelDetached,
    ModelEvicted,
    ModelLoaded,
    RequestAccepted,
    SequenceFinished,
    StartSequence,
    StoreStarted,
    WorkerStarted,
    decode_said,
    decode_said_body,
    encode,
    extend_chain,
    kind_of,
    request_id,
)
from bus.recording import Recording, RecordingWriter

CELL = "bench"
SERVERS, WORKERS, MODELS, SLOTS = 2, 4, 12, 8
GIB = 1 << 30


class ScriptedLedger:
    """A ledger in memory whose drivers answer at once: facts in, derived messages behind them, in stream order."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.cell = Cell(CELL)
        self._time = 1_700_000_000_000_000_000
        self._epochs: dict[str, tuple[int, str, int, str]] = {}
        self._effects: deque[tuple[str, int, Message]] = deque()

    def state(self, actor: str, message: Message, sender: str = "intake", answers: int = 0) -> None:
        body = encode(message)
        envelope = FactEnvelope(sender, msgspec.Raw(body))
        if sender in self._epochs:
            epoch, boot, count, chain = self._epochs[sender]
            chain = extend_chain(chain, body)
            self._epochs[sender] = (epoch, boot, count + 1, chain)
            envelope = FactEnvelope(sender, msgspec.Raw(body), epoch, boot, count + 1, answers, chain)
        self._append(self.cell.subjects.fact(actor, kind_of(message)), encode(envelope))

    def start(self, driver: str, message: Message) -> None:
        boot = f"boot-{driver}"
        self._epochs[driver] = (len(self.records) + 1, boot, 0, boot)
        envelope = FactEnvelope(driver, msgspec.Raw(encode(message)), boot=boot)
        self._append(self.cell.subjects.fact(driver, kind_of(message)), encode(envelope))

    def _append(self, subject: str, payload: bytes) -> None:
        self._time += 1_000_000
        record = Record(len(self.records) + 1, self._time, subject, payload)
        self.records.append(record)
        for step in self.cell.take(record):
            for said in step.said:
                self.records.append(Record(len(self.records) + 1, self._time, said.subject, said.payload))
                if said.receiver.startswith(DRIVER):
                    envelope = decode_said(said.payload)
                    effect = (said.receiver[len(DRIVER) :], envelope.number, decode_said_body(envelope.body))
                    self._effects.append(effect)

    def work(self) -> None:
        """Drivers answer all effects, in order."""
        while self._effects:
            driver, number, effect = self._effects.popleft()
            self.state(driver, scripted_answer(effect), driver, number)


def scripted_answer(effect: Message) -> Message:
    """What a driver without a model says when it has done what it was told."""
    if isinstance(effect, LoadModel):
        return ModelLoaded(effect.model, 4 * GIB, 2_000_000_000)
    if isinstance(effect, EvictModel):
        return ModelEvicted(effect.model)
    if isinstance(effect, AttachModel):
        return ModelAttached(effect.model, effect.slots, 50_000_000)
    if isinstance(effect, DetachModel):
        return ModelDetached(effect.model)
    if isinstance(effect, StartSequence):
        return SequenceFinished(effect.request, effect.attempt, "stop", 0, 64, 1, 64, 20, "0" * 16, 10**7, 10**9)
    raise AssertionError(f"the scripted drivers have no answer to {kind_of(effect)}")


def make_ledger(messages: int) -> list[Record]:
    """At least `messages` records of a busy cell."""
    ledger = ScriptedLedger()
    cards = [
        ModelCard(f"model-{i}", f"{i:064x}", 4 * GIB, 4096, 131_072, 32_000, "LlamaForCausalLM") for i in range(MODELS)
    ]
    for server in range(1, SERVERS + 1):
        held = tuple(HeldModel(card) for card in cards)
        ledger.start(f"store/s{server}", StoreStarted(f"s{server}", 24 * GIB, held))
        for index in range(WORKERS):
            ledger.start(f"gpu/s{server}/{index}", WorkerStarted(f"s{server}", index, 12 * GIB, SLOTS))
    number = 0
    while len(ledger.records) < messages:
        # Bursts: a model is asked for several times in a row, so most starts are running instances, as in life.
        model = f"model-{(number // 40 * 7) % MODELS}"
        for _ in range(4):
            number += 1
            generation = Generation(64, prompt="A crane moves what others cannot. " * 8, seed=number)
            request = RequestAccepted(request_id("bench", str(number)), "bench", str(number), model, generation)
            ledger.state("requests", request)
        ledger.work()
    return ledger.records


def bench_replay(messages: int, rounds: int) -> dict[str, Any]:
    """Seconds and messages per second of reading and verifying a recording; the median of `rounds`."""
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as folder:
        path = Path(folder) / "bench.lsrec"
        records = make_ledger(messages)
        with RecordingWriter(path, CELL, records[-1].timestamp) as writer:
            for record in records:
                writer.add("ledger", record)
        facts = sum(".fact." in record.subject for record in records)
        reading, verifying = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            count = sum(1 for _ in Recording.open(path).ledger())
            reading.append(time.perf_counter() - began)
            began = time.perf_counter()
            verdict = verify(CELL, Recording.open(path).ledger())
            verifying.append(time.perf_counter() - began)
            if verdict.difference is not None or verdict.verified != count - facts or verdict.pending:
                raise AssertionError(f"the bench's own recording does not verify: {verdict}")
        seconds = statistics.median(verifying)
        return {
            "messages": len(records),
            "facts": facts,
            "derived": len(records) - facts,
            "bytes": path.stat().st_size,
            "rounds": rounds,
            "read_per_second": round(len(records) / statistics.median(reading)),
            "verified_seconds": round(seconds, 3),
            "messages_per_second": round(len(records) / seconds),
            "derived_per_second": round((len(records) - facts) / seconds),
            "min_messages_per_second": round(len(records) / max(verifying)),
            "max_messages_per_second": round(len(records) / min(verifying)),
        }
