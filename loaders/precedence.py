"""Which load of a server moves bytes now: what somebody waits for goes before what may be wanted soon.

A load asks between two pieces. Nothing that was begun is broken off, so whoever must wait stops within one piece.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Way = Literal["disk", "network"]
LOOK_SECONDS = 0.2
"""Whether a load that waits was cancelled is looked at so often, at least."""


class Turn:
    """One load at work; see `Precedence.turn`."""

    def __init__(self, precedence: Precedence, way: Way, urgent: bool, order: int) -> None:
        self.way, self.urgent, self.order = way, urgent, order
        self.moved = False
        """Whether it was allowed to move anything so far."""
        self.waited_seconds = 0.0
        """How long nothing of it could move because others went first."""
        self._precedence = precedence
        self._waiting, self._waits_since = 0, 0.0

    def wait(self, stopped: Callable[[], bool]) -> None:
        """Until this load may move its next piece, or `stopped` says yes. Several threads of it may ask."""
        self._precedence._wait(self, stopped)

    def _note_waiting(self, change: int) -> None:
        """One thread more or fewer waits; the caller holds the lock of the precedence."""
        now = time.monotonic()
        if self._waiting:
            self.waited_seconds += now - self._waits_since
        self._waiting, self._waits_since = self._waiting + change, now


class Precedence:
    """The loads of one server.

    An urgent load goes before every other one. Of those that are equally urgent the disk serves one after the other,
    so that each is done as soon as it can be; sources on the network are different machines, and are read at once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turns: dict[int, Turn] = {}
        self._count = 0

    @contextmanager
    def turn(self, way: Way, *, urgent: bool) -> Iterator[Turn]:
        """A load is at work while the block lasts."""
        with self._changed:
            self._count += 1
            turn = self._turns[self._count] = Turn(self, way, urgent, self._count)
        try:
            yield turn
        finally:
            with self._changed:
                del self._turns[turn.order]
                self._changed.notify_all()

    def _wait(self, turn: Turn, stopped: Callable[[], bool]) -> None:
        with self._changed:
            turn._note_waiting(1)
            while not stopped() and any(_goes_before(other, turn) for other in self._turns.values()):
                self._changed.wait(LOOK_SECONDS)
            turn._note_waiting(-1)
            turn.moved = turn.moved or not stopped()


def _goes_before(other: Turn, turn: Turn) -> bool:
    if other.urgent != turn.urgent:
        return other.urgent
    return other.way == turn.way == "disk" and other.order < turn.order
