"""Embeddings: one vector for each input, by the hidden states of a model and its pooling.

`Embedder` computes; `EmbeddingEngine` is an `Engine` that serves embeddings, beside the sequences of a decoder where
the model is one. An embedding is a sequence like any other: it holds a slot, its position i is the vector of input i,
and it goes on elsewhere from the first position that is not durable.

A step computes the next inputs of those that wait, in turn, as far as a budget of tokens goes: a large one while
nobody decodes, one prefill chunk while somebody does. Each input is computed in one forward pass, together with others
of about its length, padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.architecture import describe_encoder
from models.contract import AdmissionRefused, Engine, Event, SequenceStart, VectorEvent, check_inputs
from models.engine import DEFAULT_PREFILL_CHUNK, SlotEngine
from models.errors import ModelError
from models.pooling import Pooling

STEP_TOKENS = 2048
"""Tokens of a step in which nobody decodes. An input that is longer has a step of its own."""
_TRIAL_TOKENS = (9, 3)
_APART_AT_MOST = 0.1
"""As a share of the vector's length. Rounding in 16 bits stays below a few hundredths."""
EVENT_BYTES = 256 * 1024
"""Vectors of one sequence in one step: a page has to hold them, as base64."""


class Embedder:
    """Vectors of token ids. `model` gives `last_hidden_state`; `pad` is the token that padding consists of."""

    def __init__(self, model: Any, pooling: Pooling, *, pad: int, context: int) -> None:
        self.context = min(context, pooling.longest or context)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.vector_bytes = 4 * int(model.config.get_text_config().hidden_size) * len(pooling.modes)
        self._model = model
        self._pooling = pooling
        self._pad = pad

    def vectors(self, inputs: Sequence[Sequence[int]]) -> list[bytes]:
        """float32 vectors, little endian, in the order of `inputs`, none of which is empty."""
        found: dict[int, bytes] = {}
        for rows in _runs(inputs):
            computed = self.compute([inputs[row] for row in rows]).to("cpu", torch.float32)
            for row, vector in zip(rows, computed.numpy().astype("<f4"), strict=True):
                found[row] = vector.tobytes()
        return [found[row] for row in range(len(inputs))]

    def compute(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Vectors [inputs, width] of one padded forward pass, in the precision of the pooling."""
        width = max(map(len, inputs))
        device = self._model.device
        lengths = torch.tensor([len(tokens) for tokens in inputs], device=device)
        padded = [[*tokens, *[self._pad] * (width - len(tokens))] for tokens in inputs]
        mask = (torch.arange(width, device=device)[None, :] < lengths[:, None]).long()
        with torch.inference_mode():
            output = self._model(input_ids=torch.tensor(padded, device=device), attention_mask=mask, **self._arguments)
            return self._pooling(output.last_hidden_state, lengths)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(self._model.config, "use_cache") else {}


def pad_of(model: Any) -> int:
    """Some encoders count positions by which tokens are no padding: theirs has to be used."""
    pad = model.config.get_text_config().pad_token_id
    return int(pad) if pad is not None else 0


def try_encoder(model: Any, pooling: Pooling) -> None:
    """Raise ModelError, in one sentence, when the vector of a text depends on what is computed beside it."""
    name = type(model).__name__
    embedder = Embedder(model, pooling, pad=pad_of(model), context=describe_encoder(model))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(embedder.vocabulary, (size,), generator=generator).tolist() for size in _TRIAL_TOKENS]
    try:
        together = embedder.compute(inputs)
        alone = torch.cat([embedder.compute([tokens]) for tokens in inputs])
    # The model's own code runs here, and it raises what it likes.
    except Exception as error:
        raise ModelError(f"{name} cannot make vectors of a padded batch: {error}") from error
    apart = (together - alone).norm(dim=1) / alone.norm(dim=1).clamp(min=1e-9)
    if not bool(torch.isfinite(apart).all()):
        raise ModelError(f"{name} computes numbers that are not finite: take the checkpoint in another dtype.")
    if float(apart.max()) > _APART_AT_MOST:
        raise ModelError(f"{name} makes another vector of a text beside longer ones than of it alone: it is not run.")


def _runs(inputs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indexes of the inputs, in groups of about equal length: padding at most doubles the work."""
    runs: list[list[int]] = []
    for row in sorted(range(len(inputs)), key=lambda row: len(inputs[row])):
        if not runs or len(inputs[row]) > 2 * len(inputs[runs[-1][0]]) + 8:
            runs.append([])
        runs[-1].append(row)
    return runs


@dataclass(slots=True)
class _Waiting:
    """A sequence of inputs; those before `next` are computed."""

    start: SequenceStart
    next: int


class EmbeddingEngine:
    """Obeys `models.contract.Engine`. Without a `decoder` it takes embeddings alone, at most `slots` at a time."""

    def __init__(self, embedder: Embedder, decoder: Engine | None = None, *, name: str = "", slots: int = 16) -> None:
        self.slots = decoder.slots if decoder is not None else slots
        self.context = decoder.context if decoder is not None else embedder.context
        self.decoder = decoder
        self.embedder = embedder
        self._name = name
        self._waiting: dict[str, _Waiting] = {}

    def admit(self, start: SequenceStart) -> None:
        """Reserve a slot; raises AdmissionRefused. Computes nothing."""
        if start.key in self._waiting:
            raise AdmissionRefused(f"Sequence {start.key!r} is here already.")
        if self.active() >= self.slots:
            raise AdmissionRefused(f"All {self.slots} slots are taken: wait until a sequence ends.")
        if start.inputs:
            check_inputs(start, context=self.embedder.context, vocabulary=self.embedder.vocabulary)
            self._waiting[start.key] = _Waiting(start, len(start.generated))
        elif self.decoder is None:
            raise AdmissionRefused(f"{self._name} makes embeddings and no text: ask it for these.")
        else:
            self.decoder.admit(start)

    def foresee(self, prompt: tuple[int, ...]) -> bool:
        """See `models.engine.SlotEngine`; False where there is no decoder, or it would refuse this prompt."""
        try:
            if isinstance(self.decoder, SlotEngine):
                self.decoder.foresee(prompt)
                return True
        except AdmissionRefused:
            pass
        return False

    def cancel(self, key: str) -> bool:
        """Free the slot of this sequence now; False if it is not here."""
        if self._waiting.pop(key, None) is not None:
            return True
        return self.decoder is not None and self.decoder.cancel(key)

    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._waiting) + (self.decoder.active() if self.decoder is not None else 0)

    def busy(self) -> bool:
        """Whether a step has something to compute."""
        return bool(self._waiting) or (self.decoder is not None and self.decoder.busy())

    def extend(self, key: str, tokens: Sequence[int]) -> None:
        """See `models.contract.Engine`; only a decoder holds sequences that run elsewhere."""
        assert self.decoder is not None
        self.decoder.extend(key, tokens)

    def left(self, key: str) -> int:
        """See `models.contract.Engine`."""
        assert self.decoder is not None
        return self.decoder.left(key)

    def release(self, key: str) -> None:
        """See `models.contract.Engine`."""
        assert self.decoder is not None
        self.decoder.release(key)

    def step(self) -> Sequence[Event]:
        """A step of the decoder, and the next vectors of those that wait for some."""
        if not self._waiting:
            return self.decoder.step() if self.decoder is not None else []
        events: list[Event] = []
        budget = STEP_TOKENS
        if self.decoder is not None and self.decoder.busy():
            events += self.decoder.step()
            budget = DEFAULT_PREFILL_CHUNK
        return events + self._embed(budget)

    def _embed(self, budget: int) -> list[Event]:
        chosen = self._choose(budget)
        inputs = [tokens for waiting, end in chosen for tokens in waiting.start.inputs[waiting.next : end]]
        vectors = self.embedder.vectors(inputs)
        events: list[Event] = []
        for waiting, end in chosen:
            part = waiting.start.inputs[waiting.next : end]
            done = end == len(waiting.start.inputs)
            counts = tuple(map(len, part))
            event = VectorEvent(waiting.start.key, waiting.next, counts, tuple(vectors[: len(part)]), done)
            events.append(event)
            del vectors[: len(part)]
            waiting.next = end
            del self._waiting[waiting.start.key]
            if not done:
                self._waiting[waiting.start.key] = waiting  # the others come first next time
        return events

    def _choose(self, budget: int) -> list[tuple[_Waiting, int]]:
        """Whose inputs are computed now, and up to which; at least one input."""
        most = max(1, EVENT_BYTES // self.embedder.vector_bytes)
        chosen: list[tuple[_Waiting, int]] = []
        used = 0
        for waiting in self._waiting.values():
            end = waiting.next
            for tokens in waiting.start.inputs[waiting.next : waiting.next + most]:
                if used and used + len(tokens) > budget:
                    break
                used += len(tokens)
                end += 1
            if end > waiting.next or waiting.next == len(waiting.start.inputs):
                chosen.append((waiting, end))
            if used >= budget:
                break
        return chosen
