"""A cell on the bench: facts are put to it one by one, and what it says is looked at."""

from __future__ import annotations

from typing import Any

import msgspec

from actors.cell import Cell, Step
from bus.contract import Record
from bus.messages import (
    FactEnvelope,
    Generation,
    HeldModel,
    Message,
    ModelCard,
    RequestAccepted,
    SaidEnvelope,
    StoreStarted,
    WorkerStarted,
    decode_said,
    decode_said_body,
    encode,
    extend_chain,
    kind_of,
    request_id,
)
from bus.subjects import Subjects

CELL = "w"
MS = 1_000_000
SECOND = 1_000_000_000
BIRTH = 1_700_000_000 * SECOND


def card(model: str, *, weight: int = 40, context: int = 10, kv: int = 1, digest: str = "") -> ModelCard:
    return ModelCard(model, digest or f"d-{model}", weight, context, kv, 100)


class Chained:
    """States the facts of one epoch as a driver does: counted, chained, under its epoch and boot."""

    def __init__(self, name: str, boot: str) -> None:
        self.name, self.boot, self.epoch, self.count, self.chain = name, boot, 0, 0, boot

    def started(self, body: Message) -> tuple[str, bytes]:
        return kind_of(body), encode(FactEnvelope(self.name, msgspec.Raw(encode(body)), boot=self.boot))

    def fact(self, body: Message, answers: int = 0) -> tuple[str, bytes]:
        raw = encode(body)
        self.count += 1
        self.chain = extend_chain(self.chain, raw)
        envelope = FactEnvelope(self.name, msgspec.Raw(raw), self.epoch, self.boot, self.count, answers, self.chain)
        return kind_of(body), encode(envelope)


class Bench:
    """A cell and its ledger, for tests that state one fact after another."""

    def __init__(self, cell: Cell | None = None) -> None:
        self.cell = cell if cell is not None else Cell(CELL)
        self.subjects = Subjects(CELL)
        self.ledger: list[Record] = []
        self.now = BIRTH
        self.boots = 0

    def put(self, actor: str, kind: str, payload: bytes) -> list[Step]:
        record = Record(len(self.ledger) + 1, self.now, self.subjects.fact(actor, kind), payload)
        self.ledger.append(record)
        return self.cell.take(record)

    def alone(self, actor: str, body: Message, sender: str = "test") -> list[Step]:
        return self.put(actor, kind_of(body), encode(FactEnvelope(sender, msgspec.Raw(encode(body)))))

    def start(self, name: str, body: Message) -> Chained:
        self.boots += 1
        driver = Chained(name, f"boot{self.boots}")
        self.put(name, *driver.started(body))
        driver.epoch = len(self.ledger)
        return driver

    def state(self, driver: Chained, body: Message, answers: int = 0) -> list[Step]:
        return self.put(driver.name, *driver.fact(body, answers))


def said(steps: list[Step]) -> list[Message]:
    """What was said, as messages."""
    return [decode_said_body(decode_said(one.payload).body) for step in steps for one in step.said]


def envelopes(steps: list[Step]) -> list[SaidEnvelope]:
    return [decode_said(one.payload) for step in steps for one in step.said]


def accepted(key: str, model: str = "m0", **changes: Any) -> RequestAccepted:
    generation = Generation(changes.pop("max_tokens", 8), prompt=changes.pop("prompt", "hello"))
    return RequestAccepted(request_id("c", key), "c", key, model, generation, **changes)


def store_started(server: str, *models: HeldModel, dram: int = 100) -> StoreStarted:
    return StoreStarted(server, dram, models)


def worker_started(server: str = "s0", index: int = 0, memory: int = 100, slots: int = 2) -> WorkerStarted:
    return WorkerStarted(server, index, memory, slots)


# ---- the world ------------------------------------------------------------------------------------------------
