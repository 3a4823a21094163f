"""What the reader was told in the past and may not have shown: noted while a control reads what was before its start.

A control that dies may leave an end stated and unshown; while none was up, facts came that nobody took. So what never
came back is shown after the start, and so is what came back last. Readers drop repeats.
"""

from __future__ import annotations

from collections import deque

from bus.contract import Record

SHOW_AGAIN_NS = 10_000_000_000
"""How long before the last record a message may have come back and still be shown again. By the stream's own clock."""


class Unshown:
    """Take note of everything that is said to the reader, and of every record, in order."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, None] = {}
        self._lately: deque[tuple[int, bytes]] = deque()

    def said(self, payload: bytes) -> None:
        self._waiting[payload] = None

    def read(self, record: Record) -> None:
        if record.payload in self._waiting:
            del self._waiting[record.payload]
            self._lately.append((record.timestamp, record.payload))
        while self._lately and self._lately[0][0] < record.timestamp - SHOW_AGAIN_NS:
            self._lately.popleft()

    def take(self) -> list[bytes]:
        """What is to be shown now; nothing of it is kept."""
        left = [*(payload for _, payload in self._lately), *self._waiting]
        self._lately.clear()
        self._waiting.clear()
        return left
