"""A checkpoint whose tensors are packed as they stand: their own names, their own dtypes, nothing converted.

For weights that transformers cannot load on this machine (fp8 and other quantised ones), and for whoever computes with
them by other means. The order is a guess of first use by the names: embeddings, layers by number, then the rest.
"""

from __future__ import annotations

import re
from math import prod

import torch

from loaders.conversion import ModuleState
from loaders.dtypes import stored_shape
from loaders.errors import CheckpointError
from loaders.layout import layer_of
from loaders.load import load_checkpoint
from loaders.source import SourceCheckpoint

_EMBEDDING = re.compile(r"(^|[._])(embed|embeddings|embed_tokens|word_embeddings|wte|wpe|embed_in)([._]|$)")
_NUMBERS = re.compile(r"(\d+)")


def load_stored_state(source: SourceCheckpoint) -> ModuleState:
    """The tensors of a Hugging Face directory as they are. Loads all of them into memory; CheckpointError."""
    loaded = load_checkpoint(source.directory)
    tensors = {name: loaded.tensors[name] for name in sorted(loaded.tensors, key=_order)}
    architectures = source.config.get("architectures")
    model_type = source.config.get("model_type")
    named = architectures[0] if type(architectures) is list and architectures else model_type
    if type(named) is not str or type(model_type) is not str:
        raise CheckpointError(f"{source.directory / 'config.json'} names no model_type; add it and pack again")
    return ModuleState(
        tensors=tensors,
        aliases={},
        original_names={},
        architecture=named[:256],
        model_type=model_type[:256],
        dtype=_main_dtype(tensors),
        parameters=sum(prod(stored_shape(tensor)) for tensor in tensors.values()),
        layers=len({layer for name in tensors if (layer := layer_of(name))}),
        context=_number(source, "max_position_embeddings") or None,
        vocab_size=_number(source, "vocab_size"),
        kv_bytes_per_token=0,
        kind="stored",
    )


def _order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """By place in the model, then by name with its numbers as numbers."""
    place = 1 if layer_of(name) else 0 if _EMBEDDING.search(name) else 2
    pieces = enumerate(_NUMBERS.split(name))
    return place, [(int(piece), "") if index % 2 else (0, piece) for index, piece in pieces]


def _main_dtype(tensors: dict[str, torch.Tensor]) -> str:
    """That of most bytes, as torch names it."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return max(sizes, key=lambda name: (sizes[name], name))


def _number(source: SourceCheckpoint, key: str) -> int:
    """A number of the configuration, 0 where there is none."""
    nested = source.config.get("text_config")
    found = source.config.get(key, nested.get(key) if isinstance(nested, dict) else None)
    return found if type(found) is int and 0 < found < 1 << 62 else 0
