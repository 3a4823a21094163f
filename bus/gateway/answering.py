"""One completion over HTTP: read from the cell, written as one answer or as events while it comes.

The status of a stream is held back until its first piece or its refusal is there, but not for longer than
`silence_seconds`: then it begins, and what goes wrong from there on is an event of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Message, Receive, Scope, Send

from bus.answer import Answer, RequestFailed
from bus.gateway.cancelling import Canceller
from bus.gateway.connected import ClientGone, Exchange, Exchanges, Stopping
from bus.gateway.errors import HttpError, from_cell, stopping
from bus.gateway.fields import Asked
from bus.gateway.reading import ENDS_WELL, Piece, Reading
from bus.gateway.shapes import ALIVE, DONE, Choice, Shape

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
"""The last one has proxies pass on events at once."""


class Completion:
    """Answers one request as an ASGI application. With `lasting` the cell's requests go on when the client goes."""

    def __init__(
        self,
        asked: Asked,
        answers: Sequence[Answer],
        shape: Shape,
        exchanges: Exchanges,
        canceller: Canceller,
        *,
        silence_seconds: float,
        lasting: bool,
    ) -> None:
        self._asked = asked
        self._answers = answers
        self._shape = shape
        self._exchanges = exchanges
        self._canceller = canceller
        self._silence_seconds = silence_seconds
        self._lasting = lasting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `HttpError` where nothing was said yet."""
        reading = Reading(self._answers, self._asked.choices)
        stream = _Stream(send, self._shape, reading.choices)
        try:
            async with self._exchanges.connected(receive) as exchange, reading:
                if self._asked.stream:
                    await self._stream(reading, stream, exchange)
                else:
                    await self._whole(reading, send, exchange)
        except ClientGone:
            return
        except Stopping:
            await self._fail(stream, stopping())
        except RequestFailed as failure:
            await self._fail(stream, from_cell(failure, self._asked.names))
        finally:
            if not self._lasting:
                for request in reading.unfinished:
                    self._canceller.cancel(request)

    async def _fail(self, stream: _Stream, error: HttpError) -> None:
        if not stream.begun:
            raise error
        await stream.write(b"data: " + error.body() + b"\n\n", last=True)

    async def _stream(self, reading: Reading, stream: _Stream, exchange: Exchange) -> None:
        while not reading.ended:
            pieces = await reading.batch(self._silence_seconds)
            last = reading.ended
            events = [stream.events(piece) for piece in pieces] or [ALIVE]
            if last:
                exchange.finished = True
                if self._asked.include_usage:
                    events.append(self._shape.usage(reading.usage))
                events.append(DONE)
            payload = b"".join(events)
            if payload:
                await stream.write(payload, last=last)

    async def _whole(self, reading: Reading, send: Send, exchange: Exchange) -> None:
        choices = [Choice(index) for index in range(reading.choices)]
        while not reading.ended:
            for index, chunk in await reading.batch(self._silence_seconds):
                choices[index].chunks.append(chunk)
                choices[index].reason = chunk.end
        body = self._shape.whole(choices, reading.usage)
        exchange.finished = True
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Stream:
    """Events on their way to one client. Nothing is sent before the first `write`."""

    def __init__(self, send: Send, shape: Shape, choices: int) -> None:
        self._send = send
        self._shape = shape
        self._choices = [Choice(index) for index in range(choices)]
        self.begun = False

    def events(self, piece: Piece) -> bytes:
        choice, chunk = self._choices[piece.choice], piece.chunk
        shown = chunk.text or chunk.logprobs
        ends_well = chunk.end in ENDS_WELL
        if not shown and not ends_well:
            return b""  # what failed before it began gets a status of its own
        parts = []
        if not choice.opened:
            choice.opened = True
            parts.append(self._shape.opening(choice))
        if shown:
            parts.append(self._shape.piece(choice, chunk))
        if ends_well:
            parts.append(self._shape.ending(choice, chunk.end))
        return b"".join(parts)

    async def write(self, payload: bytes, *, last: bool) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        message: Message = {"type": "http.response.body", "body": payload, "more_body": not last}
        await self._send(message)
