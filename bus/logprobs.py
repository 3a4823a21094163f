"""Log-probabilities of tokens, as pages keep them and chunks show them: arrays, because there is one for every token.

Natural logarithms, rounded to six decimals, of the distribution after penalties and bias and before temperature,
`top_k` and `top_p`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

ALTERNATIVES_LIMIT = 20
LEAST = -9999.0
"""Stands for what has no finite logarithm."""


class Alternative(msgspec.Struct, frozen=True, array_like=True):
    """A token that might have been chosen here: [token, logprob, text]; `text` is what it would have added."""

    token: int
    logprob: float
    text: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one token of an answer: [logprob, alternatives], the likeliest first; the chosen token may be among them."""

    logprob: float
    alternatives: Annotated[tuple[Alternative, ...], Meta(max_length=ALTERNATIVES_LIMIT)]
