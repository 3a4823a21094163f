"""The bus on a real NATS server: core messages, and the cell's streams on JetStream.

LEDGER_<cell>   facts and what was said: never discarded, never overwritten; full means refused
TOKENS_<cell>   pages of tokens: kept for the retention of results
PARTS_<cell>    parts of prompts that are too large for a message: once each, for some hours
SNAPSHOTS_<cell>   snapshots of the cell: their writers drop old ones
INTAKE_<cell>   submitted requests: a work queue, a message leaves it when intake has acknowledged it
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from bus.connection import Connection
from bus.contract import Bus, BusError, Delivery, NoAnswer
from bus.credentials import ConnectionOptions
from bus.delivery_queue import DeliveryQueue
from bus.jetstream_api import NO_PEERS, STREAM_NOT_FOUND, ApiError, call, stream_info
from bus.jetstream_log import JetStreamLog
from bus.part_limits import PART_LIMIT_BYTES, PARTS_KEPT, PARTS_SECONDS
from bus.subjects import Subjects
from bus.wire import parse_headers

GIB = 1024**3
DEDUPE_SECONDS = 120
FLUSH_SECONDS = 2.0
ACK_SECONDS = 3.0
"""An append without an acknowledgement counts as unanswered after so long: shorter than any election."""
LEADER_SECONDS = 15.0
"""How long a cluster may be without a leader before that is an error: an election takes 4 to 7 s."""
LOOK_SECONDS = 0.2


def _settings(answer: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = answer["config"]
    return config


class JetStreamSubscription(DeliveryQueue):
    """Core messages on one subject."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._sid = 0

    @classmethod
    async def open(cls, connection: Connection, subject: str, queue: str) -> JetStreamSubscription:
        subscription = cls(connection)
        subscription._sid = await connection.hook(subject, subscription._delivered, queue=queue)
        connection.listen(subscription)
        # Once this returns, the server knows: what another connection publishes from now on arrives here.
        if connection.is_connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await connection.flush()
        return subscription

    def _delivered(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        self.put(Delivery(subject.decode(), payload, reply.decode(), parse_headers(headers)))

    async def drain(self) -> None:
        self._connection.unsubscribe_soon(self._sid)
        if self._connection.is_connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._connection.flush()
        await self.close()

    async def close(self) -> None:
        self._connection.forget(self)
        self._connection.unhook(self._sid)
        self.end()

    def lost(self) -> None:
        pass

    def restored(self) -> None:
        pass

    def closed(self) -> None:
        self.end()

    def forbidden(self, subject: str) -> None:
        pass


class JetStreamInbox(DeliveryQueue):
    """See `bus.contract.Inbox`: a number under the connection's one subscription for answers, and no more."""

    def __init__(self, connection: Connection, limit: int, limit_bytes: int) -> None:
        super().__init__(limit, limit_bytes)
        self._connection = connection
        self.subject = connection.open_inbox(self._delivered)
        connection.listen(self)

    def _delivered(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        self.put(Delivery(self.subject, payload, reply.decode(), parse_headers(headers)))

    async def close(self) -> None:
        self.leave()

    def leave(self) -> None:
        self._connection.forget(self)
        self._connection.close_inbox(self.subject)
        self.end()

    def lost(self) -> None:
        pass

    def restored(self) -> None:
        pass

    def closed(self) -> None:
        self.end()

    def forbidden(self, subject: str) -> None:
        pass


class JetStreamBus:
    """One connection of one process to one cell. Make it with `JetStreamBus.connect`; see `bus.contract.Bus`."""

    def __init__(
        self,
        connection: Connection,
        subjects: Subjects,
        ledger: JetStreamLog,
        tokens: JetStreamLog,
        snapshots: JetStreamLog,
        parts: JetStreamLog,
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._tokens = tokens
        self._snapshots = snapshots
        self._parts = parts
        self.subjects = subjects

    @classmethod
    async def connect(
        cls,
        options: ConnectionOptions | str,
        cell: str,
        *,
        name: str = "",
        ack_timeout: float = ACK_SECONDS,
        create: bool = False,
        ledger_limit_bytes: int = GIB,
        tokens_limit_bytes: int = GIB,
        intake_limit_bytes: int = GIB // 4,
        parts_limit_bytes: int = GIB // 2,
        result_retention_seconds: int = 3600,
        replicas: int = 1,
    ) -> JetStreamBus:
        """Connect, and with `create` see that the streams exist.

        `options` may be a mere address. Raises `Unreachable` within two seconds for each address where no server
        answers or takes us, `CredentialError` where the options cannot be used, ValueError for a bad name of a cell,
        and what `ensure_streams` raises.
        """
        subjects = Subjects(cell)
        connection = await Connection.open(options, name=name)
        try:
            bus = cls(
                connection,
                subjects,
                await JetStreamLog.open(connection, subjects.ledger_stream, ack_timeout),
                await JetStreamLog.open(connection, subjects.tokens_stream, ack_timeout),
                await JetStreamLog.open(connection, subjects.snapshots_stream, ack_timeout),
                await JetStreamLog.open(connection, subjects.parts_stream, ack_timeout),
            )
            if create:
                await bus.ensure_streams(
                    ledger_limit_bytes=ledger_limit_bytes,
                    tokens_limit_bytes=tokens_limit_bytes,
                    intake_limit_bytes=intake_limit_bytes,
                    parts_limit_bytes=parts_limit_bytes,
                    result_retention_seconds=result_retention_seconds,
                    replicas=replicas,
                )
        except BaseException:
            await connection.close()
            raise
        return bus

    async def ensure_streams(
        self,
        *,
        ledger_limit_bytes: int = GIB,
        tokens_limit_bytes: int = GIB,
        intake_limit_bytes: int = GIB // 4,
        parts_limit_bytes: int = GIB // 2,
        result_retention_seconds: int = 3600,
        replicas: int = 1,
    ) -> None:
        """Create the cell's streams where they are missing, and use those that exist as they are.

        Raises `BusError` where an existing stream breaks a promise of the ledger (it would drop or expire records), or
        where the server has no room for the limits.
        """
        names = self.subjects
        common = {"storage": "file", "discard": "new", "num_replicas": replicas, "max_msgs_per_subject": -1}
        ledger = {
            "name": names.ledger_stream,
            "subjects": names.ledger_filters,
            "retention": "limits",
            "max_bytes": ledger_limit_bytes,
            "deny_delete": True,
            "allow_direct": True,
            "duplicate_window": DEDUPE_SECONDS * 1_000_000_000,
        }
        tokens = {
            "name": names.tokens_stream,
            "subjects": [names.tokens_filter],
            "retention": "limits",
            "max_bytes": tokens_limit_bytes,
            "max_age": result_retention_seconds * 1_000_000_000,
            "allow_direct": True,
            "duplicate_window": min(DEDUPE_SECONDS, result_retention_seconds) * 1_000_000_000,
        }
        intake = {
            "name": names.intake_stream,
            "subjects": [names.submit_filter],
            "retention": "workqueue",
            "max_bytes": intake_limit_bytes,
            "duplicate_window": DEDUPE_SECONDS * 1_000_000_000,
        }
        snapshots = {
            "name": names.snapshots_stream,
            "subjects": [names.snapshots_filter],
            "retention": "limits",
            "max_bytes": -1,
            "duplicate_window": DEDUPE_SECONDS * 1_000_000_000,
        }
        parts = {
            "name": names.parts_stream,
            "subjects": [names.parts_filter],
            "retention": "limits",
            "max_bytes": parts_limit_bytes,
            "max_msgs": PARTS_KEPT,
            "max_msg_size": PART_LIMIT_BYTES + 4096,
            "max_age": PARTS_SECONDS * 1_000_000_000,
            "max_msgs_per_subject": 1,
            "discard_new_per_subject": True,
            "allow_direct": True,
            "duplicate_window": DEDUPE_SECONDS * 1_000_000_000,
        }
        await self._ensure(common | parts, must_keep_all=False)
        await self._ensure(common | snapshots, must_keep_all=True)
        await self._ensure(common | ledger, must_keep_all=True)
        await self._ensure(common | tokens, must_keep_all=False)
        await self._ensure(common | intake, must_keep_all=False)

    async def _ensure(self, config: dict[str, Any], *, must_keep_all: bool) -> None:
        stream = config["name"]
        found = await self._found_or_created(config)
        if found["num_replicas"] < config["num_replicas"]:
            found = (
                await call(
                    self._connection, f"STREAM.UPDATE.{stream}", found | {"num_replicas": config["num_replicas"]}
                )
            )["config"]
        wrong = [
            f"{key} is {found.get(key)!r} instead of {config[key]!r}"
            for key in ("storage", "discard", "retention", "max_msgs_per_subject")
            if found.get(key) != config[key]
        ]
        if set(config["subjects"]) - set(found.get("subjects") or []):
            wrong.append(f"it takes {found.get('subjects')} instead of {config['subjects']}")
        if must_keep_all and found.get("max_age", 0) > 0:
            wrong.append("its messages expire")
        if must_keep_all and found.get("max_msgs", -1) > 0:
            wrong.append("its number of messages is limited")
        if wrong:
            raise BusError(
                f"stream {stream} at {self._connection.url} exists with settings that do not fit: {'; '.join(wrong)}; "
                "choose another cell name, or delete that stream if nobody needs it"
            )

    async def _found_or_created(self, config: dict[str, Any]) -> dict[str, Any]:
        """The stream's settings. A cluster that starts, or has lost its leader, gets some time to answer."""
        stream = config["name"]
        loop = asyncio.get_running_loop()
        limit = loop.time() + LEADER_SECONDS
        while True:
            try:
                return _settings(await stream_info(self._connection, stream))
            except ApiError as error:
                if error.code != STREAM_NOT_FOUND:
                    raise
            except NoAnswer:
                if loop.time() > limit:
                    raise
                await asyncio.sleep(LOOK_SECONDS)
                continue
            try:
                # Two that start at once may both create: the same settings twice are no error to the server.
                return _settings(await call(self._connection, f"STREAM.CREATE.{stream}", config))
            except (ApiError, NoAnswer) as error:
                # Servers that start find each other one after the other: too few of them are no answer yet.
                if (isinstance(error, ApiError) and error.code != NO_PEERS) or loop.time() > limit:
                    raise
                await asyncio.sleep(LOOK_SECONDS)

    @property
    def ledger(self) -> JetStreamLog:
        return self._ledger

    @property
    def tokens(self) -> JetStreamLog:
        return self._tokens

    @property
    def snapshots(self) -> JetStreamLog:
        return self._snapshots

    @property
    def parts(self) -> JetStreamLog:
        return self._parts

    @property
    def connected(self) -> bool:
        return self._connection.is_connected

    @property
    def connections(self) -> int:
        return self._connection.connections

    @property
    def raw(self) -> Connection:
        """The nats-py client underneath, for what the contract does not cover (micro services, pull consumers)."""
        return self._connection

    def wall(self) -> int:
        return time.time_ns()

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        await self._connection.send(subject, payload, reply=reply, headers=headers)

    async def subscribe(self, subject: str, *, queue: str = "") -> JetStreamSubscription:
        return await JetStreamSubscription.open(self._connection, subject, queue)

    async def request(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, timeout: float = 2.0
    ) -> Delivery:
        return await self._connection.ask(subject, payload, headers=headers, timeout=timeout)

    def new_inbox(self) -> str:
        return self._connection.new_inbox()

    async def open_inbox(self, *, limit: int, limit_bytes: int) -> JetStreamInbox:
        return JetStreamInbox(self._connection, limit, limit_bytes)

    async def close(self) -> None:
        """Send what was published, and close for good."""
        await self._connection.close()


if TYPE_CHECKING:

    def _keeps_the_contract(bus: JetStreamBus) -> Bus:
        return bus
