"""A worker's machinery without models: stub engines in the event loop's own time, for simulation and benches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.worker_runtime import AttachRefused, EncodedPrompt, StepResult
from bus.messages import Generation
from models.contract import Engine, Sampling, SequenceStart
from models.stops import StopFilter
from models.stub import StubEngine

VOCABULARY = 1000


class StubRuntime:
    """Obeys `actors.worker_runtime.WorkerRuntime`.

    `refuse` maps models to the reason why they cannot be attached; `broken` maps models to the error that their next
    step breaks off with (it is taken out then). Prompts become one token per byte.
    """

    device = "stub"

    def __init__(
        self,
        *,
        step_seconds: float = 0.0,
        attach_seconds: float = 0.0,
        prefill_chunk: int = 256,
        eos: frozenset[int] = frozenset(),
    ) -> None:
        self.step_seconds = step_seconds
        self.attach_seconds = attach_seconds
        self.prefill_chunk = prefill_chunk
        self.eos = eos
        self.refuse: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self.engines: dict[str, StubEngine] = {}

    async def reset(self) -> None:
        self.engines.clear()

    async def attach(self, model: str, digest: str, *, slots: int, kv_bytes: int, context: int) -> Engine:
        if self.attach_seconds:
            await asyncio.sleep(self.attach_seconds)
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

    async def detach(self, model: str) -> None:
        self.engines.pop(model, None)

    async def encode(self, model: str, generation: Generation) -> EncodedPrompt:
        if generation.tokens is not None:
            prompt = generation.tokens
        elif generation.messages is not None:
            prompt = tuple("".join(f"{m.role}: {m.content}\n" for m in generation.messages).encode())
        else:
            prompt = tuple((generation.prompt or "").encode())
        sampling = Sampling(
            max_tokens=generation.max_tokens,
            temperature=max(0.0, generation.temperature),
            top_p=generation.top_p if generation.top_p > 0 else 1.0,
            top_k=max(0, generation.top_k),
            seed=generation.seed,
            stop=generation.stop,
        )
        return EncodedPrompt(prompt, sampling)

    async def texts(self, model: str, start: SequenceStart) -> tuple[str, ...]:
        stops = StopFilter(start.sampling.stop)
        return tuple("" if token in self.eos else stops.push(f"tok{token} ") for token in start.generated)

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
