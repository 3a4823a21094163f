"""The few calls of the JetStream API that the bus needs, as JSON requests with typed answers.

Every call raises `ApiError` where the server refuses, `NoAnswer` where it is silent, and `BusError` where nobody
answers for JetStream at all.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from typing import Any

from bus.connection import Connection
from bus.contract import BusError, NoAnswer, NoResponders, Record
from bus.wire import parse_headers, publisher_of, status

API_SECONDS = 5.0
AGAIN_SECONDS = 0.5
"""After so long without an answer a call is made once more: most of them may be repeated."""
STREAM_NOT_FOUND = 10059
MESSAGE_NOT_FOUND = 10037
NO_PEERS = 10005
_NOT_NOW = (10008, 10009, 10041, 10118)
"""What a cluster says that has no leader, or none yet: temporarily unavailable, not leader, no quorum, offline."""


class ApiError(BusError):
    """The server refused a JetStream call; `code` is its error code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def nanoseconds(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time, whose fraction may have up to nine digits."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * 1_000_000_000 + (int(fraction.ljust(9, "0")) if fraction else 0)


async def call(
    connection: Connection,
    verb: str,
    body: dict[str, Any] | None = None,
    *,
    seconds: float = API_SECONDS,
    again: float = AGAIN_SECONDS,
) -> dict[str, Any]:
    """One request to `$JS.API.<verb>`; its answer may take so many seconds. `again` 0: it must not be made twice."""
    data = json.dumps(body).encode() if body is not None else b""
    try:
        raw, _ = await connection.ask_raw(f"$JS.API.{verb}", data, seconds, again=again)
    except NoResponders:
        # Also what a cluster says while it has no leader: no reason to give up, and nothing was done.
        raise NoAnswer(f"no JetStream answers at {connection.url}: start nats-server with -js") from None
    answer: dict[str, Any] = json.loads(raw)
    error = answer.get("error")
    if error is not None:
        code, reason = int(error.get("err_code", 0)), error.get("description", "no reason given")
        if code in _NOT_NOW:
            raise NoAnswer(f"JetStream at {connection.url} is not ready for {verb}: {reason}")
        raise ApiError(f"the NATS server at {connection.url} refuses {verb}: {reason}", code)
    return answer


async def stream_info(connection: Connection, stream: str) -> dict[str, Any]:
    return await call(connection, f"STREAM.INFO.{stream}")


async def get_message(connection: Connection, stream: str, wanted: dict[str, Any]) -> Record | None:
    """A stored message by `{"seq": n}` or `{"last_by_subj": subject}`, from the stream's leader; None where none is."""
    try:
        answer = await call(connection, f"STREAM.MSG.GET.{stream}", wanted)
    except ApiError as error:
        if error.code == MESSAGE_NOT_FOUND:
            return None
        raise
    message = answer["message"]
    headers = base64.b64decode(message["hdrs"]) if "hdrs" in message else None
    return Record(
        message["seq"],
        nanoseconds(message["time"]),
        message["subject"],
        base64.b64decode(message.get("data", "")),
        publisher_of(headers),
    )


async def get_direct(connection: Connection, stream: str, sequence: int) -> Record | None:
    """A stored message from any replica that has it: cheap, but None may mean only that this one is behind."""
    payload, raw = await connection.ask_raw(
        f"$JS.API.DIRECT.GET.{stream}", b'{"seq":%d}' % sequence, API_SECONDS, again=AGAIN_SECONDS
    )
    if status(raw):
        return None
    headers = parse_headers(raw)
    if "Nats-Sequence" not in headers:
        return None
    return Record(
        int(headers["Nats-Sequence"]),
        nanoseconds(headers["Nats-Time-Stamp"]),
        headers["Nats-Subject"],
        payload,
        publisher_of(raw),
    )
