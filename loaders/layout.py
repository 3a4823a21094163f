"""Where in the data section each tensor of a packed file stands.

The arrangement, per layer, layers in order of first use:
* a layer starts at a multiple of LAYER_ALIGNMENT, a tensor at a multiple of TENSOR_ALIGNMENT;
* first the tensors whose size is a multiple of TENSOR_ALIGNMENT (they need nothing between them), in order of first
  use, then the others ("odd" tensors), in order of first use;
* whatever is missing behind the last tensor is one padding tensor.
safetensors forbids holes, so every odd tensor but the last of its layer needs a padding tensor of its own behind it:
a layer with k odd tensors has max(1, k) padding tensors at most. For k < 2, which is nearly every model, that is at
most one per layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loaders.header import TensorRecord, bytes_of

LAYER_ALIGNMENT = 4_096
TENSOR_ALIGNMENT = 256
PADDING_PREFIX = "__padding__."

_LAYER = re.compile(r"^((?:[^.]+\.)*?\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor that wants a place: its name, its dtype as safetensors names it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return bytes_of(self.dtype, self.shape)


def layer_of(name: str) -> str | None:
    """The layer that a parameter belongs to (`model.layers.3` for `model.layers.3.mlp.up_proj.weight`), None
    outside."""
    match = _LAYER.match(name)
    return match.group(1) if match else None


def group_by_layer(tensors: Iterable[TensorShape]) -> list[list[TensorShape]]:
    """Layers in order of first use; what lies between layers (embeddings, last norm, head) forms groups like layers."""
    groups: list[list[TensorShape]] = []
    layers: dict[str, list[TensorShape]] = {}
    between: list[TensorShape] | None = None
    for tensor in tensors:
        layer = layer_of(tensor.name)
        if layer is None:
            if between is None:
                between = []
                groups.append(between)
            between.append(tensor)
            continue
        between = None
        if layer not in layers:
            layers[layer] = []
            groups.append(layers[layer])
        layers[layer].append(tensor)
    return groups


def arrange(tensors: Sequence[TensorShape]) -> tuple[TensorRecord, ...]:
    """The places of `tensors` (given in order of first use) and of the padding between them: no holes, no overlaps."""
    records: list[TensorRecord] = []
    position = 0
    paddings = 0

    def pad_to(alignment: int) -> None:
        nonlocal position, paddings
        missing = -position % alignment
        if missing:
            name = f"{PADDING_PREFIX}{paddings}"
            records.append(TensorRecord(name, "U8", (missing,), position, position + missing))
            position += missing
            paddings += 1

    for group in group_by_layer(tensors):
        odd = [tensor for tensor in group if tensor.bytes % TENSOR_ALIGNMENT]
        for tensor in [tensor for tensor in group if tensor.bytes % TENSOR_ALIGNMENT == 0] + odd:
            pad_to(TENSOR_ALIGNMENT)
            records.append(TensorRecord(tensor.name, tensor.dtype, tensor.shape, position, position + tensor.bytes))
            position += tensor.bytes
        pad_to(LAYER_ALIGNMENT)
    return tuple(records)
