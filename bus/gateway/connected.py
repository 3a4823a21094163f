"""Work for one HTTP client, broken off when that client goes away or when the gateway has to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive


class ClientGone(Exception):
    """Nobody is there to be answered any more."""


class Stopping(Exception):
    """The gateway ends and does not wait for this answer any longer."""


class Exchange:
    """One request that is being answered. `finished` says that the last byte is on its way: then nothing breaks it."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self.finished = False
        self.broken: type[Exception] | None = None

    def break_off(self, reason: type[Exception]) -> None:
        if not self.finished and self.broken is None:
            self.broken = reason
            self._task.cancel()


class Exchanges:
    """All requests that are being answered."""

    def __init__(self) -> None:
        self._open: dict[int, Exchange] = {}
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._open)

    async def none(self) -> None:
        """Until nobody is being answered."""
        await self._none.wait()

    def break_off(self) -> None:
        """End all that is open with `Stopping`."""
        for exchange in list(self._open.values()):
            exchange.break_off(Stopping)

    @asynccontextmanager
    async def connected(self, receive: Receive) -> AsyncIterator[Exchange]:
        """The block ends with `ClientGone` or `Stopping` where one of them happens; its body was received before."""
        task = asyncio.current_task()
        assert task is not None
        exchange = Exchange(task)
        self._open[id(exchange)] = exchange
        self._none.clear()
        watching = asyncio.create_task(_watch(receive, exchange), name="gateway watches a client")
        try:
            yield exchange
        except asyncio.CancelledError:
            if exchange.broken is None:
                raise
            task.uncancel()
            raise exchange.broken from None
        finally:
            watching.cancel()
            del self._open[id(exchange)]
            if not self._open:
                self._none.set()


async def _watch(receive: Receive, exchange: Exchange) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.break_off(ClientGone)
