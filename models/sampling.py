"""Choosing the next token without any generator state, so that a sequence can move between engines in mid-answer.

Greedy is the argmax. Otherwise the argmax of logit / temperature + Gumbel noise over the candidates that top-k and
top-p leave: this draws from their softmax (Gumbel-max). The noise is a hash of (seed, position, token id), so the same
token at the same position gets the same noise in any batch, on any engine, after any restart; and a last-bit change of
a logit seldom changes the winner. Noise is computed for the candidates alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.contract import Sampling

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST_LOOK = 1024


def choose(logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """The next token of each row of `logits` [rows, vocabulary], at these positions of the answers."""
    scores = logits.float()
    chosen: list[int] = scores.argmax(dim=-1).tolist()
    for row, (sampling, position) in enumerate(zip(samplings, positions, strict=True)):
        if sampling.temperature > 0.0 and sampling.top_k != 1:
            chosen[row] = _draw(scores[row], sampling, position, chosen[row])
    return chosen


def _draw(scores: torch.Tensor, sampling: Sampling, position: int, likeliest: int) -> int:
    scaled, ids = _candidates(scores / sampling.temperature, sampling.top_k, sampling.top_p)
    noisy = scaled.double() + gumbel(sampling.seed, position, ids)
    # Only a row that is not finite leaves no candidate. Equal scores: the smallest id, in whatever order they stand.
    return int(ids[noisy == noisy.max()].min()) if ids.numel() and not noisy.isnan().any() else likeliest


def _candidates(scaled: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids, on the CPU, that top-k leaves, and of these top-p; equal logits stay or go together."""
    vocabulary = scaled.numel()
    limited = 0 < top_k < vocabulary
    if not limited and top_p >= 1.0:
        return scaled.cpu(), torch.arange(vocabulary)
    # A look at the best is nearly always enough; one more than top_k shows whether the last has an equal.
    looked = min(vocabulary, top_k + 1 if limited else _FIRST_LOOK)
    found = scaled.topk(looked)
    best, ids = found.values.cpu(), found.indices.cpu()
    head = best[:top_k] if limited else best
    total = head.double().logsumexp(0) if limited else scaled.double().logsumexp(0).cpu()
    threshold, reached = _threshold(head, total, top_p)
    kept = best >= threshold
    if looked == vocabulary or not kept[-1]:
        return best[kept], ids[kept]
    everything = scaled.cpu()
    if not limited and not reached:  # a flat distribution: the first thousand do not hold top_p
        threshold, _ = _threshold(everything.sort(descending=True).values, total, top_p)
    ids = torch.nonzero(everything >= threshold).flatten()
    return everything[ids], ids


def _threshold(best: torch.Tensor, total: torch.Tensor, top_p: float) -> tuple[torch.Tensor, bool]:
    """The smallest logit of the shortest run of `best` that holds `top_p` of the mass exp(total).

    Also whether the run ends within `best`. The first stays whatever it holds.
    """
    mass = (best.double() - total).exp()
    kept = int((mass.cumsum(0) - mass < top_p).sum())
    return best[max(0, kept - 1)], kept < best.numel()


def gumbel(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64 [candidates], of (seed, position, token id)."""
    state = _mix((_mix(seed & _MASK) + (position & _MASK) * _GOLDEN) & _MASK)
    hashed = _mix_tensor(ids.long() * _signed(_GOLDEN) + _signed(state))
    # 52 bits and a half: neither 0 nor 1 after rounding, so that both logarithms are finite.
    uniform = (((hashed >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


# The finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mix_tensor(value: torch.Tensor) -> torch.Tensor:
    """`_mix` in int64, whose products wrap; its shift is arithmetic, so the copied sign bits are masked off."""
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _signed(_FIRST)
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _signed(_SECOND)
    return value ^ ((value >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
