"""A worker's machinery on this server's device: packed models that lie in DRAM, transformers, one computing thread.

Steps run in one thread, one after the other. Attaching has a thread of its own, and so have tokenizing and
detokenizing, so that neither the event loop nor a step waits for them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from actors.local_ahead import AheadModel
from actors.worker_runtime import AttachRefused, EncodedPrompt, PromptRefused, StepResult, sampling_of
from bus.messages import Generation, Input
from bus.subjects import escape_model, unescape_model
from loaders import CheckpointError, Manifest, load_checkpoint, open_checkpoint, read_manifest
from loaders.arrival import Arrival, arrival_path
from loaders.manifest import MANIFEST_NAME
from loaders.shared_memory_tier import weights_directory
from models.contract import Engine, Sampling, SequenceStart
from models.errors import ModelError
from models.instance import Instance, Prepared, load_instance, prepare, text_decoder
from models.sequence import answer_texts
from models.warming import warm_up

RESET_SECONDS = 30.0
IDLE_SECONDS = 0.5
"""A device counts as idle when it has computed nothing for so long."""
ARRIVAL_SECONDS = 0.003
EXPECTED_SECONDS = 60.0
"""How often at first, and how long, is looked whether the weights of a model that is to start are on their way."""
PREPARED_LIMIT = 8
"""Models that are prepared at most; most of one is its tokenizer, up to some tens of megabytes."""

Got = TypeVar("Got")

logger = logging.getLogger("longshore.worker")


class LocalRuntime:
    """Obeys `actors.worker_runtime.WorkerRuntime`. `models` is the directory of packed models, `dram` that of their
    copies in shared memory, where the server has such.

    What can be done before a model is wanted is done while the device is idle (`keep_prepared`): an attach then only
    maps the weights and puts them in their places. What is on its way to DRAM, as the store says in `arrivals`, is
    begun ahead (`actors.local_ahead`).

    A thread that does not come back cannot be ended: after `RESET_SECONDS` of waiting for it `give_up` is called,
    which is to end the process.
    """

    def __init__(
        self,
        models: Path,
        *,
        device: str = "cpu",
        dram: Path | None = None,
        arrivals: Path | None = None,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self.device = device
        self._dram = dram
        self._arrivals = arrivals
        self._expected: dict[str, object] = {}
        self._ahead: dict[str, AheadModel] = {}
        self._models = models
        self._give_up = give_up
        self._instances: dict[str, Instance] = {}
        self._prepared: dict[str, tuple[Manifest, Prepared]] = {}
        self._hopeless: dict[str, Manifest] = {}
        self._stepped_at = 0.0
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._attaching = ThreadPoolExecutor(1, thread_name_prefix="attaches")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encodes")
        self._mapping = ThreadPoolExecutor(1, thread_name_prefix="maps")

    @property
    def works_ahead(self) -> bool:
        return self._arrivals is not None and self.device == "cpu"

    async def reset(self) -> None:
        self._expected.clear()
        for made in list(self._ahead.values()):
            made.interrupt()
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

    async def attach(
        self, model: str, digest: str, *, slots: int, kv_bytes: int, context: int, streamed: bool = False
    ) -> Engine:
        self._expected.pop(model, None)
        instance = await self._in(
            self._attaching, lambda: self._load(model, digest, slots, kv_bytes, context, streamed)
        )
        return instance.engine

    async def begin_ahead(self, model: str, *, slots: int, kv_bytes: int, context: int) -> AheadModel | None:
        if self._arrivals is None or not self.works_ahead:
            return None
        expected = self._expected[model] = object()
        arrival = await self._arrival(arrival_path(self._arrivals, escape_model(model)), model, expected)
        if arrival is None:
            return None
        making = asyncio.ensure_future(
            self._in(self._attaching, lambda: self._begin(model, arrival, slots, kv_bytes, context))
        )
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_drop)  # the thread makes it all the same
            raise

    async def _arrival(self, path: Path, model: str, expected: object) -> Arrival | None:
        began = time.monotonic()
        try:
            while self._expected.get(model) is expected and (waited := time.monotonic() - began) < EXPECTED_SECONDS:
                found = Arrival.find(path)
                if found is not None:
                    return found
                await asyncio.sleep(ARRIVAL_SECONDS + waited / 100)
            return None
        finally:
            if self._expected.get(model) is expected:
                del self._expected[model]

    async def detach(self, model: str) -> None:
        await self._in(self._computing, lambda: self._close(model))

    async def encode(self, model: str, generation: Generation) -> EncodedPrompt:
        return await self._in(self._encoding, lambda: self._encode(model, self._instances.get(model), generation))

    async def texts(self, model: str, start: SequenceStart) -> tuple[str, ...]:
        return await self._in(self._encoding, lambda: self._texts(model, start))

    async def cancel(self, sequences: Sequence[tuple[Engine, str]]) -> None:
        await self._in(self._computing, lambda: [engine.cancel(key) for engine, key in sequences])

    async def keep_prepared(self) -> None:
        """For ever: whenever nothing has been computed for a moment, prepare one more of the models that lie here."""
        await self._in(self._computing, warm_up)
        while True:
            await asyncio.sleep(IDLE_SECONDS)
            while time.monotonic() - self._stepped_at > IDLE_SECONDS and not self._ahead:
                if not await self._in(self._attaching, self._prepare_one):
                    break

    async def step(self, engines: Sequence[tuple[str, Engine]]) -> list[StepResult]:
        self._stepped_at = time.monotonic()
        return await self._in(self._computing, lambda: [_step(model, engine) for model, engine in engines])

    def close(self) -> None:
        """Let the threads end; whatever they are at is waited for by nobody."""
        for threads in (self._attaching, self._encoding, self._computing, self._mapping):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], Got]) -> Got:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    # ---- in a thread ------------------------------------------------------------------------------------------

    def _begin(self, model: str, arrival: Arrival, slots: int, kv_bytes: int, context: int) -> AheadModel | None:
        """Whatever goes wrong here is told by the attach, if there is one."""
        if model in self._instances:
            arrival.close()
            return None
        try:
            made = AheadModel(
                self._models / escape_model(model),
                arrival,
                self._prepared.pop(model, None),
                slots=slots,
                kv_bytes=kv_bytes,
                context=context,
                threads=self._computing,
                encode=lambda instance, generation: self._in(
                    self._encoding, lambda: self._encode(model, instance, generation)
                ),
                let_go=lambda one: self._let_go(model, one),
            )
        except Exception as error:  # a checkpoint of others' making
            arrival.close()
            logger.info("%s is not begun ahead: %s", model, _line(error))
            return None
        if (older := self._ahead.pop(model, None)) is not None:
            older.interrupt()
            self._computing.submit(older.close)
        self._ahead[model] = made
        return made

    def _let_go(self, model: str, made: AheadModel) -> bool:
        if self._ahead.get(model) is not made:
            return False
        del self._ahead[model]
        self._computing.submit(made.close)
        return True

    def _load(self, model: str, digest: str, slots: int, kv_bytes: int, context: int, streamed: bool) -> Instance:
        made = self._ahead.pop(model, None)
        if made is not None and not streamed and made.fits(digest, slots, kv_bytes, context):
            try:
                instance = self._instances[model] = made.take()
                return instance
            except CheckpointError as error:
                logger.warning("%s is attached anew: %s", model, error)
        if made is not None:
            made.interrupt()
            self._computing.submit(made.close)
        try:
            directory = self._models / escape_model(model)
            if self._dram is not None and not streamed:
                directory = weights_directory(self._dram, directory)
            checkpoint = open_checkpoint(directory, verify=False, populate=False)
            if checkpoint.manifest.digest != digest:
                raise AttachRefused(f"the weights of {model} here are not the ones that were placed", retry=True)
            manifest, prepared = self._prepared.pop(model, (None, None))
            mapping = self._mapping.submit(checkpoint.map_pages) if self.device == "cpu" and not streamed else None
            tensors = checkpoint.tensors
            if streamed:
                # Into memory of this worker's own, or through a ring of chunks onto its device: checked on the way.
                tensors = load_checkpoint(directory, device=self.device, way="direct").tensors
            instance = load_instance(
                directory,
                tensors,
                device=self.device,
                kv_bytes=kv_bytes,
                max_slots=slots,
                context=context,
                encoder=checkpoint.manifest.kind == "encoder",
                prepared=prepared if manifest == checkpoint.manifest else None,
            )
            if mapping is not None:
                mapping.result()
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

    def _prepare_one(self) -> bool:
        """Prepare a model that lies here and is not attached, the ones packed last first; False where none is left."""
        for directory in packed_directories(self._models)[:PREPARED_LIMIT]:
            try:
                model = unescape_model(directory.name)
                manifest = read_manifest(directory)
            except (CheckpointError, ValueError):
                continue
            known = self._prepared.get(model, (None, None))[0]
            if model in self._instances or manifest in (known, self._hopeless.get(model)):
                continue
            self._prepared.pop(model, None)
            try:
                checkpoint = open_checkpoint(directory, verify=False, populate=False)
                encoder = checkpoint.manifest.kind == "encoder"
                prepared = prepare(directory, checkpoint.tensors, encoder=encoder)
            except Exception as error:  # whoever attaches it is told
                logger.info("%s cannot be prepared: %s", model, _line(error))
                self._hopeless[model] = manifest
                return True
            assert prepared.skeleton is not None
            prepared.skeleton.empty()
            self._prepared[model] = (checkpoint.manifest, prepared)
            while len(self._prepared) > PREPARED_LIMIT:
                del self._prepared[next(iter(self._prepared))]
            return True
        return False

    def _close(self, model: str) -> None:
        instance = self._instances.pop(model, None)
        if instance is not None:
            instance.close()

    def _close_all(self) -> None:
        for model in list(self._instances):
            self._close(model)
        while self._ahead:
            self._ahead.popitem()[1].close()

    def _encode(self, model: str, instance: Instance | None, generation: Generation) -> EncodedPrompt:
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


def packed_directories(models: Path) -> list[Path]:
    """Directories of packed models, the ones packed last first."""
    found = []
    try:
        for path in models.iterdir():
            manifest = path / MANIFEST_NAME
            if not path.name.startswith(".") and manifest.is_file():
                found.append((-manifest.stat().st_mtime_ns, path))
    except OSError:  # one is deleted at this very moment: the next look finds the others
        pass
    return [path for _, path in sorted(found)]


def _step(model: str, engine: Engine) -> StepResult:
    try:
        return StepResult(model, engine.step())
    except Exception as error:  # whatever the libraries below raise: its sequences fail, the worker goes on
        return StepResult(model, [], _line(error))


def _drop(making: asyncio.Future[AheadModel | None]) -> None:
    if not making.cancelled() and not making.exception() and (made := making.result()) is not None:
        made.drop()


def _line(error: Exception) -> str:
    """An error of a library as part of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__
