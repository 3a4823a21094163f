"""What a model's configuration says about its cache and its attention; what the engine cannot run is refused here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from models.errors import ModelError
from models.slot_cache import LayerShape

DEFAULT_CONTEXT_AT_MOST = 4096
WITHOUT_CACHE = "dummy"
"""What transformers calls a layer that caches nothing: it attends to what another one cached, or not at all."""
_SOUND_AND_VISION = ("vision_config", "audio_config", "audio_encoder_config", "vq_config")


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
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.model_type == "bert-generation"
    if both_ways and not getattr(config, "is_decoder", True):
        raise ModelError(f"{name} attends in both directions: it makes embeddings, not answers.")
    alien = [part for part in _SOUND_AND_VISION if part in type(model.config).sub_configs]
    if alien and (type(model.config) is type(config) or _has_part(model, alien)):
        raise ModelError(f"{name} is made for images or sound, which the engine does not run: take its text part.")
    takes = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "past_key_values", "attention_mask", "logits_to_keep"):
        if needed not in takes:
            raise ModelError(f"{name} does not take {needed}, which continuous batching needs: choose another model.")
    if getattr(config, "alibi", False) or "local" in getattr(config, "attention_layers", ()):
        raise ModelError(
            f"{name} takes the distance of tokens from their place in the batch (ALiBi, local attention), and in "
            "continuous batching rows stand at different places: choose another model."
        )
    types, arguments = get_layer_types_and_kwargs(config)
    kinds: dict[str, AttentionKind] = {}
    for kind, argument in zip(types, arguments, strict=True):
        if kind == WITHOUT_CACHE:
            continue
        if kind == "full_attention":
            found = AttentionKind(kind)
        elif kind == "sliding_attention":
            found = AttentionKind(kind, window=int(argument["sliding_window"]))
        elif kind == "chunked_attention":
            found = AttentionKind(kind, chunk=int(argument["sliding_window"]))
        else:
            raise ModelError(
                f"{name} has layers of kind {kind!r}, which keep more than keys and values, and the engine does not "
                "run those: choose another model."
            )
        if kinds.setdefault(kind, found) != found:
            raise ModelError(f"{name} has {kind} layers of several widths, which the engine does not run.")
    if not kinds:
        raise ModelError(f"{name} has no layer that attends, and the engine does not run it: choose another model.")
    layers = tuple(_layer_shape(layer, kind) for layer, kind in zip(config.per_layer_config, types, strict=True))
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


def choose_experts(model: Any) -> None:
    """Have a mixture of experts computed in a way that knows the model's numbers: grouped products know no float64."""
    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def _has_part(model: Any, names: Sequence[str]) -> bool:
    """Whether the model itself holds a part of these, beside the text."""
    own = {id(type(getattr(model.config, name))) for name in names if getattr(model.config, name, None) is not None}
    return any(id(type(getattr(module, "config", None))) in own for module in model.modules())


def _layer_shape(config: PretrainedConfig, kind: str) -> LayerShape:
    """What a layer caches, as its configuration says; `SlotLayer` finds out when it is something else."""
    if kind == WITHOUT_CACHE:
        return LayerShape(0, 0, 0)
    if rank := getattr(config, "kv_lora_rank", None):  # latent attention: compressed keys, and the part with positions
        return LayerShape(1, int(rank), int(config.qk_rope_head_dim))
    attention_heads = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or attention_heads)
    if getattr(config, "new_decoder_architecture", False):  # Falcon spreads its few heads before it caches them
        heads = attention_heads
    elif getattr(config, "multi_query", False):
        heads = 1
    if config.model_type == "mimo_v2_flash" and kind == "sliding_attention":
        heads *= 2
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // attention_heads)
    return LayerShape(heads, dim, int(getattr(config, "v_head_dim", None) or dim))


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
