"""Requests whose readers went away are ended in the cell, however many go at once and whatever answers meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from bus.answer import RequestFailed
from bus.client import Client

WORKERS = 16
"""Cancels under way at once."""
PATIENCE_SECONDS = 120.0
UNKNOWN_SECONDS = 5.0
"""So long a request may be unknown: it may have been sent a moment before its reader left."""
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0

logger = logging.getLogger("longshore.gateway")


@dataclass(slots=True)
class _Wanted:
    request: str
    since: float
    pause: float = _FIRST_PAUSE_SECONDS


class Canceller:
    """Cancels requests in the background, and again where the cell had no time. `run` it for as long as you use it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._queue: deque[_Wanted] = deque()
        self._wanted = asyncio.Semaphore(0)
        self._pending = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def pending(self) -> int:
        """Requests that are not cancelled yet."""
        return self._pending

    def cancel(self, request: str) -> None:
        self._pending += 1
        self._idle.clear()
        self._put(_Wanted(request, asyncio.get_running_loop().time()))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                group.create_task(self._work(), name=f"gateway cancels {number}")

    async def idle(self) -> None:
        """Until nothing is left to cancel."""
        await self._idle.wait()

    def _put(self, wanted: _Wanted) -> None:
        self._queue.append(wanted)
        self._wanted.release()

    async def _work(self) -> None:
        while True:
            await self._wanted.acquire()
            wanted = self._queue.popleft()
            if await self._settled(wanted):
                self._pending -= 1
                if not self._pending:
                    self._idle.set()
            else:
                asyncio.get_running_loop().call_later(wanted.pause, self._put, wanted)
                wanted.pause = min(2 * wanted.pause, _LONGEST_PAUSE_SECONDS)

    async def _settled(self, wanted: _Wanted) -> bool:
        try:
            await self._client.cancel(wanted.request)
        except RequestFailed as failure:
            waited = asyncio.get_running_loop().time() - wanted.since
            if waited < (UNKNOWN_SECONDS if failure.code == "unknown_request" else PATIENCE_SECONDS):
                return False
            if failure.code != "unknown_request":
                logger.warning("request %s is not cancelled: %s", wanted.request, failure)
        except Exception:
            logger.exception("request %s is not cancelled", wanted.request)
        return True
