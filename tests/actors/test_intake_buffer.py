"""Facts of intake wait while no server leads the ledger: on a real server, whose stream is there or is not."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from bus_worlds import until

from actors import intake_buffer
from actors.intake_buffer import IntakeBuffer
from bus.contract import NotTaken
from bus.jetstream import JetStreamBus
from bus.jetstream_api import call
from bus.server import EmbeddedServer

SMALL = {"ledger_limit_bytes": 2**20, "tokens_limit_bytes": 2**20, "intake_limit_bytes": 2**20}
_cells = itertools.count(1)


@asynccontextmanager
async def leaderless(server: EmbeddedServer) -> AsyncIterator[JetStreamBus]:
    """A bus whose streams do not exist: to a publisher that is what a stream without a leader is."""
    bus = await JetStreamBus.connect(server.url, f"buffered{next(_cells)}")
    try:
        yield bus
    finally:
        await bus.ensure_streams(**SMALL)
        names = bus.subjects
        for stream in (names.ledger_stream, names.tokens_stream, names.intake_stream, names.snapshots_stream):
            await call(bus.raw, f"STREAM.DELETE.{stream}")
        await bus.close()


async def test_what_waits_is_stored_once_when_somebody_leads_again(nats_server: EmbeddedServer) -> None:
    async with leaderless(nats_server) as bus:
        buffer = IntakeBuffer(bus.ledger, "me")
        subject = bus.subjects.fact("requests", "request.accepted")
        asked = [asyncio.ensure_future(buffer.append(subject, b"1", "id-1")) for _ in range(3)]
        other = asyncio.ensure_future(buffer.append(subject, b"2", ""))
        await until(lambda: buffer.waiting == 2)
        assert buffer.waiting_bytes == 2
        await bus.ensure_streams(**SMALL)
        answers = await asyncio.gather(*asked, other)
        assert {answer.sequence for answer in answers} == {1, 2} and not any(answer.duplicate for answer in answers)
        assert (await bus.ledger.usage()).messages == 2
        assert (buffer.waiting, buffer.waiting_bytes) == (0, 0)
        assert (await buffer.append(subject, b"1", "id-1")).duplicate


@pytest.mark.parametrize("bound", ["WAITING_LIMIT", "WAITING_LIMIT_BYTES"])
async def test_beyond_the_bound_it_is_refused(
    nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(intake_buffer, bound, 1)
    async with leaderless(nats_server) as bus:
        buffer = IntakeBuffer(bus.ledger, "me")
        subject = bus.subjects.fact("requests", "request.accepted")
        first = asyncio.ensure_future(buffer.append(subject, b"1", "id-1"))
        await until(lambda: buffer.waiting == 1)
        with pytest.raises(NotTaken, match="1 requests wait already until somebody leads the ledger"):
            await buffer.append(subject, b"2", "id-2")
        await bus.ensure_streams(**SMALL)
        assert (await first).sequence == 1


async def test_nobody_waits_for_ever(nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_buffer, "WAIT_SECONDS", 0.4)
    async with leaderless(nats_server) as bus:
        buffer = IntakeBuffer(bus.ledger, "me")
        with pytest.raises(NotTaken, match="it is not stored"):
            await buffer.append(bus.subjects.fact("requests", "request.accepted"), b"1", "id-1")
        assert (buffer.waiting, buffer.waiting_bytes) == (0, 0)
