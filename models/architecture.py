"""What a model's configuration says about its cache and its attention; what the engine cannot run is refused here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from models.errors import ModelError
from models.slot_cache import LayerShape

DEFAULT_CONTEXT_AT_MOST = 4096


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How far back a kind of layer sees.

    With a `window` of w, a token sees itself and the w - 1 before it; with a `chunk` of c, those of its own run of c.
    """

    name: str
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """Per layer what it caches; the distinct kinds of attention; the longest context the model can be run at."""

    layers: tuple[LayerShape, ...]
    kinds: tuple[AttentionKind, ...]
    context: int


def describe(model: Any) -> Architecture:
    """The architecture of a causal language model of transformers; raises ModelError where the engine cannot run it."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    takes = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "past_key_values", "attention_mask", "logits_to_keep"):
        if needed not in takes:
            raise ModelError(f"{name} does not take {needed}, which continuous batching needs: choose another model.")
    types, arguments = get_layer_types_and_kwargs(config)
    kinds: dict[str, AttentionKind] = {}
    for kind, argument in zip(types, arguments, strict=True):
        if kind == "full_attention":
            found = AttentionKind(kind)
        elif kind == "sliding_attention":
            found = AttentionKind(kind, window=int(argument["sliding_window"]))
        elif kind == "chunked_attention":
            found = AttentionKind(kind, chunk=int(argument["sliding_window"]))
        else:
            raise ModelError(
                f"{name} has layers of kind {kind!r}, which the engine does not run: choose another model."
            )
        if kinds.setdefault(kind, found) != found:
            raise ModelError(f"{name} has {kind} layers of several widths, which the engine does not run.")
    layers = tuple(_layer_shape(layer) for layer in config.per_layer_config)
    return Architecture(layers, tuple(kinds.values()), _longest_context(config, name))


def describe_encoder(model: Any) -> int:
    """The longest input in tokens of a model that only makes embeddings; raises ModelError where it cannot be run."""
    config = model.config.get_text_config()
    name = type(model).__name__
    takes = inspect.signature(model.forward).parameters
    for needed in ("input_ids", "attention_mask"):
        if needed not in takes:
            raise ModelError(f"{name} does not take {needed}, which padded batches need: choose another model.")
    longest = _longest_context(config, name)
    learned = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(learned, "padding_idx", None)
    # Those that count positions behind their padding token (RoBERTa and its kin) have so many fewer.
    return longest if padding is None else longest - int(padding) - 1


def _layer_shape(config: PretrainedConfig) -> LayerShape:
    attention_heads = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or attention_heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // attention_heads)
    return LayerShape(heads, dim, dim)


def _longest_context(config: PretrainedConfig, name: str) -> int:
    longest = int(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT_AT_MOST)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(parameters.get("rope_type", "default"))
        if kind == "longrope" or "dynamic" in kind:
            # Beyond this length these switch the frequencies of the whole batch, also under sequences that are shorter.
            longest = min(longest, int(parameters.get("original_max_position_embeddings") or longest))
    if longest < 2:
        raise ModelError(f"{name} states a context of {longest}: its config.json is not usable.")
    return longest
