"""From an effect to a sequence that an engine can admit: prompt, earlier tokens, sampling, and their texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import msgspec

from actors.worker_prompts import Earlier, Prompts
from actors.worker_runtime import AttachRefused, PromptRefused, WorkerRuntime
from bus.messages import StartSequence
from models.contract import Engine, Sampling, SequenceStart


class Prepared(NamedTuple):
    """What a sequence starts from; `earlier` has what stands beside the tokens that others decoded."""

    start: SequenceStart
    texts: tuple[str, ...]
    earlier: Earlier


class Preparing:
    """Gathers for one worker; `engines` are those that are attached at the moment."""

    def __init__(self, prompts: Prompts, runtime: WorkerRuntime, engines: Mapping[str, Engine]) -> None:
        self._prompts = prompts
        self._runtime = runtime
        self._engines = engines

    async def gather(self, effect: StartSequence) -> Prepared:
        """Raises `AttachRefused`, `PromptRefused` or `NotKept`."""
        if effect.model not in self._engines:
            raise AttachRefused(f"{effect.model} is not attached here", retry=True)
        generation = effect.generation or await self._prompts.generation(effect)
        generation = await self._prompts.assembled(generation)
        earlier = await self._prompts.earlier(
            effect, logprobs=generation.logprobs >= 0, vectors=generation.inputs is not None
        )
        if effect.choice is not None:
            generation = msgspec.structs.replace(generation, seed=generation.seed + effect.choice.index)
        key = f"{effect.request}/{effect.attempt}"
        encoded = await self._runtime.encode(effect.model, generation)
        if encoded.inputs:
            start = SequenceStart(key, (), earlier.tokens, encoded.sampling, encoded.inputs)
            return Prepared(start, ("",) * len(earlier.tokens), earlier)
        sampling = self._fit(effect.model, len(encoded.prompt), encoded.sampling)
        start = SequenceStart(key, encoded.prompt, earlier.tokens, sampling)
        texts = await self._runtime.texts(effect.model, start) if earlier.tokens else ()
        return Prepared(start, texts, earlier)

    def _fit(self, model: str, prompt_tokens: int, sampling: Sampling) -> Sampling:
        """The answer is cut to what the context leaves. Raises `PromptRefused` where that is nothing."""
        engine = self._engines.get(model)
        if engine is None:
            raise AttachRefused(f"{model} is not attached here any more", retry=True)
        if not prompt_tokens:
            raise PromptRefused("the prompt has no tokens: send at least one")
        if prompt_tokens >= engine.context:
            raise PromptRefused(
                f"the prompt has {prompt_tokens} tokens, the context of {model} is {engine.context}: shorten it"
            )
        return replace(sampling, max_tokens=min(sampling.max_tokens, engine.context - prompt_tokens))
