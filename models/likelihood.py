"""Log-probabilities of chosen tokens and of the likeliest ones, for the rows that ask for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bus.logprobs import LEAST


class Likelihood(NamedTuple):
    """Of the chosen token, and (token, log-probability) of the likeliest, at most as many as were asked for."""

    chosen: float
    likeliest: list[tuple[int, float]]


def measure(scores: torch.Tensor, chosen: Sequence[int], wanted: Sequence[int]) -> list[Likelihood | None]:
    """For each row of `scores` [rows, vocabulary] that wants 0 or more alternatives; None for one that wants -1."""
    asking = [row for row, count in enumerate(wanted) if count >= 0]
    most = min(max(wanted, default=0), scores.shape[1])
    found: list[Likelihood | None] = [None] * len(wanted)
    if not asking:
        return found
    logprobs = (scores if len(asking) == len(wanted) else scores[asking]).double().log_softmax(dim=-1)
    own = logprobs[range(len(asking)), [chosen[row] for row in asking]].tolist()
    best = logprobs.topk(most) if most > 0 else None
    values = best.values.tolist() if best is not None else [[]] * len(asking)
    ids = best.indices.tolist() if best is not None else [[]] * len(asking)
    for index, row in enumerate(asking):
        pairs = [(token, value) for token, value in zip(ids[index], values[index], strict=True) if math.isfinite(value)]
        pairs.sort(key=lambda pair: (-pair[1], pair[0]))
        found[row] = Likelihood(_rounded(own[index]), [(t, _rounded(v)) for t, v in pairs[: wanted[row]]])
    return found


def _rounded(value: float) -> float:
    return max(LEAST, round(value, 6)) if math.isfinite(value) else LEAST
