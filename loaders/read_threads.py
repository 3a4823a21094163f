"""The threads that read from one disk, shared by all loads of a process: what somebody waits for goes first.

A piece is a few milliseconds of work, and pieces of the smallest priority number are taken first, those of equal
priority in the order of their submission. So a load that a request waits for runs almost as if it were alone, while a
prefetch fills what is left; nothing that was begun is ever broken off.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable

URGENT = 0
"""Somebody waits for it."""
PREFETCH = 10
"""It may be wanted soon."""


class ReadThreads:
    """`threads` of them, started when first needed; they end when `close` is called, or with the process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []
        self._submitted = 0
        self._changed = threading.Condition()
        self._started = 0
        self._idle = 0
        self._closed = False

    def submit(self, priority: int, piece: Callable[[], None]) -> None:
        """Have `piece` run in one of the threads. It must not raise, and not wait for other pieces."""
        with self._changed:
            assert not self._closed, "these threads are closed"
            heapq.heappush(self._waiting, (priority, self._submitted, piece))
            self._submitted += 1
            if self._idle < len(self._waiting) and self._started < self.threads:
                self._started += 1
                threading.Thread(target=self._run, name=f"read-{self._started}", daemon=True).start()
            self._changed.notify()

    def close(self) -> None:
        """What was submitted still runs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if not self._waiting:
                    self._started -= 1
                    return
                _, _, piece = heapq.heappop(self._waiting)
            piece()
            del piece
