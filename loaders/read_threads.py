"""The threads that read from one disk, shared by all loads of a process: what somebody waits for goes first.

A piece is a few milliseconds of work, and pieces of the smallest priority number are taken first, those of equal
priority in the order of their submission. So a load that a request waits for runs almost as if it were alone, while a
prefetch fills what is left; nothing that was begun is ever broken off.

What is to be done with a piece once it is read (checking it, handing it on) is queued by itself and goes before further
reading, but few threads do it at once while there is something to read: the others keep the disk busy. A thread that
has read and then waits for its turn to check is a read less in flight, and reads that began together end together.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable

URGENT = 0
"""Somebody waits for it."""
PREFETCH = 10
"""It may be wanted soon."""


CORES = len(os.sched_getaffinity(0))
CHECKS_AT_ONCE = max(1, CORES // 2)
"""Hashing takes memory bandwidth that reading needs: measured on two cores, two hashes at once take a fifth more
processor time than one after the other, and a load gets 2 % longer. One core hashes 15 GB/s or more from memory."""

Check = Callable[[], None]
"""What is left to do with a piece that was read."""
Read = Callable[[], Check | None]
"""Reads a piece; what is left to do with it, if anything."""


class ReadThreads:
    """`threads` of them, started when first needed; they end when `close` is called, or with the process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._reads: list[tuple[int, int, Read]] = []
        self._checks: list[tuple[int, int, Check]] = []
        self._submitted = 0
        self._changed = threading.Condition()
        self._started = 0
        self._idle = 0
        self._checking = 0
        self._closed = False

    def submit(self, priority: int, read: Read) -> None:
        """Have `read`, and the check that it returns, run in these threads. Neither may raise.

        A read may wait for the checks of pieces that were submitted before it, and for nothing else.
        """
        with self._changed:
            assert not self._closed, "these threads are closed"
            heapq.heappush(self._reads, (priority, self._submitted, read))
            self._submitted += 1
            if self._idle < len(self._reads) and self._started < self.threads:
                self._started += 1
                threading.Thread(target=self._run, name=f"read-{self._started}", daemon=True).start()
            self._changed.notify()

    def close(self) -> None:
        """What was submitted still runs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _may_check(self) -> bool:
        """With nothing left to read, all cores may: the end of a load waits for nothing else."""
        return bool(self._checks) and self._checking < (CHECKS_AT_ONCE if self._reads else CORES)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._may_check() or self._reads or self._closed)
                self._idle -= 1
                # What was read is finished before more is: it may hold room that a read waits for.
                if self._may_check():
                    priority, number, check = heapq.heappop(self._checks)
                    read = None
                    self._checking += 1
                elif self._reads:
                    priority, number, read = heapq.heappop(self._reads)
                    if not self._reads:  # More of them may check from now on.
                        self._changed.notify_all()
                else:
                    self._started -= 1
                    return
            if read is None:
                check()
                del check
                with self._changed:
                    self._checking -= 1
                    if self._checks:
                        self._changed.notify()
                continue
            left = read()
            del read
            if left is not None:
                with self._changed:
                    heapq.heappush(self._checks, (priority, number, left))
                    self._changed.notify()
                del left
