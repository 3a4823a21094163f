"""A small simulated cell in which one answer moves, and one thing happens exactly when a named stage is reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from bus.contract import BusError, Record
from bus.messages import FactEnvelope, MigrateRequested, decode_fact, decode_said, encode, kind_of
from bus.pages import Page, decode_page
from bus.subjects import FactSubject
from chaos.clients import Application, Plan
from chaos.options import Options, calm
from chaos.run import Verdict, run_world
from chaos.world import CELL, World

STAGES = (
    "move.described", "slot.kept", "heir.introduced", "sequence.follow", "round.finished", "sequence.caught-up",
    "heir.named", "sequence.hand-over", "hand-over page", "sequence.released", "heir.go-on", "sequence.resume",
    "first page",
)  # fmt: skip
MOVE_AT = 20
"""Position at which somebody asks for the move."""
LENGTH = 120

Act = Callable[["Staged", Record], None]


def options(seed: int = 3, **changes: Any) -> Options:
    """Two servers of one device each, two controls, one model that lies on both; nothing fails by itself."""
    small = calm(seed)
    card = msgspec.structs.replace(small.models[0], context=512, weight_bytes=40 * 1024, kv_bytes_per_token=16)
    quiet = replace(
        small,
        controls=2,
        servers=2,
        workers=1,
        models=(card,),
        memory_bytes=4 * (card.weight_bytes + card.context * card.kv_bytes_per_token),
        dram_bytes=2 * card.weight_bytes,
        max_slots=4,
        requests=1,
        several=0.0,
        fault_seconds=8.0,
        dedupe_seconds=120.0,
        deaths_limit=100,
        generations=False,
        upgrade=False,
    )
    return replace(quiet, **changes)


def plan(number: int, model: str, **changes: Any) -> Plan:
    made = Plan(
        number=number,
        at=0.5,
        client="client",
        key=f"key-{number}",
        model=model,
        prompt=f"request {number} " + "x" * 40,
        max_tokens=LENGTH,
        seed=11 + number,
        encoding="json",
        deadline_ms=0,
        cancel_at=-1,
        leave_at=-1,
        away=0.0,
        twin=False,
        n=1,
        fields={"min_tokens": LENGTH, "logprobs": 1, "presence_penalty": 0.5},
    )
    return replace(made, **changes)


class Staged(World):
    """`act` is called at the first record of `stage`; `stages` are those that were reached, with virtual times and the
    position that was durable by then."""

    def __init__(self, options: Options, say: Any, stage: str, act: Act, plans: list[Plan], moves: int) -> None:
        super().__init__(options, say)
        self.stage, self.act, self.plans, self.moves = stage, act, plans, moves
        self.fired = False
        self.stages: dict[str, tuple[float, int]] = {}
        self.source, self.heir = "", ""
        self.ended_moves: list[dict[str, Any]] = []
        self.durable = 0
        self._moved = 0
        for storage in self._storages.values():
            storage.cards = {card.model: card for card in options.models}

    def _open_applications(self) -> list[asyncio.Future[None]]:
        bus = self._connect("client-0")
        self.applications = []
        for one in self.plans:
            self.observer.choices[one.request, 0] = one.members[0]
            self.applications.append(Application(one, bus, CELL, self.observer, self.note))
        return [asyncio.ensure_future(application.run()) for application in self.applications]

    # ---- what is done -----------------------------------------------------------------------------------------

    def migrate(self, to: str = "", request: str = "") -> None:
        message = MigrateRequested(request=request or self.plans[0].request, to=to)
        payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))

        async def ask() -> None:
            try:
                await self.server.bus("operator").ledger.append(
                    self.subjects.fact("migration", kind_of(message)), payload
                )
            except BusError as error:
                self.note(f"the operator is told: {error}")

        asyncio.get_running_loop().create_task(ask())

    def cancel(self) -> None:
        asyncio.get_running_loop().create_task(self.applications[0]._cancel())
        self.applications[0]._cancelling = asyncio.get_running_loop().create_future()

    def kill(self, name: str, record: Record, *, before_answer: bool) -> None:
        process = self._boots.get(record.publisher) if name == "publisher" else self._named(name)
        self._kill_at(process, f"{self.stage}", before_answer)

    def cut(self, name: str, seconds: float) -> None:
        process = self._named(name)
        if process.bus is not None:
            self.server.outage(seconds, process.bus.memory)

    def slow(self, name: str, seconds: float) -> None:
        process = self._named(name)
        if process.bus is not None:
            process.bus.faults.stall(seconds)

    # ---- what is seen -----------------------------------------------------------------------------------------

    def _stored(self, log: str, record: Record) -> None:
        super()._stored(log, record)
        if log == "tokens":
            self._page(record)
        elif log == "ledger":
            subject = self.subjects.parse(record.subject)
            kind = ".".join(record.subject.rsplit(".", 2)[1:])
            decode = decode_fact if isinstance(subject, FactSubject) else decode_said
            fields = msgspec.json.decode(decode(record.payload).body)
            if fields.get("request") != self.plans[0].members[0]:
                return
            if kind == "move.described":
                self.source = fields["worker"]
            if kind == "slot.kept":
                self.heir = fields["worker"]
            if kind == "move.ended":
                self.ended_moves.append(fields)
            self._reached(kind, record)

    def _page(self, record: Record) -> None:
        try:
            page = decode_page(record.payload)
        except ValueError:
            return
        for part in page.sequences if isinstance(page, Page) else ():
            if part.request != self.plans[0].members[0]:
                continue
            self.durable = part.position + len(part.tokens)
            if self.durable >= MOVE_AT and self._moved < self.moves:
                self._moved += 1
                self.migrate()
            if part.end == "handed-over":
                self._reached("hand-over page", record)
            elif part.attempt > 1:
                self._reached("first page", record)

    def _reached(self, stage: str, record: Record) -> None:
        self.stages.setdefault(stage, (self.now(), self.durable))
        if stage == self.stage and not self.fired:
            self.fired = True
            self.act(self, record)


def nothing(world: Staged, record: Record) -> None:
    return


def staged(
    stage: str = "", act: Act = nothing, *, plans: list[Plan] | None = None, moves: int = 1, **changes: Any
) -> tuple[Verdict, Staged]:
    """Run it; the verdict of the world, and the world."""
    chosen = options(**changes)
    worlds: list[Staged] = []

    def make(options: Options, say: Any) -> World:
        world = Staged(options, say, stage, act, plans or [plan(0, options.models[0].model)], moves)
        worlds.append(world)
        return world

    verdict = run_world(chosen, make=make)
    return verdict, worlds[0]
