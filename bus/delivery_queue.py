"""The bounded queue behind a core subscription, the same for every bus."""

from __future__ import annotations

import asyncio
from collections import deque

from bus.contract import BusError, Delivery

QUEUE_LIMIT = 65536


class DeliveryQueue:
    """Deliveries in order of arrival; beyond its limits they are dropped and counted. Several may wait in `next`."""

    def __init__(self, limit: int = QUEUE_LIMIT, limit_bytes: int | None = None) -> None:
        self._queue: deque[Delivery] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._ended = False
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self.dropped = 0

    @property
    def unread(self) -> int:
        return len(self._queue)

    def put(self, delivery: Delivery) -> None:
        """One message always finds room, however large it is."""
        size = len(delivery.payload)
        too_large = self._limit_bytes is not None and self._bytes + size > self._limit_bytes
        if self._queue and (too_large or len(self._queue) >= self._limit):
            self.dropped += 1
            return
        self._queue.append(delivery)
        self._bytes += size
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
        delivery = self._queue.popleft()
        self._bytes -= len(delivery.payload)
        return delivery

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
