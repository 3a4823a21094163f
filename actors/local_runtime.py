"""A worker's machinery on this server's device: packed models that lie in DRAM, transformers, one computing thread.

Steps run in one thread, one after the other. Attaching has a thread of its own, and so have tokenizing and
detokenizing, so that neither the event loop nor a step waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from actors.worker_runtime import AttachRefused, EncodedPrompt, PromptRefused, StepResult, sampling_of
from bus.messages import Generation, Input
from bus.subjects import escape_model
from loaders import CheckpointError, open_checkpoint
from models.contract import Engine, Sampling, SequenceStart
from models.errors import ModelError
from models.instance import Instance, load_instance, text_decoder
from models.sequence import answer_texts

RESET_SECONDS = 30.0

Got = TypeVar("Got")


class LocalRuntime:
    """Obeys `actors.worker_runtime.WorkerRuntime`. `models` is the directory of packed models.

    A thread that does not come back cannot be ended: after `RESET_SECONDS` of waiting for it `give_up` is called,
    which is to end the process.
    """

    def __init__(self, models: Path, *, device: str = "cpu", give_up: Callable[[], None] | None = None) -> None:
        self.device = device
        self._models = models
        self._give_up = give_up
        self._instances: dict[str, Instance] = {}
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._attaching = ThreadPoolExecutor(1, thread_name_prefix="attaches")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encodes")

    async def reset(self) -> None:
        # Whatever a cancelled call left in the threads is over once these return.
        try:
            async with asyncio.timeout(RESET_SECONDS):
                await self._in(self._attaching, lambda: None)
                await self._in(self._encoding, lambda: None)
                await self._in(self._computing, self._close_all)
        except TimeoutError:
            if self._give_up is not None:
                self._give_up()
            raise

    async def attach(self, model: str, digest: str, *, slots: int, kv_bytes: int, context: int) -> Engine:
        instance = await self._in(self._attaching, lambda: self._load(model, digest, slots, kv_bytes, context))
        return instance.engine

    async def detach(self, model: str) -> None:
        await self._in(self._computing, lambda: self._close(model))

    async def encode(self, model: str, generation: Generation) -> EncodedPrompt:
        return await self._in(self._encoding, lambda: self._encode(model, generation))

    async def texts(self, model: str, start: SequenceStart) -> tuple[str, ...]:
        return await self._in(self._encoding, lambda: self._texts(model, start))

    async def cancel(self, sequences: Sequence[tuple[Engine, str]]) -> None:
        await self._in(self._computing, lambda: [engine.cancel(key) for engine, key in sequences])

    async def step(self, engines: Sequence[tuple[str, Engine]]) -> list[StepResult]:
        return await self._in(self._computing, lambda: [_step(model, engine) for model, engine in engines])

    def close(self) -> None:
        """Let the threads end; whatever they are at is waited for by nobody."""
        for threads in (self._attaching, self._encoding, self._computing):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], Got]) -> Got:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    # ---- in a thread ------------------------------------------------------------------------------------------

    def _load(self, model: str, digest: str, slots: int, kv_bytes: int, context: int) -> Instance:
        try:
            directory = self._models / escape_model(model)
            checkpoint = open_checkpoint(directory, verify=False, populate=False)
            if checkpoint.manifest.digest != digest:
                raise AttachRefused(f"the weights of {model} here are not the ones that were placed", retry=True)
            instance = load_instance(
                directory,
                checkpoint.tensors,
                device=self.device,
                kv_bytes=kv_bytes,
                max_slots=slots,
                context=context,
                encoder=checkpoint.manifest.kind == "encoder",
            )
        except (CheckpointError, ModelError) as error:
            raise AttachRefused(str(error)) from error
        except AttachRefused:
            raise
        except MemoryError as error:
            raise AttachRefused(f"{model} does not fit into the memory of this worker", retry=True) from error
        except Exception as error:  # a checkpoint of others' making must not end the worker
            raise AttachRefused(f"{model} cannot be attached: {_line(error)}") from error
        self._instances[model] = instance
        return instance

    def _close(self, model: str) -> None:
        instance = self._instances.pop(model, None)
        if instance is not None:
            instance.close()

    def _close_all(self) -> None:
        for model in list(self._instances):
            self._close(model)

    def _encode(self, model: str, generation: Generation) -> EncodedPrompt:
        instance = self._instances.get(model)
        if instance is None:
            raise AttachRefused(f"{model} is not attached here any more", retry=True)
        try:
            if generation.inputs is not None:
                inputs = _encode_inputs(instance, generation.inputs)
                return EncodedPrompt((), Sampling(len(inputs)), inputs)
            if generation.tokens is not None:
                prompt = generation.tokens
            elif generation.messages is not None:
                messages = [{"role": m.role, "content": m.content} for m in generation.messages]
                prompt = tuple(instance.encode_chat(messages))
            else:
                prompt = tuple(instance.encode_prompt(generation.prompt or ""))
        except ModelError as error:
            raise PromptRefused(str(error)) from error
        except Exception as error:  # tokenizers are programs of others
            raise PromptRefused(f"the tokenizer of {model} does not take this prompt: {_line(error)}") from error
        return EncodedPrompt(prompt, sampling_of(generation, instance.defaults.sampling))

    def _texts(self, model: str, start: SequenceStart) -> tuple[str, ...]:
        instance = self._instances.get(model)
        if instance is None:
            raise AttachRefused(f"{model} is not attached here any more", retry=True)
        return answer_texts(start, text_decoder(instance.tokenizer), instance.defaults.eos)


def _encode_inputs(instance: Instance, inputs: tuple[Input, ...]) -> tuple[tuple[int, ...], ...]:
    texts = iter(instance.encode_inputs([item for item in inputs if isinstance(item, str)]))
    return tuple(tuple(next(texts)) if isinstance(item, str) else item for item in inputs)


def _step(model: str, engine: Engine) -> StepResult:
    try:
        return StepResult(model, engine.step())
    except Exception as error:  # whatever the libraries below raise: its sequences fail, the worker goes on
        return StepResult(model, [], _line(error))


def _line(error: Exception) -> str:
    """An error of a library as part of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__
