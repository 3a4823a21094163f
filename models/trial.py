"""A model is tried before it is admitted: the engine must say what the model says by itself.

Whether an architecture can be batched is written in its code, not in its configuration, and there are hundreds. So
the engine answers two short prompts with the model's own weights, fed in chunks and side by side, and its logits are
held against a forward pass without a cache. A wrong place, a wrong mask or a cache of another shape gives logits that
have nothing to do with each other; rounding moves them by a few hundredths.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from models.architecture import choose_experts, describe
from models.contract import Sampling, SequenceStart
from models.engine import SlotEngine
from models.errors import ModelError
from models.sequence import Sequence

_PROMPT_TOKENS = (9, 6)
_ANSWER_TOKENS = 3
_CHUNK = 4
_APART_AT_MOST = 0.25
"""Root mean square of the difference, in standard deviations of the logits. Rounding in 16 bits stays below 0.1."""


def check_configuration(config: Any) -> None:
    """Raise ModelError when a model of this configuration cannot be run, whatever its weights are."""
    try:
        with no_init_weights(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    # The model's own code runs here, and it raises what it likes.
    except Exception as error:
        raise ModelError(f"transformers cannot make a {config.model_type} model of it: {_first_line(error)}") from error
    describe(model)


def try_engine(model: Any) -> None:
    """Raise ModelError, in one sentence, when the engine cannot run this model or says something else than it does.

    Costs a handful of forward passes over a few tokens.
    """
    name = type(model).__name__
    architecture = describe(model)
    choose_experts(model)
    answer = min(_ANSWER_TOKENS, architecture.context - 1)
    longest = architecture.context - answer
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    prompts = {
        str(index): tuple(torch.randint(vocabulary, (min(tokens, longest),), generator=generator).tolist())
        for index, tokens in enumerate(_PROMPT_TOKENS)
    }
    try:
        engine = _Watched(
            model,
            architecture,
            lambda tokens: "",
            eos=(),
            kv_bytes=2**62,
            context=max(map(len, prompts.values())) + answer,
            max_slots=len(prompts),
            prefill_chunk=_CHUNK,
            idle_chunks=1,
        )
        apart = _distances(engine, model, prompts, answer)
    except ModelError:
        raise
    # The model's own code runs here, and it raises what it likes.
    except Exception as error:
        raise ModelError(f"{name} cannot be run with sequences at different places: {_first_line(error)}") from error
    if not all(distance < float("inf") for distance in apart):
        raise ModelError(f"{name} computes numbers that are not finite: take the checkpoint in another dtype.")
    if statistics.median(apart) > _APART_AT_MOST:
        raise ModelError(
            f"{name} says something else in continuous batching than alone (logits differ by "
            f"{statistics.median(apart):.1f} standard deviations), so the engine does not run it: choose another model."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Watched(SlotEngine):
    """Keeps the logits of every token that it says, by key."""

    seen: dict[str, list[torch.Tensor]]

    def _forward(self, rows: list[Sequence], counts: list[int]) -> torch.Tensor:
        logits = super()._forward(rows, counts)
        for row, count, own in zip(rows, counts, logits, strict=True):
            if row.left == count:
                self.seen.setdefault(row.start.key, []).append(own.double())
        return logits


def _distances(engine: _Watched, model: Any, prompts: dict[str, tuple[int, ...]], answer: int) -> list[float]:
    """For every token of the engine's answers, how far its logits are from those of a forward pass without a cache."""
    engine.seen = {}
    for key, prompt in prompts.items():
        engine.admit(SequenceStart(key, prompt, (), Sampling(max_tokens=answer)))
    answers: dict[str, list[int]] = {key: [] for key in prompts}
    while engine.active():
        for event in engine.step():
            answers[event.key].append(event.token)
    apart = []
    with torch.inference_mode():
        for key, prompt in prompts.items():
            tokens = torch.tensor([[*prompt, *answers[key][:-1]]], device=model.device)
            alone = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 :].double()
            for own, other in zip(engine.seen[key], alone, strict=True):
                spread = float(other.std())
                difference = float((own - other).square().mean().sqrt())
                apart.append(difference / spread if spread > 0 else difference)
    return apart
