"""What an actor is: a plain synchronous class that turns a message into messages.

`handle(message, now)` sees one message and the cell's `now` (nanoseconds since the epoch) and returns what it says.
It does no I/O and knows no clock, randomness, logging or threads. Its whole memory is `state`, a struct that can be
written and read back; an actor is constructed from its name alone, and configuration arrives as messages.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from actors.rules import FIRST_RULES
from bus.messages import Message, To

_HANDLERS: dict[type[Message], str] = {}
"""The name of the method that takes a kind of message."""


class Actor:
    """Base of the deciding actors: a name, a state, the rule version in force (set by the cell)."""

    State: ClassVar[type[msgspec.Struct]]

    def __init__(self, name: str) -> None:
        self.name = name
        self.rules = FIRST_RULES
        self.state: Any = self.State()

    def handle(self, message: Message, now: int) -> list[To]:
        """What this actor says to a message. Raises `Unexpected` for a kind that it does not know."""
        kind = type(message)
        handler = getattr(self, _HANDLERS.get(kind) or _HANDLERS.setdefault(kind, "on_" + kind.__name__), None)
        if handler is None:
            raise Unexpected(f"{self.name} does not know what to do with {type(message).__name__}")
        said: list[To] = handler(message, now)
        return said


class Unexpected(Exception):
    """A message that the actor's rules do not allow here. The cell answers with `step.skipped`."""
