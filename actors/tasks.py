"""Tasks that live and end together: tracked in the order in which they began, ended in that order."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """The tasks of one owner. The first that fails fails `failure`; one that merely ends is forgotten.

    Nothing here depends on the order of a set, so that the same run is the same run again.
    """

    def __init__(self) -> None:
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._next = 0

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._next += 1
        number = self._next
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[number] = task
        task.add_done_callback(lambda done: self._done(number, done))

    def _done(self, number: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(number, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not self.failure.done():
            self.failure.set_exception(error)

    async def end(self) -> None:
        """Cancel all of them, the oldest first, and wait until they are gone."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.failure.cancel()
        if not self.failure.cancelled():
            self.failure.exception()
