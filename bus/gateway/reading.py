"""The answers of one HTTP request, read together: every position of each of them once and in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from bus.answer import Answer, RequestFailed
from bus.replies import Chunk, TokenCounts

ENDS_WELL = ("stop", "length")
_UNHEARD = ("no_answer", "no_connection", "bus", "bad_reply")
"""Failures of the reading, after which the request itself may go on."""
WAITING_LIMIT = 64
"""Chunks that wait to be written; beyond it, the answers are not read any further."""


class Piece(NamedTuple):
    """What came for one choice. Choices count over all requests: those of the first, then those of the second."""

    choice: int
    chunk: Chunk


class Reading:
    """The answers of one or several requests, `each` of every one of them.

    Use it as an asynchronous context manager: it stops reading then.
    """

    def __init__(self, answers: Sequence[Answer], each: int = 1) -> None:
        self._answers = answers
        self._each = each
        self._left = [each] * len(answers)
        self._over: dict[int, None] = {}
        self._waiting: deque[Piece] = deque()
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def choices(self) -> int:
        return len(self._answers) * self._each

    @property
    def ended(self) -> bool:
        """Whether all of them have ended well."""
        return len(self._over) == len(self._answers) and self._failure is None

    @property
    def unfinished(self) -> list[str]:
        """Requests that may go on in the cell."""
        return [answer.request_id for i, answer in enumerate(self._answers) if i not in self._over]

    @property
    def usage(self) -> TokenCounts:
        """Tokens of all prompts and all answers, once they have ended."""
        counts = [answer.usage for answer in self._answers if answer.usage is not None]
        return TokenCounts(sum(one.prompt_tokens for one in counts), sum(one.completion_tokens for one in counts))

    async def batch(self, wait: float) -> list[Piece]:
        """All that has come, at least one piece; none where nothing comes for `wait` seconds.

        Raises `RequestFailed` where an answer cannot be had, or behind the last piece of one that ends otherwise.
        """
        if self._failure is not None and not self._waiting:
            raise self._failure
        pieces = await (self._alone(wait) if len(self._answers) == 1 else self._gathered(wait))
        for choice, chunk in pieces:
            if chunk.end:
                index = choice // self._each
                self._left[index] -= 1
                if not self._left[index]:
                    self._over[index] = None
                if chunk.end not in ENDS_WELL:
                    self._failure = self._failure or _failure(chunk, self._answers[index].request_id)
        return pieces

    async def _alone(self, wait: float) -> list[Piece]:
        try:
            return [Piece(chunk.choice, chunk) for chunk in await self._answers[0].batch(wait)]
        except RequestFailed as failure:
            self._note(0, failure)
            raise

    async def _gathered(self, wait: float) -> list[Piece]:
        if not self._tasks:
            for index, answer in enumerate(self._answers):
                self._tasks.append(asyncio.create_task(self._gather(index, answer), name="gateway reads an answer"))
        if not self._waiting and self._failure is None:
            self._came.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._came.wait()
            except TimeoutError:
                return []
            if not self._waiting and self._failure is not None:
                raise self._failure
        pieces = list(self._waiting)
        self._waiting.clear()
        self._room.set()
        return pieces

    async def _gather(self, index: int, answer: Answer) -> None:
        try:
            async for chunk in answer:
                self._waiting.append(Piece(index * self._each + chunk.choice, chunk))
                self._came.set()
                while len(self._waiting) >= WAITING_LIMIT:
                    self._room.clear()
                    await self._room.wait()
        except Exception as failure:
            if isinstance(failure, RequestFailed):
                self._note(index, failure)
            self._failure = self._failure or failure
            self._came.set()

    def _note(self, index: int, failure: RequestFailed) -> None:
        if failure.code not in _UNHEARD:
            self._over[index] = None

    async def __aenter__(self) -> Reading:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for answer in self._answers:
            await answer.aclose()


def _failure(chunk: Chunk, request: str) -> RequestFailed:
    if chunk.error is not None:
        return RequestFailed(chunk.error.code, chunk.error.message, chunk.error.retry_ms)
    if chunk.end == "cancelled":
        return RequestFailed("cancelled", f"request {request} was cancelled")
    if chunk.end == "deadline":
        return RequestFailed("deadline", f"request {request} did not end before its deadline")
    return RequestFailed(chunk.end, f"request {request} ended as {chunk.end}")
