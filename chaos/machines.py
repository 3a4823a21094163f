"""What simulated drivers compute and load with: stub engines and a stub storage with latencies and named failures."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from actors.store_driver import Loaded, StorageFailed
from actors.stub_runtime import StubRuntime
from actors.stub_storage import StubStorage
from actors.worker_runtime import AttachRefused, EncodedPrompt, PromptRefused, StepResult
from bus.messages import Generation, ModelCard
from chaos.options import Options

REFUSED_PROMPT = "refused "
"""No engine takes prompts that begin so."""

Admitted = Callable[[str, Any], None]
Over = Callable[[str], None]
"""Told in one sentence that a budget is exceeded."""


class _Engine:
    """A stub engine that tells `admitted` of every start, and with a `salt` decodes tokens of its own."""

    def __init__(self, engine: Any, model: str, salt: int, admitted: Admitted) -> None:
        self._engine = engine
        self._model = model
        self._salt = salt
        self._admitted = admitted

    @property
    def slots(self) -> int:
        return int(self._engine.slots)

    @property
    def context(self) -> int:
        return int(self._engine.context)

    def admit(self, start: Any) -> None:
        self._admitted(self._model, start)
        sampling = dataclasses.replace(start.sampling, seed=start.sampling.seed ^ self._salt)
        self._engine.admit(dataclasses.replace(start, sampling=sampling))

    def cancel(self, key: str) -> bool:
        return bool(self._engine.cancel(key))

    def active(self) -> int:
        return int(self._engine.active())

    def busy(self) -> bool:
        return bool(self._engine.busy())

    def extend(self, key: str, tokens: Any) -> None:
        self._engine.extend(key, tokens)

    def left(self, key: str) -> int:
        return int(self._engine.left(key))

    def release(self, key: str) -> None:
        self._engine.release(key)

    def step(self) -> list[Any]:
        events: list[Any] = self._engine.step()
        return events


class SimulatedRuntime(StubRuntime):
    """The machinery of one worker process. `active()` false: nothing fails by itself any more."""

    def __init__(
        self, random: Random, options: Options, active: Callable[[], bool], admitted: Admitted, over: Over
    ) -> None:
        step_seconds = options.step_ms / 1000 * (0.25 + 1.5 * random.random())
        super().__init__(
            step_seconds=step_seconds, eos=frozenset(range(options.eos_tokens)), prefill_chunk=options.prefill_chunk
        )
        self._random = random
        self._options = options
        self._active = active
        self._told = admitted
        self._over = over
        self.used: dict[str, int] = {}

    def _fails(self, odds: float) -> bool:
        return self._active() and self._random.random() < odds

    async def reset(self) -> None:
        self.used.clear()
        await super().reset()

    async def attach(
        self, model: str, digest: str, *, slots: int, kv_bytes: int, context: int, streamed: bool = False
    ) -> Any:
        await asyncio.sleep(0.01 + 0.2 * self._random.random())
        if model == self._options.cursed:
            raise AttachRefused(f"{model} has a tensor that no engine knows")
        if self._fails(self._options.troubles.attach_failed):
            raise AttachRefused("the device has no memory left", retry=True)
        engine = await super().attach(model, digest, slots=slots, kv_bytes=kv_bytes, context=context, streamed=streamed)
        weights = next(card.weight_bytes for card in self._options.models if card.model == model)
        self.used[model] = weights + kv_bytes
        if sum(self.used.values()) > self._options.memory_bytes:
            self._over(f"a device of {self._options.memory_bytes} bytes holds {self.used}")
        salt = self._random.getrandbits(32) if self._options.wobble else 0
        return _Engine(engine, model, salt, self._told)

    async def detach(self, model: str) -> None:
        self.used.pop(model, None)
        await super().detach(model)

    async def encode(self, model: str, generation: Generation) -> EncodedPrompt:
        await asyncio.sleep(0.002 * self._random.random())
        text = generation.prompt or (str(generation.inputs[0]) if generation.inputs else "")
        if text.startswith(REFUSED_PROMPT):
            raise PromptRefused("the tokenizer knows no such text")
        if self._fails(self._options.troubles.sequence_refused):
            raise AttachRefused("the engine has just lost its slots", retry=True)
        return await super().encode(model, generation)

    async def step(self, engines: Sequence[tuple[str, Any]]) -> list[StepResult]:
        for model, _ in engines:
            if self._fails(self._options.troubles.engine_broken * 0.05):
                self.broken[model] = "a kernel has failed"
        return await super().step(engines)


class SimulatedStorage(StubStorage):
    """The disk and the DRAM of one server; both outlive its storage driver. Server 0 holds every model."""

    def __init__(self, options: Options, number: int, active: Callable[[], bool], over: Over) -> None:
        random = seeded("storage", options.seed, number)
        if options.scattered:
            cards = tuple(
                card
                for place, card in enumerate(options.models)
                if not place or place % options.servers == number or random.random() < 0.15
            )
        else:
            cards = tuple(card for card in options.models if number == 0 or random.random() < options.held)
        cards = tuple(card for card in cards if card.model not in options.sources or random.random() < 0.25)
        self._ever = {card.model: True for card in cards}
        super().__init__(cards, bytes_per_second=random.randint(100, 2000) * 1024, remote_times=options.remote_times)
        self.remote = {source_of(card.model): card for card in options.models if card.model in options.sources}
        self.origins = {card.model: source_of(card.model) for card in cards if card.model in options.sources}
        self.peers: dict[str, SimulatedStorage] = {}
        self._fetching: dict[str, int] = {}
        self._random = random
        self._options = options
        self._active = active
        self._over = over

    def pack(self, card: ModelCard) -> None:
        """Put a model on the disk, unless it lies there already or never did."""
        if card.model in self._ever:
            self.cards.setdefault(card.model, card)

    async def load(
        self, model: str, digest: str, sources: tuple[str, ...] = (), urgent: bool = True, streamed: bool = False
    ) -> Loaded:
        if self._active() and self._random.random() < self._options.troubles.load_failed:
            await asyncio.sleep(0.1 * self._random.random())
            raise StorageFailed(f"{model} could not be read")
        if model not in self.cards and sources:
            self._fetching[model] = next(card.weight_bytes for card in self._options.models if card.model == model)
            self._see_disk()
        try:
            loaded = await super().load(model, digest, sources, urgent, streamed)
        finally:
            self._fetching.pop(model, None)
        used = {name: self.cards[name].weight_bytes for name in self.resident}
        if sum(used.values()) > self._options.dram_bytes:
            self._over(f"a DRAM budget of {self._options.dram_bytes} bytes holds {used}")
        return loaded

    def _see_disk(self) -> None:
        used = {name: card.weight_bytes for name, card in self.cards.items()} | self._fetching
        if self._options.ssd_bytes and sum(used.values()) > self._options.ssd_bytes:
            self._over(f"a disk of {self._options.ssd_bytes} bytes holds {used}")

    def _at_source(self, model: str, digest: str, sources: tuple[str, ...]) -> ModelCard:
        """From another server, or a source; any of them may fail, then the next is asked."""
        answering = []
        for source in sources:
            if self._active() and self._random.random() < self._options.troubles.source_failed:
                continue
            peer = self.peers.get(source.rpartition("/")[0])
            if peer is None:
                answering.append(source)
            elif model in peer.cards and peer.cards[model].digest == digest:
                return peer.cards[model]
        return super()._at_source(model, digest, tuple(answering))


def source_of(model: str) -> str:
    return f"/elsewhere/{model}"


class Undisturbed(NamedTuple):
    """What a sequence gives on an engine of its own, from its beginning."""

    tokens: list[int]
    vectors: list[bytes]
    end: str


async def undisturbed(start: Any, context: int, eos_tokens: int) -> Undisturbed:
    eos = frozenset(range(eos_tokens))
    engine = await StubRuntime(eos=eos, prefill_chunk=4096).attach("m", "", slots=1, kv_bytes=1, context=context)
    engine.admit(dataclasses.replace(start, generated=(), held=False))
    tokens: list[int] = []
    vectors: list[bytes] = []
    while True:
        events: Any = engine.step()
        for event in events:
            if start.inputs:
                tokens += event.counts
                vectors += event.vectors
                if event.done:
                    return Undisturbed(tokens, vectors, "stop")
                continue
            tokens.append(event.token)
            if event.end is not None:
                return Undisturbed(tokens, vectors, event.end)


def seeded(*parts: object) -> Random:
    """A generator for one purpose: what one process draws does not shift what another one does."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return Random(int.from_bytes(digest, "little"))
