"""The bounded queue behind a core subscription, the same for every bus."""

from __future__ import annotations

import asyncio
from collections import deque

from bus.contract import BusError, Delivery

QUEUE_LIMIT = 65536


class DeliveryQueue:
    """Deliveries in order of arrival; beyond QUEUE_LIMIT they are dropped and counted. Several may wait in `next`."""

    def __init__(self) -> None:
        self._queue: deque[Delivery] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._ended = False
        self.dropped = 0

    def put(self, delivery: Delivery) -> None:
        if len(self._queue) >= QUEUE_LIMIT:
            self.dropped += 1
            return
        self._queue.append(delivery)
        self._wake_one()

    async def next(self) -> Delivery:
        """Wait for the next delivery; cancellation loses none. Raises `BusError` once ended and empty."""
        while not self._queue:
            if self._ended:
                raise BusError("this subscription is closed")
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake_one()
                raise
        return self._queue.popleft()

    def end(self) -> None:
        self._ended = True
        while self._waiters:
            self._wake_one()

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
