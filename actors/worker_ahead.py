"""What a worker begins before it is told to: a model that is on its way to DRAM, and the prompt that it is wanted for.

    instance.start (placement > this worker's half) ─▶ weights on their way ─▶ built, prompt prefilled layer by layer
                                        model.attach ─▶ what is ready already becomes the instance

Rules
* The ledger is read for hints; no effect is obeyed here and no fact stated. Loads, failures, cancelling and the order
  of everything in the ledger are as if there were none of this.
* The prompt is that of the accepted request in whose step the model was started; without one it is only built.
* It yields: while anything else can be computed here, nothing is computed ahead.
* What is not attached soon after its weights are there, or whose start is given up, is let go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from actors.worker_prompts import NotKept, Prompts
from actors.worker_runtime import AheadModel, PromptRefused, WorkerRuntime
from bus.contract import BusError, Log, Record
from bus.messages import AbandonStart, StartInstance, decode_said, decode_said_body
from bus.subjects import Subjects
from bus.tasks import Tasks

UNATTACHED_SECONDS = 2.0
RETRY_SECONDS = 1.0

logger = logging.getLogger("longshore.worker")


class WorkAhead:
    """All that one epoch of the worker `name` begins ahead. `wanted` is called when `step` has something to compute."""

    def __init__(
        self,
        ledger: Log,
        subjects: Subjects,
        name: str,
        prompts: Prompts,
        runtime: WorkerRuntime,
        tasks: Tasks,
        wanted: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._hints = subjects.said("placement", name, "instance.*")
        self._prompts = prompts
        self._runtime = runtime
        self._tasks = tasks
        self._wanted = wanted
        self._begun: dict[str, asyncio.Task[None]] = {}
        self._models: dict[str, AheadModel] = {}

    async def listen(self) -> None:
        """For ever."""
        while True:
            try:
                await self._listen()
            except BusError as error:
                logger.info("nothing is begun ahead for a moment: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self) -> None:
        usage = await self._ledger.usage()
        reader = await self._ledger.read([self._hints], start=usage.last_sequence + 1)
        try:
            while True:
                for record in await reader.batch():
                    self._hear(record)
        finally:
            await reader.close()

    def _hear(self, record: Record) -> None:
        try:
            envelope = decode_said(record.payload)
            message = decode_said_body(envelope.body)
        except (msgspec.DecodeError, ValueError):
            return
        if isinstance(message, StartInstance | AbandonStart) and (task := self._begun.pop(message.model, None)):
            task.cancel()
        if isinstance(message, StartInstance):
            self._begun[message.model] = self._tasks.spawn(self._begin(message, envelope.fact), "begins ahead")

    async def _begin(self, message: StartInstance, fact: int) -> None:
        try:
            await self._work(message, fact)
        except Exception as error:  # a hint that leads nowhere ends no epoch
            logger.warning("%s was begun ahead in vain: %s: %s", message.model, type(error).__name__, error)

    async def _work(self, message: StartInstance, fact: int) -> None:
        model = message.model
        made = await self._runtime.begin_ahead(
            model, slots=message.slots, kv_bytes=message.kv_bytes, context=message.context
        )
        if made is None:
            return
        self._models[model] = made
        try:
            if await self._foresee(made, model, fact):
                self._wanted()
            if await made.arrived():
                await asyncio.sleep(UNATTACHED_SECONDS)
        finally:
            if self._models.get(model) is made:
                del self._models[model]
            made.drop()

    async def _foresee(self, made: AheadModel, model: str, fact: int) -> bool:
        try:
            generation = await self._prompts.asked(fact, model)
            return generation is not None and await made.foresee(generation)
        except (NotKept, PromptRefused) as refused:
            logger.debug("a prompt that is not prefilled ahead: %s", refused)
            return False

    # ---- between the steps of others ----------------------------------------------------------------------------

    @property
    def next(self) -> tuple[str, AheadModel] | None:
        """What has something to compute, if anything."""
        return next(((model, made) for model, made in self._models.items() if made.wants_step), None)
