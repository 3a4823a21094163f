"""A checkpoint whose tensors are packed as they stand: their own names, their own dtypes, nothing converted.

For weights that transformers cannot load on this machine (fp8 and other quantised ones), and for whoever computes with
them by other means. The order is a guess of first use by the names: embeddings, layers by number, then the rest.
"""

from __future__ import annotations

import re
from math import prod
from typing import TypeGuard

from loaders.conversion import ModuleState
from loaders.dtypes import torch_name
from loaders.errors import CheckpointError
from loaders.layout import TensorShape, layer_of
from loaders.load import load_checkpoint
from loaders.manifest import MANIFEST_NAME
from loaders.packed import WEIGHTS_NAME, read_packed_header
from loaders.source import SourceCheckpoint

_EMBEDDING = re.compile(r"(^|[._])(embed|embeddings|embed_tokens|word_embeddings|wte|wpe|embed_in)([._]|$)")
_NUMBERS = re.compile(r"(\d+)")


def load_stored_state(source: SourceCheckpoint) -> ModuleState:
    """The tensors of a Hugging Face directory as they are. Loads all of them into memory; CheckpointError."""
    if source.pickled:
        raise CheckpointError(
            f"{source.directory} has its weights as pickles, and only safetensors are packed as stored: "
            "leave out --as-stored"
        )
    shapes = {record.name: TensorShape(record.name, record.dtype, record.shape) for record in source.tensors}
    loaded = load_checkpoint(source.directory)
    sizes = {name: loaded.tensors[name].nbytes for name in shapes if name in loaded.tensors}
    if sizes != {name: shape.bytes for name, shape in shapes.items()}:
        raise CheckpointError(f"{source.directory} changed while it was read; pack it again")
    packed = (source.directory / MANIFEST_NAME).exists()
    header = read_packed_header(source.directory / WEIGHTS_NAME) if packed else None
    architectures = source.config.get("architectures")
    model_type = source.config.get("model_type")
    named = architectures[0] if type(architectures) is list and architectures else model_type
    if not _is_name(named) or not _is_name(model_type):
        raise CheckpointError(f"{source.directory / 'config.json'} names no model_type; add it and pack again")
    return ModuleState(
        tensors={name: loaded.tensors[name] for name in sorted(shapes, key=_order)},
        aliases=dict(header.aliases) if header else {},
        original_names=dict(header.original_names) if header else {},
        architecture=named[:256],
        model_type=model_type[:256],
        dtype=torch_name(source.main_dtype),
        parameters=sum(prod(shape.shape) for shape in shapes.values()),
        layers=len({layer for name in shapes if (layer := layer_of(name))}),
        context=_number(source, "max_position_embeddings") or None,
        vocab_size=_number(source, "vocab_size"),
        kv_bytes_per_token=0,
        kind="stored",
        shapes=shapes,
    )


def _order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """By place in the model, then by name with its numbers as numbers."""
    place = 1 if layer_of(name) else 0 if _EMBEDDING.search(name) else 2
    pieces = enumerate(_NUMBERS.split(name))
    return place, [(int(piece), "") if index % 2 else (0, piece) for index, piece in pieces]


def _is_name(value: object) -> TypeGuard[str]:
    return type(value) is str and value != "" and value.isprintable()


def _number(source: SourceCheckpoint, key: str) -> int:
    """A number of the configuration, 0 where there is none."""
    nested = source.config.get("text_config")
    found = source.config.get(key, nested.get(key) if isinstance(nested, dict) else None)
    return found if type(found) is int and 0 < found < 1 << 62 else 0
