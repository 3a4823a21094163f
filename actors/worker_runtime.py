"""What a worker driver asks of the machinery that computes: engines, tokenizers, and the thread they run in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from bus.messages import Generation
from models.contract import Engine, Event, Sampling, SequenceStart


class AttachRefused(Exception):
    """The model cannot be made computable here; one sentence. `retry`: another worker may do better."""

    def __init__(self, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


class PromptRefused(Exception):
    """The model cannot take this prompt; one sentence for whoever sent it."""


class EncodedPrompt(NamedTuple):
    """A prompt as tokens, and how to sample, with the model's defaults filled in; or the inputs of an embedding."""

    prompt: tuple[int, ...]
    sampling: Sampling
    inputs: tuple[tuple[int, ...], ...] = ()


def sampling_of(generation: Generation, defaults: Sampling) -> Sampling:
    """How to sample, with the model's defaults where the request says nothing."""
    return Sampling(
        max_tokens=generation.max_tokens,
        temperature=generation.temperature if generation.temperature >= 0 else defaults.temperature,
        top_p=generation.top_p if generation.top_p >= 0 else defaults.top_p,
        top_k=generation.top_k if generation.top_k >= 0 else defaults.top_k,
        seed=generation.seed,
        stop=generation.stop,
        min_tokens=generation.min_tokens,
        stop_tokens=generation.stop_tokens,
        repetition_penalty=generation.repetition_penalty,
        presence_penalty=generation.presence_penalty,
        frequency_penalty=generation.frequency_penalty,
        logit_bias=generation.logit_bias,
        logprobs=generation.logprobs,
    )


class StepResult(NamedTuple):
    """What one engine said in one step, or the error that it broke off with (empty where there is none)."""

    model: str
    events: Sequence[Event]
    error: str = ""


class AheadModel(Protocol):
    """A model that is made ready while its weights are on their way to DRAM. It becomes an instance by `attach` alone.

    `foresee` and `step` may not run at the same time; the event loop stays free while they do.
    """

    async def foresee(self, generation: Generation) -> bool:
        """This will probably be asked; whether `step` can do something about it. Raises `PromptRefused`."""
        ...

    @property
    def wants_step(self) -> bool:
        """Whether there is something to compute, as far as the weights are there or still come."""
        ...

    async def step(self) -> None:
        """Compute, waiting for weights that are on their way. Ends without a result when it is interrupted."""
        ...

    def interrupt(self) -> None:
        """Somebody else wants to compute: the step that is under way ends at its next layer, and is begun anew."""
        ...

    async def arrived(self) -> bool:
        """Until the load is over; whether everything is in DRAM."""
        ...

    def drop(self) -> None:
        """It is not wanted, unless it was attached: then this does nothing to it."""
        ...


class WorkerRuntime(Protocol):
    """Engines of one device. Between two calls of `step` the engines belong to the caller.

    `attach`, `encode` and `texts` may run while a step runs; `cancel`, `detach` and `reset` may not be called then,
    except that `reset` after a step was cancelled waits until it is really over.
    """

    @property
    def device(self) -> str: ...

    @property
    def works_ahead(self) -> bool:
        """Whether `begin_ahead` may ever return something."""
        ...

    async def reset(self) -> None:
        """Let go of every model, as if just made."""
        ...

    async def attach(
        self, model: str, digest: str, *, slots: int, kv_bytes: int, context: int, streamed: bool = False
    ) -> Engine:
        """Make a model computable that lies in DRAM, or is read from the SSD if `streamed`. Raises `AttachRefused`."""
        ...

    async def begin_ahead(self, model: str, *, slots: int, kv_bytes: int, context: int) -> AheadModel | None:
        """Wait until the weights of a model that is to be attached are on their way to DRAM, and begin with it.

        None where they do not come that way, or it was attached meanwhile.
        """
        ...

    async def detach(self, model: str) -> None:
        """Free the instance and its memory."""
        ...

    async def encode(self, model: str, generation: Generation) -> EncodedPrompt:
        """Raises `PromptRefused`."""
        ...

    async def texts(self, model: str, start: SequenceStart) -> tuple[str, ...]:
        """The pieces of text of the tokens in `start.generated`, as they were when these were decoded."""
        ...

    async def cancel(self, sequences: Sequence[tuple[Engine, str]]) -> None:
        """Free the slots of these sequences, each named by its engine and key."""
        ...

    async def step(self, engines: Sequence[tuple[str, Engine]]) -> list[StepResult]:
        """One step of each engine, one after the other; the event loop stays free meanwhile."""
        ...
