"""What is held against a world after its run: its ledger and tokens, its answers, its replicas' states.

The ledger is read three times: by `actors.replay.verify` as anybody would, by a cell whose every fact is looked at, and
by a cell that goes on from a snapshot at a random cut.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, cast

from actors.cell import Cell
from actors.gpu_state import GpuState
from actors.migration import MigrationState
from actors.placement_state import PlacementState
from actors.replay import verify
from actors.request_state import RequestsState
from actors.store_state import StoreState
from bus.contract import Record
from bus.messages import (
    RequestAccepted,
    RequestEnded,
    choice_id,
    decode_fact,
    decode_fact_body,
    decode_said,
    decode_said_body,
)
from bus.ordering import FactOrder, TakenFact
from bus.subjects import FactSubject, SaidSubject
from chaos.aftermath_moves import MovesJudged
from chaos.machines import REFUSED_PROMPT, seeded, undisturbed
from chaos.promises import Promise
from chaos.virtual_time import run
from chaos.world import CELL, World


def run_digest(world: World) -> str:
    """The hash of everything that was stored, with its times: equal for equal seeds."""
    digest = hashlib.sha256()
    for record in (*world.observer.records, *world.observer.pages):
        digest.update(f"{record.sequence} {record.timestamp} {record.subject} {record.publisher} ".encode())
        digest.update(record.payload)
    return digest.hexdigest()[:32]


def judge(world: World) -> None:
    """Add every violation that shows only now to the world's own."""
    Aftermath(world).judge()


