"""Same client and key, same answer, computed once: whoever asks, by which control, and whatever was restarted since."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from actors.stub_node import MODEL
from bus import jetstream
from bus.answer import RequestFailed
from bus.client import Client
from bus.jetstream import JetStreamBus
from bus.messages import request_id
from bus.messages.requests import Encoding
from tests.support.live_cell import CELL, LiveCell, live_cell

CONNECTIONS = 6
ENCODINGS: tuple[Encoding, ...] = ("json", "msgpack")


async def computed(cell: LiveCell, request: str) -> int:
    """How often the cell had this request begun from its first position."""
    found, last = 0, (await cell.bus.ledger.usage()).last_sequence
    reader = await cell.bus.ledger.read([cell.bus.subjects.said("*", "*", "sequence.start")])
    try:
        while True:
            for record in await asyncio.wait_for(reader.batch(), 5):
                found += json.loads(record.payload)["body"]["request"] == request
                if record.pending == 0 or record.sequence >= last:
                    return found
    finally:
        await reader.close()


async def test_one_key_is_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell with two controls for all of it. The server forgets message ids after a second."""
    monkeypatch.setattr(jetstream, "DEDUPE_SECONDS", 1)
    async with live_cell(tmp_path, controls=2, step_seconds=0.005) as cell:
        config = (await jetstream.stream_info(cell.bus.raw, cell.bus.subjects.ledger_stream))["config"]
        assert config["duplicate_window"] == 1_000_000_000
        await concurrent_repeats(cell)
        await another_body_is_refused(cell)
        first = await everywhere_the_same(cell)
        await asyncio.sleep(1.2)  # beyond the dedupe window
        assert await everywhere_the_same(cell) == first
        for control in cell.controls:
            await control.stop()
        for control in cell.controls:
            await control.start()
        await cell.until(lambda found: bool(found["workers"]))
        assert await everywhere_the_same(cell) == first
        for key in ("order-1", "order-2"):
            assert await computed(cell, request_id("shop", key)) == 1


async def everywhere_the_same(cell: LiveCell) -> tuple[str, ...]:
    """By infer and by submit, in whichever order: the texts of both keys."""
    client = Client(cell.bus, CELL, name="shop")
    fields: dict[str, Any] = {"prompt": "an order", "max_tokens": 30, "temperature": 1.0}
    asked = await client.infer(MODEL, key="order-1", **fields).whole()
    request = await client.submit(MODEL, key="order-1", **fields)
    left = await client.submit(MODEL, key="order-2", **fields)
    texts = []
    for key, submitted in (("order-1", request), ("order-2", left)):
        assert submitted == request_id("shop", key)
        result = await client.result(submitted, wait=20)
        again = await client.infer(MODEL, key=key, **fields).whole()
        late = await client.infer(MODEL, key=key, start=20, **fields).whole()
        assert (again.text, again.tokens, again.usage) == (result.text, result.tokens, result.usage)
        assert late.tokens == result.tokens[20:]
        texts.append(result.text)
    assert asked.text == texts[0] != texts[1]
    return tuple(texts)


async def concurrent_repeats(cell: LiveCell) -> None:
    """Many at once over several connections: each control gets some, none knows of the others yet."""
    buses = [await JetStreamBus.connect(cell.server.url, CELL) for _ in range(CONNECTIONS)]
    try:
        for number in range(4):
            key = f"race-{number}"
            clients = [Client(bus, CELL, name="racers", encoding=ENCODINGS[i % 2]) for i, bus in enumerate(buses)]
            ask: dict[str, Any] = {"prompt": "ready, steady", "key": key, "max_tokens": 10}
            answers = [client.infer(MODEL, **ask) for client in clients for _ in (1, 2)]
            submits = [client.submit(MODEL, **ask) for client in clients[:2]]
            whole = asyncio.gather(*(answer.whole() for answer in answers))
            requests = await asyncio.gather(*submits)
            texts = {found.text for found in await whole}
            assert len(texts) == 1 and set(requests) == {request_id("racers", key)}
            assert (await clients[0].result(requests[0], wait=10)).text in texts
            assert await computed(cell, requests[0]) == 1
    finally:
        for bus in buses:
            await bus.close()
    # Every control answers; a single request would see only the one that is first.
    inbox = cell.bus.new_inbox()
    answers_of_controls = await cell.bus.subscribe(inbox)
    await cell.bus.publish("$SRV.STATS.longshore", b"", reply=inbox)
    async with asyncio.timeout(10):
        counts = [json.loads((await answers_of_controls.next()).payload) for _ in range(2)]
    await answers_of_controls.close()
    assert len({one["id"] for one in counts}) == 2
    assert all(one["endpoints"][0]["num_requests"] > 3 for one in counts), "both controls must have had a share"


async def another_body_is_refused(cell: LiveCell) -> None:
    client = Client(cell.bus, CELL, name="racers")
    refused = await cell.bus.subscribe(cell.bus.subjects.refused(MODEL))
    with pytest.raises(RequestFailed) as caught:
        await client.infer(MODEL, "something else", key="race-1", max_tokens=10).text()
    assert caught.value.code == "key_reused"
    await client.submit(MODEL, "ready, steady", key="race-1", max_tokens=11)
    async with asyncio.timeout(10):
        told = json.loads((await refused.next()).payload)
    assert told["key"] == "race-1" and told["error"]["code"] == "key_reused"


async def test_a_forgotten_key_is_free_again_within_the_dedupe_window(tmp_path: Path) -> None:
    """What the server still takes for a repeat is none any more once the cell has forgotten the request."""
    async with live_cell(tmp_path, control=("--retention", "1")) as cell:
        client = Client(cell.bus, CELL, name="shop")
        for prompt in ("first", "first", "second"):
            request = await client.submit(MODEL, prompt, key="k", max_tokens=8000)
            async with asyncio.timeout(10):
                answer = client.resume(request)
                await anext(answer)
                await answer.cancel()
                assert (await answer.whole()).end == "cancelled"
            await cell.until(lambda found: not found["requests"])
        assert await computed(cell, request) == 3
