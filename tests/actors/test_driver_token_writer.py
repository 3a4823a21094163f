"""Pages and the fence: lost acknowledgements are found out, a seal stops the writer for good."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.token_writer import Fenced, TokenWriter
from bus.contract import Record
from bus.memory import MemoryServer
from bus.memory_faults import FINE, AppendFate, NoFaults
from bus.pages import Page, Seal, encode_page
from bus.subjects import Subjects
from chaos.virtual_time import run as run_virtual

SUBJECT = Subjects("main").tokens("gpu/s1/0", 7)
SEAL = encode_page(Seal(True, "control"))


def page(number: int) -> bytes:
    return encode_page(Page(number, ()))


class Faults(NoFaults):
    """Fates of the appends that come, then all is well."""

    def __init__(self, fates: list[AppendFate]) -> None:
        self.fates = fates

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        return self.fates.pop(0) if self.fates else FINE


LOST = replace(FINE, stored=False)
UNANSWERED = replace(FINE, acknowledged=False)
LATE = replace(FINE, delay=0.3)  # arrives after the writer has given up on it and looked
SLOW_ANSWER = replace(FINE, acknowledgement_delay=0.3)


def writer_on(server: MemoryServer, *fates: AppendFate) -> TokenWriter:
    return TokenWriter(server.bus("worker", faults=Faults(list(fates)), ack_timeout=0.2).tokens, SUBJECT)


@given(st.lists(st.sampled_from([FINE, LOST, UNANSWERED, LATE, SLOW_ANSWER]), max_size=12))
def test_every_page_is_stored_once_in_order_whatever_gets_lost(fates: list[AppendFate]) -> None:
    async def main() -> None:
        server = MemoryServer("main")
        writer = writer_on(server, *fates)
        sequences = [await writer.append(page(number)) for number in range(6)]
        await asyncio.sleep(1.0)
        stored = server.tokens.since(1)
        assert [record.payload for record in stored] == [page(number) for number in range(6)]
        assert sequences == [record.sequence for record in stored]

    run_virtual(main())


@given(st.integers(0, 4), st.sampled_from([FINE, LOST, UNANSWERED, LATE]))
def test_a_seal_stops_the_writer_for_good(pages: int, fate: AppendFate) -> None:
    async def main() -> None:
        server = MemoryServer("main")
        writer = writer_on(server, *([FINE] * pages), fate)
        for number in range(pages):
            await writer.append(page(number))
        server.tokens.append(SUBJECT, SEAL)
        for _ in range(2):
            with pytest.raises(Fenced):
                await writer.append(page(pages))
        await asyncio.sleep(1.0)
        assert server.tokens.since(1)[-1].payload == SEAL
        assert len(server.tokens.since(1)) == pages + 1

    run_virtual(main())


def test_a_page_that_was_stored_just_before_the_seal_counts_as_refused() -> None:
    """The writer cannot know that it stands there, and recovery shows it."""

    async def main() -> None:
        server = MemoryServer("main")
        writer = writer_on(server, UNANSWERED)

        def seal_behind(log: str, record: Record) -> None:
            if record.payload != SEAL:
                server.tokens.append(SUBJECT, SEAL)

        server.observe(seal_behind)
        with pytest.raises(Fenced):
            await writer.append(page(0))
        assert [record.payload for record in server.tokens.since(1)] == [page(0), SEAL]

    run_virtual(main())


def test_an_outage_is_waited_for() -> None:
    async def main() -> None:
        server = MemoryServer("main")
        bus = server.bus("worker", ack_timeout=0.2)
        writer = TokenWriter(bus.tokens, SUBJECT)
        await writer.append(page(0))
        server.outage(7.0, bus)
        began = asyncio.get_running_loop().time()
        await writer.append(page(1))
        assert asyncio.get_running_loop().time() - began >= 7.0
        assert len(server.tokens.since(1)) == 2

    run_virtual(main())


def test_a_full_stream_is_waited_for() -> None:
    async def main() -> None:
        server = MemoryServer("main", tokens_limit_bytes=200, result_retention_seconds=60.0)
        writer = TokenWriter(server.bus("worker").tokens, SUBJECT)
        server.tokens.append(Subjects("main").tokens("gpu/s1/1", 3), b"x" * 100)
        await writer.append(page(0))
        assert asyncio.get_running_loop().time() >= 59.0

    run_virtual(main())
