"""Facts of intake on their way to the ledger: while no server leads it they wait here, within bounds, and not for ever.

A leader's death takes a cluster 4 to 9 s. Whoever asks meanwhile is not turned away at once, and not left without a
word for long either: when the bound is reached, or the time is over, the append fails, and says whether it may be
stored all the same.
"""

from __future__ import annotations

import asyncio

from bus.contract import Appended, Log, NoAnswer, NotTaken
from bus.replies import Refusal

WAIT_SECONDS = 10.0
"""From its first attempt on; the longest election is a little shorter."""
WAITING_LIMIT = 1000
WAITING_LIMIT_BYTES = 64 * 1024 * 1024
RETRY_SECONDS = 0.05
"""Beside the quarter of a second for which the log itself holds back what reached no stream."""


NO_LEADER_MS = 2000


def no_leader() -> Refusal:
    """What is said of a request that could not be appended, for certain."""
    return Refusal(
        "not_ready",
        f"no NATS server leads the ledger at the moment, and nothing was accepted: come again in {NO_LEADER_MS} ms",
        retry_ms=NO_LEADER_MS,
    )


class IntakeBuffer:
    """Appends to one log. `waiting` and `waiting_bytes` say how much is held back now."""

    def __init__(self, log: Log, publisher: str) -> None:
        self.waiting = 0
        self.waiting_bytes = 0
        self._log = log
        self._publisher = publisher
        self._under_way: dict[str, asyncio.Future[Appended]] = {}

    async def append(self, subject: str, payload: bytes, message_id: str) -> Appended:
        """Stored, or `NotTaken` (it is not, for certain), or `NoAnswer` (it may be), or what the log raises else.

        Without a message id it is repeated only while it is certain that it is not stored. With one, whoever appends
        the same meanwhile gets the same answer, as if it were the first.
        """
        known = self._under_way.get(message_id) if message_id else None
        if known is not None:
            return await asyncio.shield(known)
        under_way: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        if message_id:
            self._under_way[message_id] = under_way
        try:
            appended = await self._append(subject, payload, message_id)
            under_way.set_result(appended._replace(duplicate=False))
            return appended
        except BaseException as error:
            if isinstance(error, Exception):
                under_way.set_exception(error)
                under_way.exception()  # nobody else may have waited
            else:
                under_way.cancel()
            raise
        finally:
            self._under_way.pop(message_id, None)

    async def _append(self, subject: str, payload: bytes, message_id: str) -> Appended:
        loop = asyncio.get_running_loop()
        limit = loop.time() + WAIT_SECONDS
        doubt: NoAnswer | None = None
        waits = False
        try:
            while True:
                try:
                    return await self._log.append(subject, payload, message_id=message_id, publisher=self._publisher)
                except NoAnswer as error:
                    if not isinstance(error, NotTaken):
                        doubt = error
                    if loop.time() >= limit or (doubt is not None and not message_id):
                        raise doubt or error from None
                if not waits:
                    if self.waiting >= WAITING_LIMIT or self.waiting_bytes + len(payload) > WAITING_LIMIT_BYTES:
                        full = f"{self.waiting} requests wait already until somebody leads the ledger"
                        raise doubt or NotTaken(full)
                    waits = True
                    self.waiting += 1
                    self.waiting_bytes += len(payload)
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            if waits:
                self.waiting -= 1
                self.waiting_bytes -= len(payload)
