"""Bodies of requests, read within bounds: each of them, all of them together, and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from bus.gateway.connected import ClientGone
from bus.gateway.errors import RATE, HttpError


class Bodies:
    """Reads bodies. `limit` bounds one of them, `total` what all that are read and handled now may take, in bytes."""

    def __init__(self, limit: int, total: int, seconds: float) -> None:
        self._limit = limit
        self._total = total
        self._seconds = seconds
        self.held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, counted as held until the block ends. Raises `HttpError`, or `ClientGone`."""
        _check_type(request)
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            raise self._too_large()
        held = 0
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._seconds):
                async for part in request.stream():
                    held += len(part)
                    self.held += len(part)
                    if held > self._limit:
                        raise self._too_large()
                    if self.held > self._total:
                        raise HttpError(
                            429, "too many large requests at once", kind=RATE, code="queue_full", retry_ms=1000
                        )
                    parts.append(part)
            yield b"".join(parts)
        except TimeoutError:
            raise HttpError(408, f"the body did not come within {self._seconds:g} s", code="slow_body") from None
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self.held -= held

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body has more than {self._limit} bytes", code="too_large")


def _check_type(request: Request) -> None:
    """Only what is said to be JSON: a browser sends that to nobody who has not agreed to it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HttpError(415, "send JSON, with the header Content-Type: application/json", code="bad_content_type")
