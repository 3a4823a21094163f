"""The KV cache of an engine: preallocated slots, one per sequence, read in place.

Every layer holds keys and values [slots, heads, context, dim]. A forward pass works on a run of neighbouring slots and
gets a slice of the cache, never a gathered copy: indexing rows would copy the whole cache in every layer of every step.
So the engine keeps rows that are computed together next to each other and moves one slot when a sequence leaves.

What stands in a slot behind a sequence's length is left over from others; the masks of `models.masks` hide it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from models.errors import ModelError


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of one token: key and value heads, and numbers per head."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True)
class Span:
    """What the forward pass in progress writes: row r puts `counts[r]` tokens at `starts[r]` of slot `first + r`."""

    first: int
    starts: Sequence[int]
    counts: Sequence[int]
    length: int
    rows: torch.Tensor | None
    places: torch.Tensor | None

    @classmethod
    def of(cls, first: int, starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Span:
        """The span; `length` is how far its longest row reaches."""
        length = max(start + count for start, count in zip(starts, counts, strict=True))
        scattered = max(counts) == 1 and min(starts) != max(starts)
        return cls(
            first,
            starts,
            counts,
            length,
            rows=torch.arange(len(starts), device=device) if scattered else None,
            places=torch.tensor(starts, device=device) if scattered else None,
        )


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU each page of them comes into being when it is touched.

    `torch.zeros` writes every byte: for a whole cache that is most of the time that a start from DRAM takes. Pages stay
    small on purpose: a sequence touches a few of them in each head, and huge ones would be cleared for that as a whole.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: writes what a span says and returns a view of what its rows may see, [rows, heads, length, dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, slots: int, context: int, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Zeros, not empty: a stale NaN would pass through the mask (0 * NaN). Untouched pages cost no memory.
        self.keys = zeros((slots, shape.heads, context, shape.key_dim), dtype, device)
        self.values = zeros((slots, shape.heads, context, shape.value_dim), dtype, device)
        self.is_initialized = True
        self.span: Span | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the tokens of the span and return keys and values of its rows up to its length."""
        span = self.span
        assert span is not None, "a forward pass outside of SlotCache.at"
        return self._write(self.keys, key_states, span), self._write(self.values, value_states, span)

    @staticmethod
    def _write(cache: torch.Tensor, fresh: torch.Tensor, span: Span) -> torch.Tensor:
        rows = cache[span.first : span.first + len(span.starts)]
        if fresh.shape[1] != cache.shape[1] or fresh.shape[3] != cache.shape[3]:
            raise ModelError(
                f"This architecture caches {fresh.shape[1]} heads of {fresh.shape[3]} numbers where its config says "
                f"{cache.shape[1]} of {cache.shape[3]}: the engine does not support it."
            )
        if span.places is not None:
            rows[span.rows, :, span.places] = fresh[:, :, 0]
        elif min(span.starts) == max(span.starts) and min(span.counts) == max(span.counts):
            rows[:, :, span.starts[0] : span.starts[0] + span.counts[0]] = fresh
        else:
            for row, (start, count) in enumerate(zip(span.starts, span.counts, strict=True)):
                rows[row, :, start : start + count] = fresh[row, :, :count]
        return rows[:, :, : span.length]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is lazy here."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns."""
        return (self.span.length if self.span else 0), 0

    def get_seq_length(self) -> int:
        """Tokens before the span in its longest row; architectures that are given positions do not use it."""
        return max(self.span.starts) if self.span else 0

    def get_max_length(self) -> int:
        """Tokens that a slot holds."""
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """`slots` slots of `context` tokens for every layer of a model."""

    def __init__(
        self, shapes: Sequence[LayerShape], slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._slot_layers = [SlotLayer(slots, context, shape, dtype, device) for shape in shapes]
        self._device = device
        super().__init__(layers=list(self._slot_layers))

    def at(self, first: int, starts: Sequence[int], counts: Sequence[int]) -> Span:
        """Aim the next forward pass: row r writes `counts[r]` tokens at `starts[r]` of slot `first + r`."""
        span = Span.of(first, starts, counts, self._device)
        for layer in self._slot_layers:
            layer.span = span
        return span

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot over those of another."""
        for layer in self._slot_layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` tokens of two slots."""
        for layer in self._slot_layers:
            for tensor in (layer.keys, layer.values):
                kept = tensor[one, :, :length].clone()
                tensor[one, :, :length] = tensor[other, :, :length]
                tensor[other, :, :length] = kept

    def wipe(self, slot: int) -> None:
        """Zero a slot: for one that may hold numbers that are not finite."""
        for layer in self._slot_layers:
            layer.keys[slot].zero_()
            layer.values[slot].zero_()


def bytes_per_token(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers."""
    return sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes) * dtype.itemsize
