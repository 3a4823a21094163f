"""The client library against a cell that loses, repeats, cuts and forgets: an answer is whole all the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from bus_worlds import JetStreamTestWorld, until
from fake_cell import FakeCell

from bus.answer import Answer, Patience, RequestFailed
from bus.client import Client
from bus.memory import MemoryServer
from bus.messages import request_id
from bus.messages.requests import Encoding
from bus.replies import Chunk, ErrorBody, TokenCounts
from bus.server import EmbeddedServer

HASTE = Patience(silence=0.03, nobody=0.2, total=2.0)


def world(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(limited())


async def read(client: Client, **fields: Any) -> list[Chunk]:
    return [chunk async for chunk in client.infer("llama-a", "hello", **fields)]


async def all_of(answer: Answer) -> list[Chunk]:
    return [chunk async for chunk in answer]


def check_whole(chunks: list[Chunk], length: int, start: int = 0) -> None:
    assert [token for chunk in chunks for token in chunk.tokens] == list(range(start, length))
    assert "".join(chunk.text for chunk in chunks) == "".join(f"{p} " for p in range(start, length))
    assert [chunk.end for chunk in chunks if chunk.end] == ["stop"] and chunks[-1].usage == TokenCounts(2, length)


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_an_undisturbed_answer_needs_one_question(encoding: Encoding) -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            client = Client(server.bus("reader"), encoding=encoding, patience=HASTE)
            answer = client.infer("llama-a", "hello", key="k")
            check_whole([chunk async for chunk in answer], 20)
            assert answer.request_id == request_id("anonymous", "k") and list(cell.requests) == [answer.request_id]
            assert (answer.end, answer.usage, answer.questions) == ("stop", TokenCounts(2, 20), 1)
            assert [chunk async for chunk in answer] == []

    world(scenario())


@pytest.mark.parametrize("seed", range(40))
def test_a_disturbed_answer_is_whole_all_the_same(seed: int) -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        chance = random.Random(seed)
        async with FakeCell(server.bus("control"), length=chance.randrange(0, 40), chance=chance) as cell:
            cell.words_lost = chance.choice([0, 0, 1, 3])
            cell.first_word = chance.choice(["accepted", "unknown"])
            cell.chunks_shown = chance.choice([1_000_000, 7])
            start = chance.randrange(0, cell.length + 1)
            client = Client(server.bus("reader"), patience=HASTE)
            answer = client.infer("llama-a", "hello", start=start)
            chunks = [chunk async for chunk in answer]
            check_whole(chunks, cell.length, start)
            assert list(cell.requests) == [answer.request_id], "a repeat must carry the same key"

    world(scenario())


def test_a_hole_is_asked_for_before_silence_is() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            cell.words_lost = 3  # the status and two chunks, and nothing comes after the fifth
            cell.chunks_shown = 5
            client = Client(server.bus("reader"), patience=Patience(silence=100.0, total=200.0))
            check_whole(await read(client), 20)
            assert cell.asked[-1] == ("resume", {"from": 0})

    world(scenario())


def test_a_reconnect_asks_at_once_for_the_rest() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            bus = server.bus("reader")
            cell.chunks_shown = 5
            answer = Client(bus, patience=Patience(silence=100.0, total=200.0)).infer("llama-a", "hello")
            chunks = [await anext(answer) for _ in range(5)]
            server.outage(0.05, bus)
            chunks += [chunk async for chunk in answer]
            check_whole(chunks, 20)
            assert cell.asked[-1] == ("resume", {"from": 5})

    world(scenario())


def test_a_slow_reader_holds_little_and_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bus.answer.UNREAD_LIMIT", 8)

    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control"), length=100) as cell:
            client = Client(server.bus("reader"), patience=Patience(silence=100.0, total=200.0))
            answer = client.infer("llama-a", "hello")
            chunks = [await anext(answer)]
            await asyncio.sleep(0.02)  # all is written by now, and most of it found no room
            chunks += [chunk async for chunk in answer]
            check_whole(chunks, 100)
            assert cell.asked[-1] == ("resume", {"from": 9}), "what was dropped must be asked for, and no more"

    world(scenario())


def test_an_answer_that_is_let_go_of_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control"), length=1000) as cell:
            cell.pause = 0.001
            client = Client(server.bus("reader"), patience=HASTE)
            client.infer("llama-a", "never read")
            async for _ in client.infer("llama-a", "hello"):
                break
            assert len(client._open) == 0 and client.bus._subscriptions == {}  # type: ignore[attr-defined]
            await client.close()

    world(scenario())


def test_many_answers_at_once_over_one_subscription() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control"), chance=random.Random(1)):
            client = Client(server.bus("reader"), patience=HASTE)
            answers = await asyncio.gather(*(read(client) for _ in range(100)))
            for chunks in answers:
                check_whole(chunks, 20)
            assert not client._open and not client.bus._subscriptions  # type: ignore[attr-defined]

    world(scenario())


def test_a_time_of_the_callers_own() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            cell.pause = 0.02
            client = Client(server.bus("reader"), patience=HASTE)
            answer = client.infer("llama-a", "hello", timeout=0.1)
            seen = []
            with pytest.raises(RequestFailed, match=r"not ended within 0\.1 s at position [1-9]; it goes on") as caught:
                async for chunk in answer:
                    seen.append(chunk)
            assert caught.value.code == "timeout" and seen and cell.cancelled == []
            answer = client.infer("llama-a", "hello", timeout=0.05, cancel_on_close=True)
            with pytest.raises(RequestFailed, match="it is being cancelled"):
                await answer.text()
            assert cell.cancelled == [answer.request_id]
            whole = await client.infer("llama-a", "hello", timeout=5, start=18).whole()
            assert (whole.text, whole.tokens, whole.positions, whole.end) == ("18 19 ", (18, 19), 20, "stop")

    world(scenario())


def test_a_lost_or_closed_connection_is_one_sentence() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            cell.chunks_shown = 1
            bus = server.bus("reader")
            client = Client(bus, patience=Patience(silence=0.02, total=0.1))
            answer = client.infer("llama-a", "hello")
            await anext(answer)
            server.cut(bus)
            with pytest.raises(RequestFailed, match="the connection to the NATS server is down") as caught:
                await answer.text()
            assert caught.value.code == "no_connection"
            server.heal(bus)
            answer = client.resume(answer.request_id, 1)
            cell.pause = 1.0
            reading = asyncio.create_task(answer.text())
            await asyncio.sleep(0.01)
            await bus.close()
            with pytest.raises(RequestFailed, match="cannot be read: this subscription is closed") as caught:
                await reading
            assert caught.value.code == "bus"

    world(scenario())


def test_failures_are_raised_after_the_positions_that_stand() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control"), length=3) as cell:
            cell.end, cell.error = "failed", ErrorBody("start_failed", "the model does not load", 50)
            client = Client(server.bus("reader"), patience=HASTE)
            seen = []
            with pytest.raises(RequestFailed, match="the model does not load") as caught:
                async for chunk in client.infer("llama-a", "hello"):
                    seen += chunk.tokens
            assert seen == [0, 1, 2] and (caught.value.code, caught.value.retry_ms) == ("start_failed", 50)

    world(scenario())


def test_refusals_are_raised_with_name_sentence_and_time_to_come_again() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            client = Client(server.bus("reader"), patience=HASTE)
            cell.first_word = "refused"
            with pytest.raises(RequestFailed, match="queue is full") as caught:
                await read(client)
            assert (caught.value.code, caught.value.retry_ms) == ("queue_full", 70)
            for fields, sentence in (
                ({"max_tokens": 0}, "max_tokens must be a whole number"),
                ({"max_token": 1}, "did you mean max_tokens"),
                ({"temperature": float("nan")}, "temperature must be a finite number"),
                ({"stop": "a" * 900_000}, "at most 900000 are taken"),
            ):
                with pytest.raises(RequestFailed, match=sentence):
                    await read(client, **fields)
            with pytest.raises(RequestFailed, match="no request") as caught:
                await client.resume("0" * 32).text()
            assert caught.value.code == "unknown_request"

    world(scenario())


def test_a_cell_that_says_nothing_is_given_up_in_one_sentence() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        client = Client(server.bus("reader"), patience=Patience(silence=0.02, nobody=0.1, total=0.2))
        with pytest.raises(RequestFailed, match=r"said nothing about request .* for 0\.2 s") as caught:
            await read(client)
        assert caught.value.code == "no_answer"
        with pytest.raises(RequestFailed, match=r"nobody listens on longshore\.main\.result\.x") as caught:
            await client.result("x")
        assert caught.value.code == "not_ready"

    world(scenario())


def test_leaving_early_cancels_only_where_that_is_wanted() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            client = Client(server.bus("reader"), patience=HASTE)
            async with client.infer("llama-a", "hello") as answer:
                await anext(answer)
            assert cell.cancelled == []
            async with client.infer("llama-a", "hello", cancel_on_close=True) as answer:
                await anext(answer)
            assert cell.cancelled == [answer.request_id]
            async with client.infer("llama-a", "hello", cancel_on_close=True) as answer:
                await answer.text()
            assert len(cell.cancelled) == 1, "an answer that has ended needs no cancelling"
            cell.chunks_shown = 1
            answer = client.infer("llama-a", "hello", cancel_on_close=True)
            reading = asyncio.create_task(answer.text())
            await asyncio.sleep(0.02)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert cell.cancelled[1:] == [answer.request_id]

    world(scenario())


def test_submitted_requests_are_read_by_their_id() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")) as cell:
            client = Client(server.bus("reader"), name="shop", patience=HASTE)
            request = await client.submit("llama-a", "hello", key="order-7")
            assert request == request_id("shop", "order-7")
            assert (await client.result(request, wait=5.0)).text == "abc"
            assert await client.resume(request, 18).text() == "18 19 "
            with pytest.raises(RequestFailed, match="prompt must not be empty"):
                await client.submit("llama-a", "")
            assert len(cell.requests) == 1

    world(scenario())


def test_operators_read_json() -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        async with FakeCell(server.bus("control")):
            client = Client(server.bus("reader"), patience=HASTE)
            assert await client.models() == [{"model": "a", "tiers": {"s1": "dram"}}]
            with pytest.raises(RequestFailed, match=r"model\.remove: no such model"):
                await client.remove_model("x")
            await client.close()

    world(scenario())


async def test_many_answers_survive_a_dropped_connection_on_a_real_server(nats_server: EmbeddedServer) -> None:
    """All of them over the one subscription of their connection; what was shown meanwhile is asked for."""
    world = JetStreamTestWorld(nats_server)
    async with world.running():
        control, reader = await world.bus(), await world.bus()
        async with FakeCell(control, length=40, cell=world.subjects.cell) as cell:
            cell.pause = 0.005
            client = Client(reader, world.subjects.cell, patience=Patience(silence=0.5))
            subscriptions = len(reader.raw._subs)
            answers = [client.infer("llama-a", "hello") for _ in range(50)]
            reading = asyncio.gather(*(all_of(answer) for answer in answers))
            await until(lambda: all(answer.position > 5 for answer in answers))
            assert len(reader.raw._subs) == subscriptions, "answers share the one that the connection has"
            await world.cut(reader)
            await asyncio.sleep(0.1)
            await world.heal(reader)
            for chunks in await reading:
                check_whole(chunks, 40)
            assert len(cell.requests) == 50
            assert len([verb for verb, _ in cell.asked if verb == "resume"]) >= 50
