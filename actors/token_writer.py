"""Pages of one epoch, appended one after the other to a subject that nobody else may write to unnoticed.

Every append names the last record of the subject as this writer knows it (0 before the first). What is refused, or
what stands there instead of the own unanswered page, is somebody else's: a seal. Then this writer is fenced for good.
"""

from __future__ import annotations

import asyncio

from bus.contract import BusError, Log, LogFull, NoAnswer, Record, WrongLastSequence

RETRY_SECONDS = 0.05
FULL_RETRY_SECONDS = 0.5


class Fenced(Exception):
    """The subject was sealed, or is otherwise not this writer's any more: it must stop for good."""


class TokenWriter:
    """Appends pages to `subject`; `last` is the sequence of the last acknowledged one, 0 before the first.

    One page at a time: the next `append` begins when the one before has returned. No two payloads may be equal.
    """

    def __init__(self, log: Log, subject: str, *, publisher: str = "") -> None:
        self.last = 0
        self._log = log
        self._subject = subject
        self._publisher = publisher
        self._fenced = ""

    async def append(self, payload: bytes) -> int:
        """The sequence of the page, once it is durable. Raises `Fenced`, and from then on always."""
        while True:
            if self._fenced:
                raise Fenced(self._fenced)
            try:
                stored = await self._log.append(
                    self._subject, payload, expected_last=self.last, publisher=self._publisher
                )
            except (NoAnswer, WrongLastSequence):
                pass
            except LogFull:
                await asyncio.sleep(FULL_RETRY_SECONDS)
                continue
            else:
                self.last = stored.sequence
                return stored.sequence
            # Either the page stands there after all, or nothing does yet, or somebody else's record does.
            record = await self._newest()
            if record is not None and record.sequence > self.last:
                if record.payload == payload:
                    self.last = record.sequence
                    return record.sequence
                self._fence(f"{self._subject} holds a record at {record.sequence} that this writer did not append")
            elif (record.sequence if record is not None else 0) != self.last:
                self._fence(f"{self._subject} no longer holds the page at {self.last}")
            else:
                await asyncio.sleep(RETRY_SECONDS)

    def _fence(self, reason: str) -> None:
        self._fenced = reason

    async def _newest(self) -> Record | None:
        while True:
            try:
                return await self._log.last(self._subject)
            except BusError:
                await asyncio.sleep(RETRY_SECONDS)
