"""What a request changes about its logits: penalties, bias, and no end before its least length.

Everything follows from prompt and tokens so far, so that an answer which goes on elsewhere is shaped as before. What
is counted grows by one token per step; all rows of a batch are shaped at once, and rows that ask for nothing cost
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from models.contract import Sampling


def needs_shaping(sampling: Sampling) -> bool:
    return bool(sampling.penalises or sampling.logit_bias or sampling.min_tokens)


class _Growing:
    """A list of token ids with a number for each, as arrays that grow by doubling; every id stands there once."""

    __slots__ = ("_ids", "_place", "_values", "count")

    def __init__(self, known: Mapping[int, float]) -> None:
        self.count = len(known)
        self._place = {token: place for place, token in enumerate(known)}
        self._ids = np.zeros(max(16, 2 * self.count), dtype=np.int64)
        self._values = np.zeros(len(self._ids), dtype=np.float64)
        self._ids[: self.count] = list(known)
        self._values[: self.count] = list(known.values())

    def put(self, token: int, value: float) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self.count
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._values = np.concatenate((self._values, np.zeros_like(self._values)))
            self._ids[place] = token
            self.count += 1
        self._values[place] = value

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self.count]

    @property
    def values(self) -> np.ndarray:
        return self._values[: self.count]


class Shaping:
    """The part of one sequence. `take` is told every token of the answer once, in order."""

    __slots__ = ("_biases", "_counts", "_sampling", "added", "ends", "seen")

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: Iterable[int]) -> None:
        self._sampling = sampling
        self._biases = dict(sampling.logit_bias)
        self._counts: dict[int, int] = {}
        penalty = sampling.repetition_penalty
        self.seen = _Growing(dict.fromkeys(prompt, penalty) if penalty != 1.0 else {})
        self.added = _Growing(self._biases)
        self.ends = np.array(sorted(ends), dtype=np.int64) if sampling.min_tokens else np.zeros(0, dtype=np.int64)

    def take(self, token: int) -> None:
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            self.seen.put(token, sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            penalty = sampling.presence_penalty + sampling.frequency_penalty * count
            self.added.put(token, self._biases.get(token, 0.0) - penalty)

    def open_ends(self, position: int) -> np.ndarray:
        """Tokens that may not be chosen at this position of the answer, because they would end it too early."""
        return self.ends if position < self._sampling.min_tokens else self.ends[:0]


def shape(logits: torch.Tensor, shapings: Sequence[Shaping | None], positions: Sequence[int]) -> torch.Tensor:
    """`logits` [rows, vocabulary] with each row's changes, in float32; `logits` itself stays as it is."""
    scores = logits.to(torch.float32, copy=True)
    there = [(row, shaping) for row, shaping in enumerate(shapings) if shaping is not None]
    places, factors = _gathered(scores, [(row, one.seen.ids, one.seen.values) for row, one in there])
    if places is not None:
        picked = scores[places]
        scores[places] = torch.where(picked < 0, picked * factors, picked / factors)
    places, added = _gathered(scores, [(row, one.added.ids, one.added.values) for row, one in there])
    if places is not None:
        scores[places] += added
    closed = [(row, one.open_ends(positions[row])) for row, one in there]
    places, barred = _gathered(scores, [(row, ids, np.full(len(ids), -np.inf)) for row, ids in closed])
    if places is not None:
        scores[places] = barred
    return scores


Places = tuple[torch.Tensor, torch.Tensor]


def _gathered(
    scores: torch.Tensor, parts: list[tuple[int, np.ndarray, np.ndarray]]
) -> tuple[Places | None, torch.Tensor]:
    """(rows, ids) and values of all rows as one, on the device of `scores`; None where nobody has any."""
    rows = np.repeat([row for row, _, _ in parts], [len(ids) for _, ids, _ in parts]).astype(np.int64)
    if not len(rows):
        return None, scores
    ids = np.concatenate([ids for _, ids, _ in parts])
    values = np.concatenate([values for _, _, values in parts]).astype(np.float32)
    if ids.max() >= scores.shape[1]:  # embeddings may have more rows than there are logits
        kept = ids < scores.shape[1]
        rows, ids, values = rows[kept], ids[kept], values[kept]
    places = torch.from_numpy(np.stack((rows, ids))).to(scores.device)
    return (places[0], places[1]), torch.from_numpy(values).to(scores.device)
