"""Whole streams out of a NATS server and into one, by the server's own snapshots: sequences and times stay as they are.

    out   $JS.API.STREAM.SNAPSHOT.<stream>; chunks come to an inbox, each is answered (that is the flow control), and an
          empty message ends them: status 204 or none for the whole, an error's status otherwise
    in    $JS.API.STREAM.RESTORE.<stream> with configuration and state; chunks go to the subject that it names, each is
          answered by an empty message or by an error, and an empty one ends them

What a chunk holds is the server's business.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

from bus.connection import Connection
from bus.contract import BusError
from bus.jetstream_api import STREAM_NOT_FOUND, ApiError, call, stream_info
from bus.wire import status

CHUNK_BYTES = 256 * 1024
WINDOW_BYTES = 4 * 1024 * 1024
SILENCE_SECONDS = 20.0
"""How long the next chunk, or the answer to one, may take. A server gives up after 5 to 10 s itself."""
FINISH_SECONDS = 300.0
"""How long a server may take to put a stream together once it has all of it."""


class CopyFailed(BusError):
    """A stream could not be copied; the message says which and why."""


class StreamHead(NamedTuple):
    """What a server says of a stream before its chunks."""

    config: dict[str, Any]
    state: dict[str, Any]


class StreamCopy:
    """One stream on its way out. `head` first, then iterate over `chunks` once; `close` in any case."""

    def __init__(self, connection: Connection, stream: str) -> None:
        self._connection = connection
        self._stream = stream
        self._queue: asyncio.Queue[tuple[bytes, bytes, bytes | None]] = asyncio.Queue()
        self._sid = 0

    async def head(self) -> StreamHead:
        """Ask for the stream. Raises `BusError`."""
        inbox = self._connection.new_inbox()
        self._sid = await self._connection.hook(inbox, self._delivered)
        wanted = {
            "deliver_subject": inbox,
            "no_consumers": True,
            "chunk_size": CHUNK_BYTES,
            "window_size": WINDOW_BYTES,
        }
        answer = await call(
            self._connection, f"STREAM.SNAPSHOT.{self._stream}", wanted, seconds=FINISH_SECONDS, again=0
        )
        return StreamHead(answer["config"], answer["state"])

    def _delivered(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        self._queue.put_nowait((reply, payload, headers))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises `CopyFailed` where the server breaks off or falls silent."""
        while True:
            try:
                reply, payload, headers = await asyncio.wait_for(self._queue.get(), SILENCE_SECONDS)
            except TimeoutError:
                raise CopyFailed(
                    f"the NATS server at {self._connection.url} fell silent in the middle of {self._stream}"
                ) from None
            if not payload:
                if status(headers) not in (0, 204):
                    reason = (headers or b"").split(b"\r\n")[0].decode("utf-8", "replace")
                    raise CopyFailed(f"the NATS server at {self._connection.url} broke off {self._stream}: {reason}")
                return
            yield payload
            if reply:
                self._connection.write(b"PUB %b 0\r\n\r\n" % reply)

    async def close(self) -> None:
        self._connection.unhook(self._sid)


async def restore_stream(connection: Connection, head: StreamHead, chunks: Iterable[bytes]) -> dict[str, Any]:
    """Make a stream of what another one was; the server's state of it. Raises `BusError`; then there is none."""
    stream = head.config["name"]
    begun = await call(
        connection,
        f"STREAM.RESTORE.{stream}",
        {"config": head.config, "state": head.state},
        seconds=SILENCE_SECONDS,
        again=0,
    )
    subject = begun["deliver_subject"]
    for chunk in chunks:
        payload, _ = await connection.ask_raw(subject, chunk, SILENCE_SECONDS)
        if payload:
            raise _refused(connection, stream, payload)
    payload, _ = await connection.ask_raw(subject, b"", FINISH_SECONDS)
    answer = json.loads(payload or b"{}")
    if "state" not in answer:
        raise _refused(connection, stream, payload)
    state: dict[str, Any] = (await stream_info(connection, stream))["state"]
    return state


def _refused(connection: Connection, stream: str, payload: bytes) -> CopyFailed:
    try:
        reason = json.loads(payload)["error"]["description"]
    except (ValueError, KeyError, TypeError):
        reason = payload[:200].decode("utf-8", "replace") or "no reason given"
    return CopyFailed(f"the NATS server at {connection.url} does not take {stream}: {reason}")


async def delete_stream(connection: Connection, stream: str) -> None:
    """Nothing happens where there is none."""
    try:
        await call(connection, f"STREAM.DELETE.{stream}", seconds=SILENCE_SECONDS, again=0)
    except ApiError as error:
        if error.code != STREAM_NOT_FOUND:
            raise


async def streams_under(connection: Connection, prefix: str) -> list[str]:
    """Names of all streams whose every subject begins with `prefix` (which ends with a dot), in order."""
    found: list[str] = []
    offset = 0
    while True:
        answer = await call(connection, "STREAM.LIST", {"subject": f"{prefix}>", "offset": offset})
        streams = answer.get("streams") or []
        for one in streams:
            subjects = one["config"].get("subjects") or []
            if subjects and all(subject.startswith(prefix) for subject in subjects):
                found.append(one["config"]["name"])
        offset += len(streams)
        if not streams or offset >= answer.get("total", 0):
            return sorted(found)
