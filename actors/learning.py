"""How deciding actors learn from what took a time: nanoseconds, bytes per second, and a bound for both."""

from __future__ import annotations

SECOND = 1_000_000_000
LARGEST = 2**62
"""Nothing that is learned grows beyond what a message can carry."""


def learned(old: int, seen: int) -> int:
    """A quarter of what was just seen, three quarters of what was known."""
    return max(1, min(LARGEST, (3 * old + seen) // 4))
