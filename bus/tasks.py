"""A process's background tasks: started, watched and cancelled in one known order.

`asyncio.TaskGroup` keeps its tasks in a set, so what it cancels first depends on addresses in memory; in a simulated
world the same seed must give the same run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """Tasks of one owner. The first failure of a lasting task is what `wait` raises."""

    def __init__(self) -> None:
        self._lasting: list[asyncio.Task[Any]] = []
        self._brief: dict[asyncio.Task[Any], None] = {}
        self._failed: asyncio.Future[None] | None = None

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that lasts as long as its owner: when it fails, the owner does."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._lasting.append(task)
        task.add_done_callback(self._ended)
        return task

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task for one piece of work; its failure counts as its owner's, too."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._brief[task] = None
        task.add_done_callback(self._ended)
        return task

    @property
    def brief(self) -> int:
        """How many spawned tasks are under way."""
        return len(self._brief)

    async def wait(self) -> None:
        """Until a task fails (its exception is raised), or for ever."""
        await self._future()

    async def settle(self) -> None:
        """Until every spawned task is over."""
        while self._brief:
            await asyncio.wait(list(self._brief))

    async def stop(self, said: str = "") -> None:
        """Cancel everything, in the order of its start, and wait until it is over. `said` goes with each one."""
        tasks = [*self._lasting, *self._brief]
        for task in tasks:
            task.cancel(said or None)
        for task in tasks:
            try:
                await task
            except asyncio.CancelledError:
                if not task.done() or not task.cancelled():
                    raise
            except Exception:
                pass
        self._lasting.clear()
        self._brief.clear()

    def _future(self) -> asyncio.Future[None]:
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        return self._failed

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._brief.pop(task, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not self._future().done():
            self._future().set_exception(error)
            self._future().exception()
