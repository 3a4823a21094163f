"""What only the real bus can get wrong: deliveries lost on the way, crashes, streams that others made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from bus_worlds import JetStreamTestWorld, read_up_to, until

from bus.contract import BusError, LogChanged, NoAnswer
from bus.jetstream import JetStreamBus
from bus.jetstream_api import call, nanoseconds
from bus.jetstream_reader import JetStreamReader
from bus.server import EmbeddedServer


@pytest.fixture
def world(nats_server: EmbeddedServer) -> JetStreamTestWorld:
    return JetStreamTestWorld(nats_server)


def drop_deliveries(reader: JetStreamReader, monkeypatch: pytest.MonkeyPatch, dropped: set[int]) -> list[int]:
    """Have the consumer's n-th deliveries vanish on their way, once each. Returns what was dropped."""
    gone: list[int] = []
    real = JetStreamReader._delivered

    def delivered(self: JetStreamReader, subject: bytes, reply: bytes, payload: bytes, headers: Any) -> None:
        if reply.startswith(b"$JS.ACK"):
            sequence = int(reply.split(b".")[5])
            if sequence in dropped and not self._trouble.is_set():
                dropped.discard(sequence)
                gone.append(sequence)
                return
        real(self, subject, reply, payload, headers)

    monkeypatch.setattr(JetStreamReader, "_delivered", delivered)
    return gone


