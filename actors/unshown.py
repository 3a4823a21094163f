"""What the reader was told and may not have been shown: noted all the time, shown after a start.

A control that dies may leave an end stated and unshown; while none was up, facts came that nobody took. So what never
came back is shown after the start, and so is what came back last. Readers drop repeats. A snapshot carries what was
noted at its position, because whoever starts from it does not read what was before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from bus.contract import Record

SHOW_AGAIN_NS = 10_000_000_000
"""How long before the last record a message may have come back and still be shown again. By the stream's own clock."""

NOTED_LIMIT = 20_000
"""Messages noted at a time: in a burst of ends the oldest are those that were shown long ago."""


class Unshown:
    """Take note of everything that is said to the reader, and of every record, in order.

    `lately`: (ledger time in nanoseconds, payload) from a snapshot.
    """

    def __init__(self, lately: Iterable[tuple[int, bytes]] = ()) -> None:
        self._waiting: dict[bytes, None] = {}
        self._lately: deque[tuple[int, bytes]] = deque(lately, NOTED_LIMIT)

    def said(self, payload: bytes) -> None:
        self._waiting[payload] = None

    def read(self, record: Record) -> None:
        if record.payload in self._waiting:
            del self._waiting[record.payload]
            self._lately.append((record.timestamp, record.payload))
        while self._lately and self._lately[0][0] < record.timestamp - SHOW_AGAIN_NS:
            self._lately.popleft()

    def noted(self, now: int) -> list[tuple[int, bytes]]:
        """All that may not have been shown by now (ledger time), the oldest first."""
        return [*self._lately, *((now, payload) for payload in self._waiting)]
