"""Ordered reading of a JetStream stream: no hole, no repeat, across lost messages, restarts and reconnects.

The server pushes to an inbox of ours through an ephemeral consumer that wants no acknowledgements; that is the only
way of reading which keeps stream order. Every delivery carries the consumer's own count. Where that count skips, where
heartbeats say that more was sent than came, where they stay away, and after every reconnect, the reader drops this
consumer and makes another one behind the last record that it took. Before that it compares that record with the one
that the stream holds now.

Whoever gives up the beginning of a stream (`Log.drop`) may do so before a reader was there. A reader that was away then
goes on only where it had read all that was as old as what is gone: its last heartbeat or newest record tell.

Flow control is answered only when few records wait here, so a slow caller slows the server, not fills our memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Sequence

from bus.connection import Connection
from bus.contract import BusError, LogChanged, NoAnswer, Record
from bus.jetstream_api import STREAM_NOT_FOUND, ApiError, call, get_message, stream_info
from bus.wire import parse_headers, publisher_of, status

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 1.25
SILENT_PERIODS = 2
"""So many periods of SILENCE_SECONDS without a word from the consumer, and it is taken for gone."""
BACKLOG_RECORDS = 8192
"""Above so many records not yet fetched by the caller the server is told to wait."""
RETRY_SECONDS = 0.2
CLOCKS_NS = 5_000_000_000
"""How far the clocks of this process and of the server may lie apart, for what a heartbeat is taken to say."""
MISSING_SECONDS = 2.0
"""How long a stream may be missing before that counts as deleted: a cluster that starts may not know it yet."""


class JetStreamReader:
    """Make it with `JetStreamReader.open`; see `bus.contract.Reader` for the promises.

    One caller of `batch` at a time.
    """

    def __init__(self, connection: Connection, stream: str, filters: Sequence[str], start: int) -> None:
        self._connection = connection
        self._stream = stream
        self._filters = list(filters)
        self._position = max(0, start - 1)
        self._anchor: Record | None = None
        self._beyond_end = False
        self._expires = False
        self._complete_at = 0
        self._records: deque[Record] = deque()
        self._error: BusError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sid = 0
        self._consumer = ""
        self._consumer_count = 0
        self._flow_reply = b""
        self._silent_periods = 0
        self._trouble = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.recreated = 0
        """How often another consumer had to be asked for."""

    @classmethod
    async def open(cls, connection: Connection, stream: str, filters: Sequence[str], start: int) -> JetStreamReader:
        """Waits while no server answers. Raises `BusError` where the stream does not exist."""
        reader = cls(connection, stream, filters, start)
        while True:
            try:
                await connection.wait_connected()
                await reader._set_anchor()
                await reader._consume()
                break
            except NoAnswer:
                await asyncio.sleep(RETRY_SECONDS)
            except ApiError as error:
                if error.code == STREAM_NOT_FOUND:
                    raise BusError(
                        f"stream {stream} does not exist at {connection.url}: start the cell with `longshore up`"
                    ) from None
                raise
        connection.listen(reader)
        reader._task = asyncio.get_running_loop().create_task(reader._keep())
        return reader

    async def batch(self, limit: int = 512) -> list[Record]:
        records = self._records
        while True:
            if self._error is not None:
                raise self._error
            if records:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if len(records) <= limit:
            taken = list(records)
            records.clear()
        else:
            taken = [records.popleft() for _ in range(limit)]
        if self._flow_reply and len(records) < BACKLOG_RECORDS:
            self._answer_flow(self._flow_reply)
        return taken

    async def close(self) -> None:
        self._connection.forget(self)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._drop_consumer()
        self._fail(BusError(f"this reader of {self._stream} is closed"))

    # one consumer
    async def _consume(self) -> None:
        """Start a consumer behind the position, with an inbox of its own: no delivery to an older one can mix in."""
        self._drop_consumer()
        inbox = self._connection.new_inbox()
        self._consumer_count = 0
        self._silent_periods = 0
        self._trouble.clear()
        self._sid = await self._connection.hook(inbox, self._delivered)
        consumer = f"r{secrets.token_hex(8)}"
        config: dict[str, object] = {
            "name": consumer,
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._position + 1,
            "ack_policy": "none",
            "flow_control": True,
            "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9),
            "inactive_threshold": 5_000_000_000,
            "mem_storage": True,
            "num_replicas": 1,
        }
        if len(self._filters) == 1:
            config["filter_subject"] = self._filters[0]
        elif self._filters:
            config["filter_subjects"] = self._filters
        await call(
            self._connection,
            f"CONSUMER.CREATE.{self._stream}.{consumer}",
            {"stream_name": self._stream, "config": config, "action": "create"},
        )
        self._consumer = consumer

    def _drop_consumer(self) -> None:
        if self._sid:
            self._connection.unhook(self._sid)
            self._sid = 0
        if self._consumer:
            self._connection.write(f"PUB $JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer} 0\r\n\r\n".encode())
            self._consumer = ""
        self._flow_reply = b""

    def _delivered(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        self._silent_periods = 0
        if headers is not None and headers.startswith(b"NATS/1.0 "):
            self._controlled(reply, headers)
            return
        # $JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>.<consumer count>.<time>.<pending>, or with domain and
        # account before the stream and one more token at the end.
        fields = reply.split(b".")
        at = 5 if len(fields) == 9 else 7
        count = int(fields[at + 1])
        if self._trouble.is_set():
            return
        if count != self._consumer_count + 1:
            self._trouble.set()
            return
        self._consumer_count = count
        sequence = int(fields[at])
        if sequence > self._position + 1 and self._position and not self._filters and not self._expires:
            self._fail(self._dropped(sequence - 1))
            return
        if sequence <= self._position:
            # The server starts at the end of the stream where the wished start lies beyond it.
            return
        self._position = sequence
        record = Record(
            sequence,
            int(fields[at + 2]),
            subject.decode(),
            payload,
            publisher_of(headers) if headers is not None else "",
            int(fields[at + 3]),
        )
        self._anchor = record
        if not record.pending:
            self._complete_at = record.timestamp
        self._records.append(record)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _controlled(self, reply: bytes, headers: bytes) -> None:
        """Heartbeats, flow control, and news of the consumer's end."""
        if status(headers) != 100:
            self._trouble.set()
            return
        named = parse_headers(headers)
        sent = named.get("Nats-Last-Consumer")
        if sent is not None and int(sent) != self._consumer_count:
            self._trouble.set()
        elif sent is not None and "Nats-Consumer-Stalled" not in named:
            self._complete_at = time.time_ns() - CLOCKS_NS
        flow = reply or named.get("Nats-Consumer-Stalled", "").encode()
        if flow and len(self._records) < BACKLOG_RECORDS:
            self._answer_flow(flow)
        elif flow:
            self._flow_reply = flow

    def _answer_flow(self, reply: bytes) -> None:
        self._flow_reply = b""
        self._connection.write(b"PUB %b 0\r\n\r\n" % reply)

    # keeping on
    async def _keep(self) -> None:
        """Notice that the consumer is gone or missed something, and replace it."""
        while self._error is None:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    await self._trouble.wait()
            except TimeoutError:
                self._silent_periods += 1
                if self._silent_periods < SILENT_PERIODS:
                    continue
            await self._replace()

    async def _replace(self) -> None:
        missing_since = 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._connection.wait_connected()
                await self._compare()
                self.recreated += 1
                await self._consume()
                return
            except NoAnswer:
                missing_since = 0.0
            except ApiError as error:
                missing_since = missing_since or loop.time()
                if error.code == STREAM_NOT_FOUND and self._position and loop.time() - missing_since > MISSING_SECONDS:
                    self._fail(LogChanged(f"stream {self._stream} is gone, it was read up to {self._position}"))
                    return
            except BusError as error:
                self._fail(error)
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _set_anchor(self) -> None:
        """Remember what stands at the position before anything is read, so that a later comparison has a ground."""
        info = await stream_info(self._connection, self._stream)
        self._beyond_end = self._position > info["state"]["last_seq"]
        self._expires = bool(info["config"].get("max_age"))
        if self._position and not self._beyond_end:
            self._anchor = await get_message(self._connection, self._stream, {"seq": self._position})

    async def _compare(self) -> None:
        """Raise `LogChanged` unless the stream still holds what was taken last."""
        position = self._position
        state = (await stream_info(self._connection, self._stream))["state"]
        anchor = self._anchor
        if state["last_seq"] < position and not (self._beyond_end and anchor is None):
            raise LogChanged(
                f"stream {self._stream} ends at {state['last_seq']}, but it was read up to {position}: "
                "it was restored or created anew"
            )
        if not self._expires and position and state["first_seq"] > position + 1:
            first = await get_message(self._connection, self._stream, {"seq": state["first_seq"]})
            if first is None or first.timestamp > self._complete_at:
                raise self._dropped(state["first_seq"] - 1)
        if anchor is None:
            return
        now = await get_message(self._connection, self._stream, {"seq": anchor.sequence})
        if now is None:
            state = (await stream_info(self._connection, self._stream))["state"]
            if anchor.sequence < state["first_seq"]:  # expired since
                return
        if now is None or now[:4] != anchor[:4]:
            raise LogChanged(
                f"stream {self._stream} holds something else at {anchor.sequence} than what was read there: "
                "it was restored or created anew"
            )

    def _dropped(self, last: int) -> LogChanged:
        return LogChanged(
            f"the beginning of stream {self._stream} up to {last} was given up while a reader of it stood at "
            f"{self._position}"
        )

    def _fail(self, error: BusError) -> None:
        if self._error is None:
            self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def lost(self) -> None:
        self._trouble.set()

    def restored(self) -> None:
        self._trouble.set()

    def forbidden(self, subject: str) -> None:
        pass

    def closed(self) -> None:
        self._fail(BusError(f"the connection to {self._connection.url} is closed"))
        self._trouble.set()