async def test_a_delivery_lost_in_the_middle_is_read_again(
    world: JetStreamTestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        reader = await bus.ledger.read()
        assert isinstance(reader, JetStreamReader)
        gone = drop_deliveries(reader, monkeypatch, {1, 40, 41, 90})
        await reader._consume()  # the hook of the first consumer is the real method
        await asyncio.gather(*(bus.ledger.send(subject, b"%d" % i) for i in range(100)))
        records = await read_up_to(reader, 100)
        assert [r.sequence for r in records] == list(range(1, 101))
        assert gone == [1, 40, 41, 90]
        assert reader.recreated >= 3  # 40 and 41 are one gap unless a heartbeat falls between them


async def test_the_last_delivery_lost_is_noticed_by_heartbeat(
    world: JetStreamTestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        bus = await world.bus()
        reader = await bus.ledger.read()
        assert isinstance(reader, JetStreamReader)
        gone = drop_deliveries(reader, monkeypatch, {3})
        await reader._consume()
        for _ in range(3):
            await bus.ledger.append(world.subjects.fact("requests", "accepted"), b"")
        assert [r.sequence for r in await read_up_to(reader, 3, seconds=8)] == [1, 2, 3]
        assert gone == [3]


async def test_a_consumer_that_vanished_is_replaced(world: JetStreamTestWorld) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        await bus.ledger.append(subject, b"1")
        reader = await bus.ledger.read()
        assert isinstance(reader, JetStreamReader)
        await read_up_to(reader, 1)
        await call(bus.raw, f"CONSUMER.DELETE.{world.subjects.ledger_stream}.{reader._consumer}")
        await bus.ledger.append(subject, b"2")
        assert [r.sequence for r in await read_up_to(reader, 2, seconds=8)] == [2]
        assert reader.recreated >= 1


async def test_a_stream_replaced_behind_a_standing_connection_is_noticed(world: JetStreamTestWorld) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        await bus.ledger.append(subject, b"1")
        reader = await bus.ledger.read()
        await read_up_to(reader, 1)
        await world.recreate_ledger()
        with pytest.raises(LogChanged):
            async with asyncio.timeout(10):
                await reader.batch()


async def test_a_slow_caller_slows_the_server_and_loses_nothing(world: JetStreamTestWorld) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        total = 40_000
        await asyncio.gather(*(bus.ledger.send(subject, b"x" * 500) for _ in range(total)))
        reader = await bus.ledger.read()
        assert isinstance(reader, JetStreamReader)
        await until(lambda: bool(reader._flow_reply))  # the server waits for us now
        held = len(reader._records)
        assert held < total
        seen = 0
        while seen < total:
            for record in await reader.batch():
                seen += 1
                assert record.sequence == seen
        assert reader.recreated == 0


async def test_appends_wait_for_room_in_the_window_in_order(world: JetStreamTestWorld) -> None:
    async with world.running():
        bus = await world.bus(ack_timeout=0.5)
        subject = world.subjects.fact("requests", "accepted")
        futures = [bus.ledger.send(subject, b"%d" % i) for i in range(10_000)]
        cancelled = futures[9_000]
        cancelled.cancel()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(answers[9_000], asyncio.CancelledError)
        sequences = [a.sequence for a in answers if not isinstance(a, BaseException)]
        assert sequences == list(range(1, 10_000))
        await world.deafen(bus)
        futures = [bus.ledger.send(subject, b"") for _ in range(5_000)]
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(a, NoAnswer) for a in answers)


async def test_a_missing_stream_is_no_answer_and_no_busy_loop(nats_server: EmbeddedServer) -> None:
    bus = await JetStreamBus.connect(nats_server.url, "nowhere")
    started = asyncio.get_running_loop().time()
    with pytest.raises(NoAnswer):
        await bus.ledger.append(bus.subjects.fact("requests", "accepted"), b"")
    assert 0.2 < asyncio.get_running_loop().time() - started < 2
    for operation in (bus.ledger.read(), bus.ledger.usage()):
        with pytest.raises(BusError, match="LEDGER_nowhere does not exist at nats://"):
            await operation
    await bus.close()


async def test_existing_streams_are_used_or_refused(nats_server: EmbeddedServer) -> None:
    bus = await JetStreamBus.connect(nats_server.url, "foreign")
    names = bus.subjects
    config = {"name": names.ledger_stream, "subjects": names.ledger_filters, "max_age": 10**12, "max_bytes": 2**20}
    await call(bus.raw, f"STREAM.CREATE.{names.ledger_stream}", config)
    with pytest.raises(BusError, match=r"LEDGER_foreign at nats://.* exists with settings that do not fit: discard"):
        await bus.ensure_streams()
    await call(bus.raw, f"STREAM.DELETE.{names.ledger_stream}")
    small = {"ledger_limit_bytes": 2**20, "tokens_limit_bytes": 2**20, "intake_limit_bytes": 2**20}
    await bus.ensure_streams(**small)
    await bus.ensure_streams(**small | {"ledger_limit_bytes": 2**21})
    assert (await bus.ledger.usage()).limit_bytes == 2**20
    with pytest.raises(BusError, match="refuses"):
        other = await JetStreamBus.connect(nats_server.url, "huge")
        await other.ensure_streams(ledger_limit_bytes=2**60)
    for stream in (names.ledger_stream, names.tokens_stream, names.intake_stream):
        await call(bus.raw, f"STREAM.DELETE.{stream}")
    await other.close()
    await bus.close()


async def test_a_killed_server_and_a_suspended_one(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "store") as server:
        bus = await JetStreamBus.connect(server.url, "main", create=True, ack_timeout=0.3)
        subject = bus.subjects.fact("requests", "accepted")
        reader = await bus.ledger.read()
        stored = 0
        for round_number in range(3):
            futures = [bus.ledger.send(subject, b"%d" % round_number) for _ in range(500)]
            await futures[0]
            server.kill()
            answers = await asyncio.gather(*futures, return_exceptions=True)
            assert all(isinstance(a, NoAnswer) for a in answers if isinstance(a, BaseException))
            await server.start_async()
            await bus.raw.wait_connected()
            usage = await bus.ledger.usage()
            acknowledged = [a.sequence for a in answers if not isinstance(a, BaseException)]
            assert acknowledged[-1] <= usage.last_sequence <= stored + 500
            stored = usage.last_sequence
        records = await read_up_to(reader, stored)
        assert [r.sequence for r in records] == list(range(1, stored + 1))

        server.suspend()
        try:
            with pytest.raises(NoAnswer):
                await bus.ledger.append(subject, b"into silence")
        finally:
            server.resume()
        await bus.ledger.append(subject, b"heard")
        await bus.close()


async def test_an_error_while_reading_counts_as_a_lost_connection(world: JetStreamTestWorld) -> None:
    async with world.running():
        bus = await world.bus()
        task = bus.raw._reading_task
        assert task is not None
        bus.raw._ps.parse = broken  # type: ignore[method-assign]
        with pytest.raises(NoAnswer):
            await bus.request("anything", b"", timeout=5)
        del bus.raw._ps.parse
        await until(lambda: bus.connections == 2)
        assert (await bus.ledger.append(world.subjects.fact("requests", "accepted"), b"")).sequence == 1


async def broken(data: bytes = b"") -> None:
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("2026-02-03T04:05:06.000000789Z", 1_770_091_506_000_000_789),
    ],
)
def test_times_keep_their_nanoseconds(text: str, expected: int) -> None:
    assert nanoseconds(text) == expected
