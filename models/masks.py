"""Attention masks for rows that stand at different positions of one cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.architecture import AttentionKind

Masks = torch.Tensor | dict[str, torch.Tensor]


def masks(positions: torch.Tensor, length: int, kinds: Sequence[AttentionKind], dtype: torch.dtype) -> Masks:
    """Additive masks [rows, 1, tokens, length] for tokens at `positions` [rows, tokens].

    One tensor when all layers attend alike, otherwise one by kind of layer, as hybrid models of transformers take it.
    Hidden places hold the smallest number of the dtype, not minus infinity: every attention implementation takes that.
    """
    query = positions[:, None, :, None]
    key = torch.arange(length, device=positions.device)
    made = {kind.name: _additive(_visible(query, key, kind), dtype) for kind in kinds}
    return next(iter(made.values())) if len(made) == 1 else made


def _visible(query: torch.Tensor, key: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
    seen = key <= query
    if kind.window is not None:
        seen = seen & (key > query - kind.window)
    if kind.chunk is not None:
        seen = seen & (key // kind.chunk == query // kind.chunk)
    return seen


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)
