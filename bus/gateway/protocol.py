"""HTTP/1.1 of uvicorn with bounds that it has not: time and size of a request's head, connections, readers that stall.

Whatever is refused here is refused in OpenAI's shape, too.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bus.gateway.errors import RATE, HttpError
from bus.gateway.settings import GatewaySettings


class GatewayProtocol(HttpToolsProtocol):
    """One connection. `settings` is set on a subclass, because uvicorn makes the instances."""

    settings: GatewaySettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._waiting_bytes = 0

    # coming and going
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.connections:
            self._refuse(HttpError(429, "too many connections", kind=RATE, code="queue_full", retry_ms=1000))
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_complete()
        self._unset_keepalive_if_required()
        self.resume_writing()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        # A client that has said its last word has gone: answers are streams, and nobody half-closes to read one.
        return None

    # the head of a request
    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            super().data_received(data)
        except (UnicodeDecodeError, httptools.HttpParserInvalidURLError, ValueError):
            self.send_400_response("the address or the head of this request is not HTTP")
            return
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.settings.head_limit_bytes:
                limit = self.settings.head_limit_bytes
                self._refuse(HttpError(431, f"the head of this request has more than {limit} bytes", code="too_large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_complete()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.settings.head_seconds, self._head_is_late)

    def _head_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if not self._head_bytes:
            self.transport.close()  # connected and said nothing
            return
        seconds = self.settings.head_seconds
        self._refuse(HttpError(408, f"the head of this request did not come within {seconds:g} s", code="slow_head"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            # Answered before its body came, which is read and dropped: hanging up now would tear down the answer.
            self._rest_timer = self.loop.call_later(self.settings.body_seconds, self.transport.abort)

    def on_message_complete(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
        if self.cycle.response_complete:
            self.cycle.more_body = False
        super().on_message_complete()

    # a reader that takes nothing
    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _watch_stall(self) -> None:
        self._waiting_bytes = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.settings.stall_seconds, self._look_at_stall)

    def _look_at_stall(self) -> None:
        if self.transport.get_write_buffer_size() < self._waiting_bytes:
            self._watch_stall()
            return
        # Not close: that would wait for this very reader.
        self._stall_timer = None
        self.transport.abort()

    # errors
    def send_400_response(self, msg: str) -> None:
        self._refuse(HttpError(400, f"{msg.rstrip('.')}: send HTTP/1.1", code="bad_http"))

    def _refuse(self, error: HttpError) -> None:
        """Answer what cannot be handed on, and hang up."""
        self._head_complete()
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # in the middle of an answer there is no place for another one
            return
        body = error.body()
        lines = [STATUS_LINE[error.status], b"content-type: application/json\r\n", b"connection: close\r\n"]
        lines += [f"{name}: {value}\r\n".encode() for name, value in error.headers().items()]
        lines += [b"content-length: %d\r\n\r\n" % len(body), body]
        self.transport.write(b"".join(lines))
        self.transport.close()


def protocol_with(settings: GatewaySettings) -> type[GatewayProtocol]:
    """A protocol class for uvicorn with these settings."""
    return type("BoundGatewayProtocol", (GatewayProtocol,), {"settings": settings})
