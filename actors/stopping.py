"""Work in a thread that the task which waits for it may stop: a cancelled task ends when its thread has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TypeVar

Got = TypeVar("Got")


LATER = "to be gone on with"
"""Said with a cancellation (`task.cancel(LATER)`) of work that is wanted again: what it has done may stay."""


class Stopped(Exception):
    """The work was asked to stop, and has left nothing but what it can go on with, if it may."""


class Stop:
    """Whether the work is to stop. The work asks often (`check`), and says what interrupts it where it waits.

    `later`: it is to be gone on with, so that what it has done may stay.
    """

    def __init__(self) -> None:
        self.later = False
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._interrupts: dict[int, Callable[[], None]] = {}
        self._count = 0

    def ask(self, *, later: bool = False) -> None:
        """The first who asks says whether it is for later."""
        with self._lock:
            if self._asked.is_set():
                return
            self.later = later
            self._asked.set()
            interrupts = list(self._interrupts.values())
        for interrupt in interrupts:
            interrupt()

    def asked(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        """Raises `Stopped` once it was asked."""
        if self._asked.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """For so long; raises `Stopped` as soon as it is asked."""
        self._asked.wait(seconds)
        self.check()

    @contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """While the block lasts, `interrupt` is called (once, in another thread) when the work is to stop."""
        with self._lock:
            self._count += 1
            number = self._count
            self._interrupts[number] = interrupt
            asked = self._asked.is_set()
        if asked:
            interrupt()
        try:
            yield
        finally:
            with self._lock:
                del self._interrupts[number]


async def in_thread(threads: Executor, work: Callable[[Stop], Got]) -> Got:
    """What `work` returns. When this task is cancelled, the work is asked to stop and waited for.

    So nothing of it is left when this ends, unless the cancellation said `LATER`. Work that was done all the same
    counts: its result is returned.
    """
    stop = Stop()
    future = asyncio.wrap_future(threads.submit(work, stop))
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as asked:
            cancelled = True
            stop.ask(later=LATER in asked.args)
    if cancelled and future.exception() is not None:
        raise asyncio.CancelledError
    return future.result()
