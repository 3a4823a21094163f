"""A model that is made ready while its weights are on their way to DRAM: what a worker's machinery does ahead.

Its views lie over memory that fills; a forward pass waits at each layer until its bytes are there and checked. Nothing
of it is seen before the cell has the model attached: what fails until then is as if it had never been begun.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from actors.worker_runtime import EncodedPrompt
from bus.messages import Generation
from loaders.arrival import Arrival, Interrupted
from loaders.arriving_checkpoint import ArrivingCheckpoint
from loaders.layer_gate import LayerGate
from loaders.manifest import Manifest
from models.embedding import EmbeddingEngine
from models.engine import FORESEEN
from models.instance import Instance, Prepared, load_instance, prepare

POLL_SECONDS = 0.01
SPARED_CORES = 1
"""Left to the store while it brings the weights: threads that compute on every core, and wait for each other there,
made loads of 1 s take 2 to 4 s on two cores."""

logger = logging.getLogger("longshore.worker")


class AheadModel:
    """Obeys `actors.worker_runtime.AheadModel`. `threads` is where steps are computed, one after the other.

    `directory` is the model's own; where the arrival names another one, all is read there until it is done. Made in a
    thread; raises what reading and building a model raises.
    """

    def __init__(
        self,
        directory: Path,
        arrival: Arrival,
        prepared: tuple[Manifest, Prepared] | None,
        *,
        slots: int,
        kv_bytes: int,
        context: int,
        threads: ThreadPoolExecutor,
        encode: Callable[[Instance, Generation], Awaitable[EncodedPrompt]],
        let_go: Callable[[AheadModel], bool],
    ) -> None:
        self._arrival = arrival
        self._threads = threads
        self._encode, self._let_go = encode, let_go
        self._stop = threading.Event()
        files = arrival.directory or directory
        self.checkpoint = ArrivingCheckpoint(files, arrival)
        manifest, tensors = self.checkpoint.manifest, self.checkpoint.tensors
        encoder = manifest.kind == "encoder"
        if prepared is not None and prepared[0] == manifest:
            made = prepared[1]
        else:
            # Errors name the model, wherever it stood when it was read.
            made = dataclasses.replace(prepare(files, tensors, encoder=encoder), directory=directory)
        # A file that was not there any more may have been taken for one that the model does not have.
        arrival.check_in_place()
        self.instance: Instance = load_instance(
            directory,
            tensors,
            kv_bytes=kv_bytes,
            max_slots=slots,
            context=context,
            encoder=encoder,
            prepared=made,
        )
        self.gate = LayerGate(made.model, tensors, self._wait)
        self._made_for = manifest.digest, slots, kv_bytes, context
        self._foreseen = False
        self._compute_threads = 1
        """Those of a step after the load."""

    # ---- in the event loop ------------------------------------------------------------------------------------

    async def foresee(self, generation: Generation) -> bool:
        encoded = await self._encode(self.instance, generation)
        engine = self.instance.engine
        assert isinstance(engine, EmbeddingEngine)
        self._foreseen = not encoded.inputs and engine.foresee(encoded.prompt)
        return self._foreseen

    @property
    def wants_step(self) -> bool:
        return self._foreseen and self._arrives

    async def step(self) -> None:
        self._stop.clear()
        await asyncio.get_running_loop().run_in_executor(self._threads, self._step)

    def interrupt(self) -> None:
        self._stop.set()

    async def arrived(self) -> bool:
        while self._arrival.coming:  # noqa: ASYNC110 (another process says so, in memory that is shared with it)
            await asyncio.sleep(POLL_SECONDS)
        return self._arrival.here

    def drop(self) -> None:
        if self._let_go(self):
            self._foreseen = False
            self._stop.set()

    # ---- in threads -------------------------------------------------------------------------------------------

    @property
    def _arrives(self) -> bool:
        return self._arrival.coming or self._arrival.here

    def fits(self, digest: str, slots: int, kv_bytes: int, context: int) -> bool:
        """Whether this is what is to be attached, and every byte of it was checked."""
        return self._made_for == (digest, slots, kv_bytes, context) and self._arrival.here

    def take(self) -> Instance:
        """It is the cell's from now on. Raises CheckpointError where it cannot be mapped."""
        self._foreseen = False
        if not self.checkpoint.mapped:
            self.checkpoint.map_pages()
        self._threads.submit(self._open)  # before any step of it that is asked for later
        return self.instance

    def _open(self) -> None:
        self.gate.open()
        self._arrival.close()
        self.checkpoint.let_go()

    def close(self) -> None:
        """In the thread that computes: let go of it."""
        self._foreseen = False
        self._open()
        self.instance.close()

    def _wait(self, names: list[str]) -> None:
        if self._stop.is_set():
            raise Interrupted("somebody else goes on")
        self.checkpoint.wait(names, self._stop.is_set)
        if not self._arrival.coming:
            torch.set_num_threads(self._compute_threads)

    def _step(self) -> None:
        if not self._foreseen:  # it was let go, or is the cell's, since this was asked for
            return
        engine = self.instance.engine
        assert isinstance(engine, EmbeddingEngine) and engine.decoder is not None
        self._compute_threads = torch.get_num_threads()
        try:
            torch.set_num_threads(threads_beside_a_load(self._compute_threads))
            engine.step()
        except Interrupted:
            return
        except Exception as error:  # whoever attaches it is told by the step that is asked for
            logger.info("what was computed ahead broke off: %s", type(error).__name__)
            engine.cancel(FORESEEN)
            self._foreseen = False
            return
        finally:
            torch.set_num_threads(self._compute_threads)
        if not self.gate.passed:
            # Something may have been used before its bytes were there.
            engine.cancel(FORESEEN)
            self._foreseen = False
        elif not engine.left(FORESEEN):
            self._foreseen = False


def threads_beside_a_load(threads: int) -> int:
    """Of `threads` that compute, how many do while a store brings weights to the memory of the same machine."""
    return max(1, min(threads, len(os.sched_getaffinity(0)) - SPARED_CORES))