class Aftermath:
    def __init__(self, world: World) -> None:
        self._world = world
        self._records = world.observer.records
        self._at = self._records[-1].timestamp / 1e9 - 1.7e9 if self._records else 0.0
        self._ends: dict[str, list[RequestEnded]] = {}
        self._accepted: dict[str, RequestAccepted] = {}

    def judge(self) -> None:
        self._read()
        self._requests()
        self._answers()
        self._last_words()
        self._replay()
        self._facts_and_states()

    def violation(self, promise: Promise, text: str) -> None:
        self._world.violations.add(promise, self._at, text)

    # ---- what stands in the ledger ----------------------------------------------------------------------------

    def _read(self) -> None:
        answered: dict[tuple[str, int, int], int] = {}
        effects: dict[tuple[str, int], dict[int, str]] = {}
        for record in self._records:
            subject = self._world.subjects.parse(record.subject)
            if isinstance(subject, FactSubject):
                self._fact(record, subject, answered)
            elif isinstance(subject, SaidSubject):
                self._said(record, subject, effects)
        for (driver, epoch), numbers in effects.items():
            missing = [number for number in range(1, max(numbers)) if number not in numbers]
            if missing:
                self.violation(Promise.NO_HOLES, f"effects {missing[:5]} of {driver} in epoch {epoch} are not there")

    def _fact(self, record: Record, subject: FactSubject, answered: dict[tuple[str, int, int], int]) -> None:
        fact = decode_fact(record.payload)
        if fact.answers:
            first = answered.setdefault((subject.actor, fact.epoch, fact.answers), fact.count)
            if first != fact.count:
                what = f"effect {fact.answers} of {subject.actor} in epoch {fact.epoch}: facts {first} and {fact.count}"
                self.violation(Promise.ANSWERED_ONCE, what)
        if subject.kind == "request.accepted":
            message = decode_fact_body(fact.body)
            assert isinstance(message, RequestAccepted)
            for index in range(message.generation.n):
                member = choice_id(message.request, message.client, message.key, index)
                self._accepted.setdefault(member, message)

    def _said(self, record: Record, subject: SaidSubject, effects: dict[tuple[str, int], dict[int, str]]) -> None:
        said = decode_said(record.payload)
        if said.number:
            known = effects.setdefault((subject.receiver, said.epoch), {})
            if known.setdefault(said.number, said.chain) != said.chain:
                where = f"effect {said.number} of {subject.receiver} in epoch {said.epoch}"
                self.violation(Promise.NO_HOLES, f"{where} stands in the ledger with two bodies")
        if subject.kind == "request.ended":
            ended = decode_said_body(said.body)
            assert isinstance(ended, RequestEnded)
            self._ends.setdefault(ended.request, []).append(ended)
        elif subject.kind == "step.skipped":
            self.violation(Promise.NO_SKIPPED_STEP, f"ledger {record.sequence}: {bytes(said.body).decode()}")

    def _requests(self) -> None:
        for request in self._accepted:
            ends = {(end.outcome, end.end, end.positions, end.code): None for end in self._ends.get(request, [])}
            if len(ends) != 1:
                self.violation(Promise.ENDED_ONCE, f"request {request} ended as {list(ends) or 'nothing'}")
        for request in self._ends:
            if request not in self._accepted:
                self.violation(Promise.ENDED_ONCE, f"request {request} ended and was never accepted")

    def _last_words(self) -> None:
        """Core messages get lost and shells die; where nothing of that happens, the last word comes last."""
        options = self._world.options
        deaths = options.crash_at_record or options.crash_at or options.crash_at_move
        if not (options.odds.on() or options.disturbances or deaths):
            for text in self._world.observer.early:
                self.violation(Promise.IN_ORDER, text)

    # ---- answers ----------------------------------------------------------------------------------------------

    def _answers(self) -> None:
        for application in self._world.applications:
            plan = application.plan
            for index, member in enumerate(plan.members):
                for end in self._ends.get(member, [])[:1]:
                    read = application.ends[index]
                    if application.end and read != (end.end or end.outcome):
                        what = f"{plan.key} read the end {read!r} of {index}, the cell said {end.outcome} {end.end}"
                        self.violation(Promise.ENDED_ONCE, what)
                    self._justified(plan.request, application, end)
                    self._equal(member, application, index, end)

    def _justified(self, request: str, application: Any, end: RequestEnded) -> None:
        """Whether something in this world can have made the request end so."""
        options, plan = self._world.options, application.plan
        troubled = any((*_odds(options.troubles), options.cursed == plan.model))
        twins = [other for other in self._world.applications if other.plan.request == request]
        operator = self._world.operator
        removed = operator is not None and plan.model in operator.removed
        failed = (
            plan.prompt.startswith(REFUSED_PROMPT)
            or (end.code == "start_failed" and (troubled or removed))
            or (end.code == "unknown_model" and removed)
        )
        why = {
            "finished": True,
            "cancelled": any(other.cancelled for other in twins),
            "deadline": plan.deadline_ms > 0,
            "quarantined": end.code == "quarantined",
            "failed": failed,
        }
        if not why[end.outcome]:
            what = f"{plan.key} for {plan.model} ended as {end.outcome}, {end.code}: {end.reason}"
            self.violation(Promise.NO_NEEDLESS_FAILURE, what)

    def _equal(self, request: str, application: Any, index: int, end: RequestEnded) -> None:
        answer = self._world.observer.answers.get(request)
        tokens = answer.tokens if answer is not None else []
        position, plan = application.read[index], application.plan
        if len(tokens) != end.positions or (application.end and position != end.positions):
            what = f"{application.plan.key} ended at {end.positions}, durable are {len(tokens)} positions"
            self.violation(Promise.IN_ORDER, f"{what}, {position} were read")
        if self._world.options.wobble or not tokens:
            return
        model, start = self._world.starts[request]
        if plan.inputs:
            same = [bytes(one).decode() for one in start.inputs] == plan.texts
        else:
            asked = {name: getattr(start.sampling, name) for name in ("logprobs", "presence_penalty", "min_tokens")}
            wanted = {"logprobs": -1, "presence_penalty": 0.0, "min_tokens": 0} | plan.fields
            same = all(wanted[name] == value for name, value in asked.items())
            same = same and bytes(start.prompt).decode() == plan.prompt and start.sampling.seed == plan.seed + index
        if not same:
            self.violation(Promise.UNDISTURBED, f"{application.plan.key} was computed from another prompt or seed")
        context = next(card.context for card in self._world.options.models if card.model == model)
        expected, vectors, how = run(undisturbed(start, context, self._world.options.eos_tokens))
        if answer is not None and answer.vectors != vectors[: len(answer.vectors)]:
            self.violation(Promise.UNDISTURBED, f"{plan.key} has other vectors than an undisturbed cell gives")
        whole = end.outcome == "finished"
        if tokens != (expected if whole else expected[: len(tokens)]) or (whole and end.end != how):
            what = f"{application.plan.key} is {tokens} ({end.end}), undisturbed {expected} ({how})"
            self.violation(Promise.UNDISTURBED, what)

    # ---- replay, order, states --------------------------------------------------------------------------------

    def _replay(self) -> None:
        verdict = verify(CELL, self._records)
        if verdict.difference is not None:
            self.violation(Promise.REPLAY_AGREES, verdict.sentence)
        elif verdict.pending:
            self.violation(Promise.REPLAY_AGREES, f"{verdict.pending} outputs are missing at the end")

    def _facts_and_states(self) -> None:
        facts = [record for record in self._records if ".fact." in record.subject]
        cell = Cell(CELL)
        order = cell.order = _Order()
        samples: dict[int, list[Any]] = {}
        for sample in self._world.samples:
            samples.setdefault(sample.position, []).append(sample)
        cut = seeded("cut", self._world.options.seed).randrange(len(facts)) if facts else 0
        restored: Cell | None = None
        moves = MovesJudged(self._records, self._world.subjects, self.violation)
        taken = 0
        for index, record in enumerate(facts):
            cell.take(record)
            for fact in order.taken[taken:]:
                moves.fact(fact.sequence, cell)
            taken = len(order.taken)
            if restored is not None:
                restored.take(record)
            elif index == cut:
                restored = Cell.restored(CELL, cell.snapshot())
            self._budgets(cell, record.sequence, all_of_them=index % 20 == 0)
            if record.sequence in samples:
                self._compare(cell, samples[record.sequence])
        if restored is not None and restored.digest() != cell.digest():
            where = f"cut behind fact {facts[cut].sequence}"
            self.violation(Promise.SNAPSHOTS_AGREE, f"{where}: the states at {cell.position} differ")
        moves.over()
        self._taken_in_order(order.taken)
        self._nothing_left(cell)

    def _compare(self, cell: Cell, samples: list[Any]) -> None:
        digest = cell.digest()
        for sample in samples:
            if sample.digest != digest:
                what = f"{sample.replica} had another state than the ledger gives at {sample.position}"
                self.violation(Promise.REPLICAS_AGREE, what)

    def _taken_in_order(self, taken: list[TakenFact]) -> None:
        counts: dict[tuple[str, int], int] = {}
        for fact in taken:
            envelope = decode_fact(self._records[fact.sequence - 1].payload)
            if envelope.epoch:
                key = (fact.actor, envelope.epoch)
                expected = counts.get(key, 0) + 1
                if envelope.count != expected:
                    what = (
                        f"{fact.actor} in epoch {envelope.epoch}: fact {envelope.count} is taken as number {expected}"
                    )
                    self.violation(Promise.NO_HOLES, what)
                counts[key] = envelope.count

    def _budgets(self, cell: Cell, sequence: int, *, all_of_them: bool) -> None:
        for text in budget_troubles(cell) if all_of_them else store_troubles(cell):
            self.violation(Promise.BUDGETS, f"ledger {sequence}: {text}")

    def _nothing_left(self, cell: Cell) -> None:
        for text in leftovers(cell):
            self.violation(Promise.NOTHING_LEFT, text)


