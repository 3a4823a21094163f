"""The doing half of one GPU worker: it obeys `gpu/<server>/<index>` and makes tokens durable before it shows them.

    effects ─▶ prepare (prompt, earlier tokens) ─▶ compute: stop, admit, step ─▶ page ─▶ acknowledged ─▶ chunks ─▶ fact

Rules
* Three things go on at once: obeying effects, computing, and making durable. Step k+1 computes while page k waits for
  its acknowledgement, and never runs further ahead.
* Nothing is shown or stated about a position before the page with it is acknowledged.
* A writer that is fenced ends the epoch at once: what was computed since then is nobody's.
* Every sequence ends with one fact: finished (the end is in a page), refused (not begun), failed (the engine broke).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

from actors.driver import FACTS_IN_FLIGHT, Epoch
from actors.driver_core import Effect, EpochOver
from actors.token_writer import Fenced, TokenWriter
from actors.worker_ahead import WorkAhead
from actors.worker_following import Followers
from actors.worker_preparing import Preparing
from actors.worker_prompts import NotKept, Prompts
from actors.worker_runtime import AheadModel, AttachRefused, PromptRefused, StepResult, WorkerRuntime
from actors.worker_sequences import Batch, HeldSequence, ReplyReader, Stop, split_pages
from actors.worker_showing import Showing
from bus.contract import Bus
from bus.messages import (
    AddReader,
    AttachFailed,
    AttachModel,
    CancelSequence,
    CancelTaken,
    DetachModel,
    DropSequence,
    FollowSequence,
    HandOverSequence,
    HandOverTaken,
    Message,
    ModelAttached,
    ModelDetached,
    ProgressReported,
    ReaderAdded,
    ReplyTo,
    ResumeSequence,
    SequenceRefused,
    StartSequence,
    WorkerStarted,
    kind_of,
)
from bus.pages import Page, PageEnd, encode_page
from bus.subjects import Subjects
from bus.tasks import Tasks
from models.contract import NO_TOKEN, AdmissionRefused, Engine, VectorEvent

PROGRESS_SECONDS = 1.0
PROGRESS_LIMIT = 256
READERS_LIMIT = 64
"""Readers of one sequence; the oldest makes room, as in the cell."""
KEEPALIVE_SECONDS = 300.0
"""An idle writer appends an empty page this often: the last page of its subject must not expire, it is the fence."""

logger = logging.getLogger("longshore.driver")


class WorkerDriver:
    """Obeys `actors.driver.Driver`. Its name is that of its deciding half."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        server: str,
        index: int,
        *,
        memory_bytes: int,
        max_slots: int,
        runtime: WorkerRuntime,
        process: int = 0,
        catch_up: bool = True,
    ) -> None:
        self.name = f"gpu/{server}/{index}"
        self._catch_up = catch_up
        self.runtime = runtime
        self._bus = bus
        self._subjects = subjects
        self._started = WorkerStarted(
            server=server,
            index=index,
            memory_bytes=memory_bytes,
            max_slots=max_slots,
            device=runtime.device,
            process=process,
        )

    async def open(self) -> Message:
        await self.runtime.reset()
        return self._started

    async def run(self, epoch: Epoch) -> None:
        work = _Work(self._bus, self._subjects, self.name, self.runtime, epoch, catch_up=self._catch_up)
        try:
            await work.run()
        except Fenced as fenced:
            raise EpochOver(f"{self.name} was fenced: {fenced}") from None


