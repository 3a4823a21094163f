"""How long a sequence takes to go on elsewhere: a·(t_in + t_out) + b per model, learned from finished moves.

Source of the formula: PAPER, contribution 3. (a, b) is the line of least squares through the moves of a model so far,
in which each further move makes the earlier ones count for 7/8 of what they did. It begins as if two moves had been
seen, of no tokens and of 1,000, at the figures below; so it is a line from the beginning, and they fade.

Integers only: tokens, and microseconds where they are multiplied, so that no sum leaves 62 bits.
"""

from __future__ import annotations

import msgspec

MICROSECOND = 1_000
FIRST_TOKEN_NS = 100_000
"""a before anything was seen: 10,000 tokens a second of prefill."""
FIRST_FIXED_NS = 100_000_000
"""b before anything was seen: what the published system takes."""

TOKENS_LIMIT = 1 << 22
MICROSECONDS_LIMIT = 1 << 31
_WEIGHT = 64
"""What one move counts for in the sums when it is new."""
_DAMPING = 100 * 100
"""Square tokens that are added to the variance: moves of nearly equal length say nothing about the slope."""
_KNOWN_TOKENS = 1_000
_FIXED = FIRST_FIXED_NS // MICROSECOND
_LATER = _FIXED + _KNOWN_TOKENS * FIRST_TOKEN_NS // MICROSECOND


class ResumeTimes(msgspec.Struct):
    """Weighted sums over the moves of one model: `count`, of tokens, of microseconds, of squares and products.

    `moves`: how many were seen; `error_ns`: by how much the estimate was off, on average, the last ones most.
    """

    count: int = 2 * _WEIGHT
    tokens: int = _WEIGHT * _KNOWN_TOKENS
    micros: int = _WEIGHT * (_FIXED + _LATER)
    squares: int = _WEIGHT * _KNOWN_TOKENS * _KNOWN_TOKENS
    products: int = _WEIGHT * _KNOWN_TOKENS * _LATER
    moves: int = 0
    error_ns: int = 0

    def line(self) -> tuple[int, int]:
        """(a in nanoseconds per token, b in nanoseconds); neither is negative."""
        spread = max(0, self.count * self.squares - self.tokens * self.tokens) + self.count * self.count * _DAMPING
        slope = (self.count * self.products - self.tokens * self.micros) * MICROSECOND
        a = max(0, slope // spread)
        return a, max(0, (self.micros * MICROSECOND - a * self.tokens) // self.count)

    def estimate(self, tokens: int, sequences: int = 1) -> int:
        """Nanoseconds until so many sequences with so many tokens together go on elsewhere, on one device.

        Their prefill shares the device, so it adds up; what does not depend on tokens passes for all at once.
        """
        a, b = self.line()
        return a * tokens + b if sequences else 0

    def described(self) -> dict[str, int]:
        """For people and programs: nanoseconds per token, nanoseconds beside that, mean error, moves seen."""
        a, b = self.line()
        return {"moves": self.moves, "ns_per_token": a, "fixed_ns": b, "error_ns": self.error_ns}

    def learn(self, tokens: int, elapsed_ns: int) -> None:
        """One more move has finished."""
        tokens = min(TOKENS_LIMIT, max(0, tokens))
        micros = min(MICROSECONDS_LIMIT, max(0, elapsed_ns // MICROSECOND))
        off = abs(self.estimate(tokens) - micros * MICROSECOND)
        self.error_ns = (3 * self.error_ns + off) // 4 if self.moves else off
        self.moves += 1
        self.count = _faded(self.count) + _WEIGHT
        self.tokens = _faded(self.tokens) + _WEIGHT * tokens
        self.micros = _faded(self.micros) + _WEIGHT * micros
        self.squares = _faded(self.squares) + _WEIGHT * tokens * tokens
        self.products = _faded(self.products) + _WEIGHT * tokens * micros


def _faded(value: int) -> int:
    return value - value // 8