class _Order(FactOrder):
    """Notes every fact that is handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[TakenFact] = []

    def admit(self, record: Record, subject: FactSubject) -> list[TakenFact]:
        taken = super().admit(record, subject)
        self.taken += taken
        return taken


def store_troubles(cell: Cell) -> Iterator[str]:
    """What stores have reserved beyond their budgets of DRAM and SSD."""
    for name, actor in cell.actors.items():
        state = actor.state
        if isinstance(state, StoreState):
            if state.dram_used() > state.dram_bytes:
                yield f"{name} has reserved {state.dram_used()} of {state.dram_bytes} bytes of DRAM"
            if 0 < state.ssd_bytes < state.ssd_used():
                yield f"{name} has reserved {state.ssd_used()} of {state.ssd_bytes} bytes of its SSD"


def budget_troubles(cell: Cell) -> Iterator[str]:
    """What the cell has reserved beyond what there is."""
    yield from store_troubles(cell)
    for name, actor in cell.actors.items():
        state = actor.state
        if isinstance(state, GpuState):
            for model, instance in state.instances.items():
                running = sum(held.model == model for held in state.sequences.values())
                if running > instance.slots:
                    yield f"{name} runs {running} sequences in {instance.slots} slots of {model}"
        elif isinstance(state, PlacementState):
            for worker, known in state.workers.items():
                # What is being detached makes room for what is started instead: it is there first.
                kept = sum(i.memory for i in known.instances.values() if i.status != "stopping")
                if kept > known.memory_bytes:
                    yield f"{worker} is {kept - known.memory_bytes} bytes short of what was placed on it"
                for model, placed in known.instances.items():
                    if len(placed.active) > placed.slots:
                        yield f"{worker} has {len(placed.active)} requests in {placed.slots} slots of {model}"


def leftovers(cell: Cell) -> Iterator[str]:
    """What is still reserved, waiting or open in a cell in which every request has ended."""
    requests = cell.actors.get("requests")
    for name, request in cast(RequestsState, requests.state).requests.items() if requests is not None else ():
        if request.status != "ended":
            yield f"request {name} is {request.status} at {request.worker or 'no worker'}"
    for name, family in cast(RequestsState, requests.state).families.items() if requests is not None else ():
        if family.running or family.replies:
            yield f"request {name} has {family.running} answers that run and {len(family.replies)} readers"
    placement = cell.actors.get("placement")
    if placement is not None:
        state = cast(PlacementState, placement.state)
        if state.placed or state.queues or state.waiting:
            yield f"placement holds {list(state.placed)}, queues {list(state.queues)}, counts {state.waiting} waiting"
        active = {w: dict(i.active) for w, k in state.workers.items() for i in k.instances.values() if i.active}
        if active:
            yield f"slots are taken: {active}"
        loading = {name: dict(server.loading) for name, server in state.servers.items() if server.loading}
        if loading:
            yield f"bytes count as queued on loading paths: {loading}"
        if state.kept or state.wishes:
            yield f"slots are kept for moves: {list(state.kept)}, and wished for: {list(state.wishes)}"
        exchange = state.exchange
        if exchange.rooms or exchange.sequences or exchange.tried:
            left = list(exchange.rooms), list(exchange.sequences), list(exchange.tried)
            yield f"exchanges are under way for {left[0]}, sequences known {left[1]}, requests noted {left[2]}"
        if state.room:
            yield f"workers are drained for nobody: {dict(state.room)}"
    migration = cell.actors.get("migration")
    if migration is not None and (moves := cast(MigrationState, migration.state).moves):
        yield f"moves are under way: {moves}"
    for name, actor in cell.actors.items():
        if isinstance(actor.state, GpuState) and actor.state.standbys:
            yield f"{name} follows {list(actor.state.standbys)}"
        if isinstance(actor.state, GpuState) and (actor.state.sequences or actor.state.sealing):
            yield f"{name} holds {list(actor.state.sequences)} and seals {list(actor.state.sealing)}"
        if isinstance(actor.state, StoreState):
            yield from _stored_left(name, actor.state, cell)
    for trouble in cell.order.troubles():
        yield f"{trouble.driver}: {trouble.reason}"


def _stored_left(name: str, state: StoreState, cell: Cell) -> Iterator[str]:
    for model, stored in state.models.items():
        if stored.waiting or stored.loading:
            yield f"{name} is loading {model} for {list(stored.waiting)}"
        for worker in stored.leases:
            actor = cell.actors.get(worker)
            if actor is None or model not in cast(GpuState, actor.state).instances:
                yield f"{name} keeps {model} for {worker}, which does not have it"


def _odds(troubles: Any) -> tuple[float, ...]:
    return dataclasses.astuple(troubles)
