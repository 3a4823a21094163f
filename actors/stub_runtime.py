"""A worker's machinery without models: stub engines in the event loop's own time, for simulation and benches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.worker_runtime import AheadModel, AttachRefused, EncodedPrompt, StepResult, sampling_of
from bus.messages import Generation
from models.contract import Engine, Sampling, SequenceStart
from models.stub import StubEngine, stub_texts

VOCABULARY = 1000


class StubRuntime:
    """Obeys `actors.worker_runtime.WorkerRuntime`.

    `refuse` maps models to the reason why they cannot be attached; `full`: nothing can, the device has less memory than
    was said. `broken` maps models to the error that their next step breaks off with (it is taken out then). Prompts
    become one token per byte.
    """

    device = "stub"
    works_ahead = False

    def __init__(
        self,
        *,
        step_seconds: float = 0.0,
        attach_seconds: float = 0.0,
        prefill_chunk: int = 256,
        eos: frozenset[int] = frozenset(),
        full: bool = False,
    ) -> None:
        self.full = full
        self.step_seconds = step_seconds
        self.attach_seconds = attach_seconds
        self.prefill_chunk = prefill_chunk
        self.eos = eos
        self.refuse: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self.engines: dict[str, StubEngine] = {}

    async def reset(self) -> None:
        self.engines.clear()

    async def attach(
        self, model: str, digest: str, *, slots: int, kv_bytes: int, context: int, streamed: bool = False
    ) -> Engine:
        if self.attach_seconds:
            await asyncio.sleep(self.attach_seconds)
        if self.full:
            raise AttachRefused("the device has no memory left", retry=True)
        reason = self.refuse.get(model)
        if reason is not None:
            raise AttachRefused(reason)
        engine = StubEngine(
            slots=slots,
            context=context,
            vocabulary=VOCABULARY,
            prefill_chunk=self.prefill_chunk,
            eos=self.eos,
        )
        self.engines[model] = engine
        return engine

    async def begin_ahead(self, model: str, *, slots: int, kv_bytes: int, context: int) -> AheadModel | None:
        return None

    async def detach(self, model: str) -> None:
        self.engines.pop(model, None)

    async def encode(self, model: str, generation: Generation) -> EncodedPrompt:
        if generation.inputs is not None:
            inputs = tuple(tuple(item.encode()) if isinstance(item, str) else item for item in generation.inputs)
            return EncodedPrompt((), Sampling(len(inputs)), inputs)
        if generation.tokens is not None:
            prompt = generation.tokens
        elif generation.messages is not None:
            prompt = tuple("".join(f"{m.role}: {m.content}\n" for m in generation.messages).encode())
        else:
            prompt = tuple((generation.prompt or "").encode())
        return EncodedPrompt(prompt, sampling_of(generation, Sampling(max_tokens=1)))

    async def texts(self, model: str, start: SequenceStart) -> tuple[str, ...]:
        return stub_texts(start, self.eos)

    async def cancel(self, sequences: Sequence[tuple[Engine, str]]) -> None:
        for engine, key in sequences:
            engine.cancel(key)

    async def step(self, engines: Sequence[tuple[str, Engine]]) -> list[StepResult]:
        await asyncio.sleep(self.step_seconds)
        results = []
        for model, engine in engines:
            error = self.broken.pop(model, "")
            results.append(StepResult(model, [], error) if error else StepResult(model, engine.step()))
        return results