class _Work:
    """One epoch of a worker."""

    def __init__(
        self, bus: Bus, subjects: Subjects, name: str, runtime: WorkerRuntime, epoch: Epoch, *, catch_up: bool
    ) -> None:
        self._epoch = epoch
        self._runtime = runtime
        prompts = Prompts(bus.ledger, bus.tokens, bus.parts, subjects)
        self._showing = Showing(bus)
        self._writer = TokenWriter(bus.tokens, subjects.tokens(name, epoch.number), publisher=epoch.boot)
        self._tasks = Tasks()
        self._now = asyncio.get_running_loop().time
        self._engines: dict[str, Engine] = {}
        self._troubled: dict[str, bool] = {}
        self._held: dict[str, HeldSequence] = {}
        self._admission: deque[HeldSequence] = deque()
        self._detaching: deque[Effect] = deque()
        self._compute_wanted = asyncio.Event()
        self._batch: Batch | None = None
        self._batch_taken = asyncio.Event()
        self._batch_taken.set()
        self._durable_wanted = asyncio.Event()
        self._unshown: dict[str, bool] = {}
        self._pages = 0
        self._progress_at = self._now()
        self._preparing = Preparing(prompts, runtime, self._engines)
        wake = self._compute_wanted.set
        self._ahead = WorkAhead(bus.ledger, subjects, name, prompts, runtime, self._tasks, wake)
        self._followers = Followers(
            epoch,
            bus.tokens,
            subjects,
            self._preparing,
            runtime,
            self._engines,
            self._tasks,
            self._compute_wanted.set,
            catch_up=catch_up,
        )

    async def run(self) -> None:
        try:
            self._tasks.start(self._obey(), "obeys")
            self._tasks.start(self._compute(), "computes")
            self._tasks.start(self._make_durable(), "makes durable")
            if self._runtime.works_ahead:
                self._tasks.start(self._ahead.listen(), "begins ahead")
            await self._tasks.wait()
        finally:
            await self._tasks.stop()

    # ---- effects ----------------------------------------------------------------------------------------------

    async def _obey(self) -> None:
        while True:
            effect = await self._epoch.effect()
            message = effect.message
            if isinstance(message, StartSequence):
                self._start(effect.number, message)
            elif isinstance(message, CancelSequence):
                self._cancel(effect.number, message)
            elif isinstance(message, AddReader):
                self._add_reader(effect.number, message)
            elif isinstance(message, AttachModel):
                self._tasks.spawn(self._attach(effect.number, message), "attaches")
            elif isinstance(message, DetachModel):
                self._detaching.append(effect)
                self._compute_wanted.set()
            elif isinstance(message, FollowSequence):
                self._followers.follow(effect.number, message)
            elif isinstance(message, ResumeSequence):
                self._followers.resume(effect.number, message)
            elif isinstance(message, DropSequence):
                self._followers.drop(effect.number, message)
            elif isinstance(message, HandOverSequence):
                self._hand_over(effect.number, message)
            else:
                raise EpochOver(f"a worker does not know how to obey {kind_of(message)}")

    async def _attach(self, number: int, message: AttachModel) -> None:
        began = self._now()
        try:
            if message.model in self._engines:
                raise AttachRefused(f"{message.model} is attached here already", retry=True)
            engine = await self._runtime.attach(
                message.model,
                message.digest,
                slots=message.slots,
                kv_bytes=message.kv_bytes,
                context=message.context,
                streamed=message.streamed,
            )
        except AttachRefused as refused:
            self._epoch.state(AttachFailed(message.model, str(refused)[:4000], refused.retry), answers=number)
            return
        self._engines[message.model] = engine
        duration_ns = int((self._now() - began) * 1e9)
        self._epoch.state(ModelAttached(message.model, engine.slots, duration_ns), answers=number)

    def _start(self, number: int, message: StartSequence) -> None:
        readers = [_reader(reply) for reply in message.replies]
        sequence = HeldSequence(message, number, self._now(), readers)
        if sequence.key in self._held:
            reason = f"attempt {message.attempt} of request {message.request} is here already"
            self._epoch.state(SequenceRefused(message.request, message.attempt, reason, retry=True), answers=number)
            return
        self._held[sequence.key] = sequence
        logger.info("sequence taken", extra=self._fields(sequence) | {"position": message.position})
        self._tasks.spawn(self._prepare(sequence), "prepares")

    def _cancel(self, number: int, message: CancelSequence) -> None:
        key = f"{message.request}/{message.attempt}"
        reason: Stop = "deadline" if message.reason == "deadline" else "cancelled"
        sequence = self._held.get(key)
        found = sequence is not None or self._followers.cancel(key, reason)
        if sequence is not None and not sequence.stopping:
            sequence.stopping = reason
            self._compute_wanted.set()
        self._epoch.state(CancelTaken(message.request, message.attempt, found), answers=number)

    def _hand_over(self, number: int, message: HandOverSequence) -> None:
        sequence = self._held.get(f"{message.request}/{message.attempt}")
        if sequence is not None and not sequence.stopping:
            sequence.stopping = "handed-over"
            self._compute_wanted.set()
        self._epoch.state(HandOverTaken(message.request, message.attempt, sequence is not None), answers=number)

    def _add_reader(self, number: int, message: AddReader) -> None:
        sequence = self._held.get(f"{message.request}/{message.attempt}")
        if sequence is not None:
            subject = message.reply.subject
            sequence.readers = [known for known in sequence.readers if known.reply.subject != subject]
            sequence.readers.append(_reader(message.reply))
            del sequence.readers[:-READERS_LIMIT]
            self._show_soon(sequence)
        found = sequence is not None or self._followers.add_reader(message, READERS_LIMIT)
        added = ReaderAdded(message.request, message.attempt, found, message.reply)
        self._epoch.state(added, answers=number)

    # ---- before the engine ------------------------------------------------------------------------------------

    async def _prepare(self, sequence: HeldSequence) -> None:
        """Gather prompt and earlier tokens; then it waits for its slot, or is refused."""
        try:
            prepared = await self._preparing.gather(sequence.effect)
        except AttachRefused as refused:
            self._refuse(sequence, str(refused), retry=refused.retry)
        except (PromptRefused, NotKept) as refused:
            self._refuse(sequence, str(refused))
        else:
            earlier = prepared.earlier
            sequence.prepare(prepared.start, prepared.texts, earlier.logprobs, earlier.vectors)
            self._admission.append(sequence)
            self._compute_wanted.set()
            if earlier.tokens:
                self._show_soon(sequence)

    def _refuse(self, sequence: HeldSequence, reason: str, *, retry: bool = False) -> None:
        effect = sequence.effect
        del self._held[sequence.key]
        logger.info("sequence refused", extra=self._fields(sequence) | {"reason": reason[:300]})
        self._epoch.state(
            SequenceRefused(effect.request, effect.attempt, reason[:4000], retry=retry), answers=sequence.number
        )

    # ---- computing --------------------------------------------------------------------------------------------

    async def _compute(self) -> None:
        while True:
            # Nothing here refers to what a detach lets go of: its cache would stay until somebody collects garbage.
            engines, ahead = list[tuple[str, Engine]](), None
            batch = Batch()
            await self._stop(batch)
            await self._detach(batch)
            self._admit()
            for sequence in await self._followers.feed():
                self._held[sequence.key] = sequence
                self._show_soon(sequence)
            engines = [(model, engine) for model, engine in self._engines.items() if engine.busy()]
            if engines:
                for result in await self._runtime.step(engines):
                    await self._absorb(result, batch)
            if batch:
                await self._batch_taken.wait()
                self._batch = batch
                self._batch_taken.clear()
                self._durable_wanted.set()
            elif not engines and (ahead := self._ahead.next) is not None:
                await self._compute_ahead(*ahead)
            elif not engines:
                await self._compute_wanted.wait()
                self._compute_wanted.clear()

    async def _compute_ahead(self, model: str, made: AheadModel) -> None:
        """A step of what is not attached yet; whatever else is to be computed interrupts it."""
        step = asyncio.ensure_future(made.step())
        wanted = asyncio.ensure_future(self._compute_wanted.wait())
        try:
            while not step.done():
                await asyncio.wait([step, wanted], return_when=asyncio.FIRST_COMPLETED)
                if wanted.done() and not step.done():
                    self._compute_wanted.clear()
                    if self._others_want(model):
                        made.interrupt()
                    wanted = asyncio.ensure_future(self._compute_wanted.wait())
            await step
        finally:
            wanted.cancel()
            made.interrupt()

    def _others_want(self, model: str) -> bool:
        """Whether anything but a sequence of this model waits for the computing thread."""
        held = any(one.stopping and one.effect.model != model for one in self._held.values())
        admitted = any(one.effect.model != model for one in self._admission)
        return bool(self._detaching) or held or admitted or self._followers.any

    async def _stop(self, batch: Batch) -> None:
        """Sequences that are to end now leave their engine; a page says why."""
        leaving = []
        for sequence in self._held.values():
            if sequence.stopping and sequence.start is not None and not sequence.leaving:
                if sequence.running:
                    leaving.append((self._engines[sequence.effect.model], sequence.key))
                batch.add(sequence, (), (), sequence.stopping)
        if leaving:
            await self._runtime.cancel(leaving)

    async def _detach(self, batch: Batch) -> None:
        while self._detaching:
            effect = self._detaching.popleft()
            assert isinstance(effect.message, DetachModel)
            model = effect.message.model
            await self._fail_all(model, batch, f"{model} was detached from this worker")
            if self._engines.pop(model, None) is not None:
                await self._runtime.detach(model)
            self._epoch.state(ModelDetached(model), answers=effect.number)

    def _admit(self) -> None:
        """Those that wait get slots in the order in which they became ready, as far as there are any."""
        waiting = len(self._admission)
        for _ in range(waiting):
            sequence = self._admission.popleft()
            if sequence.leaving:
                continue
            engine = self._engines.get(sequence.effect.model)
            if engine is None:
                self._refuse(sequence, f"{sequence.effect.model} is not attached here any more", retry=True)
            elif engine.active() >= engine.slots:
                self._admission.append(sequence)
            else:
                assert sequence.start is not None
                try:
                    engine.admit(sequence.start)
                    sequence.running = True
                except AdmissionRefused as refused:
                    self._refuse(sequence, str(refused))

    async def _absorb(self, result: StepResult, batch: Batch) -> None:
        if result.error:
            await self._break_off(result, batch)
            return
        self._troubled.pop(result.model, None)
        for event in result.events:
            sequence = self._held[event.key]
            assert event.position == len(sequence.tokens), "an engine emits every position once, in order"
            if not sequence.first_token_at:
                sequence.first_token_at = self._now()
            if isinstance(event, VectorEvent):
                empty = ("",) * len(event.counts)
                batch.add(sequence, event.counts, empty, "stop" if event.done else "", vectors=event.vectors)
                continue
            tokens, texts = ((event.token,), (event.text,)) if event.token != NO_TOKEN else ((), ())
            end: PageEnd = "" if event.end is None else "stop" if event.end == "stop" else "length"
            batch.add(sequence, tokens, texts, end, (event.logprobs,) if event.logprobs is not None else ())

    async def _break_off(self, result: StepResult, batch: Batch) -> None:
        """An engine broke in a step: what it held has failed. Twice in a row, and the device is not to be trusted."""
        logger.error("%s broke off a step: %s", result.model, result.error, extra={"epoch": self._epoch.number})
        if self._troubled.get(result.model):
            raise EpochOver(f"the engine of {result.model} breaks off every step: {result.error}")
        self._troubled[result.model] = True
        await self._fail_all(result.model, batch, f"the engine of {result.model} broke off: {result.error}")
        if self._engines[result.model].active():
            raise EpochOver(f"the engine of {result.model} cannot be cleared after an error: {result.error}")

    async def _fail_all(self, model: str, batch: Batch, reason: str) -> None:
        self._followers.fail(model, reason)
        leaving = self._followers.leaving()
        for sequence in self._held.values():
            if sequence.effect.model == model and sequence.running and not sequence.leaving:
                leaving.append((self._engines[model], sequence.key))
                batch.fail(sequence, reason)
        if leaving:
            await self._runtime.cancel(leaving)

    # ---- making durable, showing, stating ------------------------------------------------------------------------

    async def _make_durable(self) -> None:
        while True:
            await self._wait_for_pages()
            while self._unshown:
                sequence = self._held.get(_first(self._unshown))
                del self._unshown[_first(self._unshown)]
                if sequence is not None and sequence.start is not None:
                    await self._showing.show(sequence)
            if self._batch is not None:
                batch, self._batch = self._batch, None
                await self._settle(batch)
                self._batch_taken.set()

    async def _wait_for_pages(self) -> None:
        while not self._durable_wanted.is_set():
            try:
                async with asyncio.timeout(KEEPALIVE_SECONDS):
                    await self._durable_wanted.wait()
            except TimeoutError:
                if self._writer.last:
                    await self._writer.append(encode_page(Page(self._pages, ())))
                    self._pages += 1
        self._durable_wanted.clear()

    async def _settle(self, batch: Batch) -> None:
        """Append what a step led to; show it, and state what ended, once it is acknowledged."""
        if batch.entries:
            for payload, entries in split_pages(batch.entries, self._pages):
                sequence_number = await self._writer.append(payload)
                self._pages += 1
                for sequence, part in entries:
                    sequence.acknowledge(part, sequence_number)
                for sequence, _ in entries:
                    await self._showing.show(sequence)
                    if sequence.ended:
                        moved = sequence.end == "handed-over"
                        self._let_go(sequence, sequence.released() if moved else sequence.finished(self._now()))
        for sequence in batch.failed:
            self._let_go(sequence, sequence.failed())
        self._report_progress()

    def _let_go(self, sequence: HeldSequence, answer: Message) -> None:
        del self._held[sequence.key]
        how = {"end": sequence.end or "failed", "position": sequence.durable}
        logger.info("sequence ended", extra=self._fields(sequence) | how)
        self._epoch.state(answer, answers=sequence.number)

    def _fields(self, sequence: HeldSequence) -> dict[str, Any]:
        """What a line in the log says of a sequence: never what it is asked or answers."""
        effect = sequence.effect
        epoch = self._epoch.number
        return {"request": effect.request, "attempt": effect.attempt, "model": effect.model, "epoch": epoch}

    def _report_progress(self) -> None:
        now = self._now()
        if now - self._progress_at < PROGRESS_SECONDS or self._epoch.backlog >= FACTS_IN_FLIGHT // 2:
            return
        moving = [held for held in self._held.values() if held.durable > held.effect.position]
        if moving:
            self._progress_at = now
            self._epoch.state(ProgressReported(tuple(held.progress() for held in moving[:PROGRESS_LIMIT])))

    def _show_soon(self, sequence: HeldSequence) -> None:
        self._unshown[sequence.key] = True
        self._durable_wanted.set()


def _reader(reply: ReplyTo) -> ReplyReader:
    return ReplyReader(reply, reply.start)


def _first(keys: dict[str, bool]) -> str:
    return next(iter(keys))
