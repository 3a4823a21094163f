"""The client contract on a real cell: encodings, errors, cancel, resume, results, submissions, the services API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.stub_node import MODEL
from bus.answer import RequestFailed
from bus.client import Client
from bus.contract import NoResponders
from bus.messages import choice_id, request_id
from bus.replies import Chunk, Result, Status, TokenCounts, WholeAnswers, decode_reply
from bus.subjects import Subjects
from tests.support.live_cell import CELL, LiveCell, live_cell

SUBJECTS = Subjects(CELL)


@asynccontextmanager
async def slow_cell(folder: Path, **options: Any) -> AsyncIterator[LiveCell]:
    async with live_cell(folder, step_seconds=0.02, **options) as cell:
        yield cell


async def replies(cell: LiveCell, subject: str, body: Any, *, msgpack: bool = False) -> list[Any]:
    """Everything that comes on one reply subject, up to the empty message or a refusal."""
    inbox = cell.bus.new_inbox()
    subscription = await cell.bus.subscribe(inbox)
    payload = body if isinstance(body, bytes) else (msgspec.msgpack if msgpack else msgspec.json).encode(body)
    headers = {"Content-Type": "application/msgpack"} if msgpack else None
    found: list[Any] = []
    async with asyncio.timeout(20):
        await cell.bus.publish(subject, payload, reply=inbox, headers=headers)
        while True:
            delivery = await subscription.next()
            if not delivery.payload:
                return found
            reply = decode_reply(delivery.payload, "msgpack" if msgpack else "json")
            found.append(reply)
            if isinstance(reply, Status) and reply.status == "refused":
                return [reply, delivery.headers]
            if isinstance(reply, Chunk) and reply.end and isinstance(body, dict) and body.get("stream") is False:
                return found


async def test_one_cell_keeps_the_contract(tmp_path: Path) -> None:
    """One cell for all of it: starting one costs more than what is asked of it."""
    async with slow_cell(tmp_path) as cell:
        for check in (
            streamed_in_both_encodings,
            a_single_reply,
            refusals,
            cancelled,
            a_deadline,
            resumed_and_read_again,
            one_key_one_answer,
            the_fields_of_sampling,
            several_answers,
            submitted,
            services_api,
            models_and_status,
        ):
            await check(cell)


async def streamed_in_both_encodings(cell: LiveCell) -> None:
    texts = []
    for msgpack in (False, True):
        found = await replies(
            cell, SUBJECTS.infer(MODEL), {"prompt": "hi", "max_tokens": 5, "seed": 3}, msgpack=msgpack
        )
        chunks = [one for one in found if isinstance(one, Chunk)]
        assert next(one for one in found if isinstance(one, Status)).status == "accepted"
        assert [chunk.position for chunk in chunks] == [0, 1, 2, 3, 4]
        assert chunks[-1].end == "length"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5
        texts.append("".join(chunk.text for chunk in chunks))
    assert texts[0] == texts[1]


async def a_single_reply(cell: LiveCell) -> None:
    found = await replies(cell, SUBJECTS.infer(MODEL), {"prompt": "hi", "max_tokens": 5, "seed": 3, "stream": False})
    assert len(found) == 1 and isinstance(found[0], Chunk)
    assert len(found[0].tokens) == 5 and found[0].end == "length" and found[0].text


async def refusals(cell: LiveCell) -> None:
    infer = SUBJECTS.infer(MODEL)
    table: list[tuple[str, Any, str, str]] = [
        (SUBJECTS.infer("nobody"), {"prompt": "x"}, "404", "nobody"),
        (infer, {"prompt": ""}, "400", "prompt must not be empty"),
        (infer, {}, "400", "exactly one of prompt, messages, tokens and prompt_parts"),
        (infer, {"prompt": "x", "max_tokens": 0}, "400", "max_tokens"),
        (infer, {"prompt": "x", "max_tokens": "many"}, "400", "max_tokens"),
        (infer, {"prompt": "x", "max_tokens": 9000}, "400", "at most 8192"),
        (infer, {"prompt": "x", "temprature": 1}, "400", "temperature"),
        (infer, {"tokens": [5000]}, "400", "vocabulary of 1000"),
        (infer, {"tokens": [1] * 9000}, "400", "context"),
        (infer, {"prompt": "x", "n": 17}, "400", "n must be a whole number from 1 to 16"),
        (infer, {"prompt": "x", "logprobs": 21}, "400", "logprobs must be a whole number from 0 to 20"),
        (infer, {"prompt": "x", "stop_tokens": [1000]}, "400", "stop_tokens has token id 1000, outside"),
        (infer, {"prompt": "x", "logit_bias": {"5000": 1}}, "400", "logit_bias has token id 5000, outside"),
        (infer, b"no json", "400", "JSON"),
        (infer, b"x" * 950_000, "413", "at most"),
        (SUBJECTS.resume("0" * 32), b"", "404", "no request"),
        (SUBJECTS.cancel("xyz"), b"", "404", "32 hexadecimal digits"),
        (SUBJECTS.admin("nothing"), b"", "400", "unknown verb"),
    ]
    for subject, body, code, words in table:
        found = await replies(cell, subject, body)
        assert found[0].status == "refused", (subject, body)
        assert words in found[0].error.message, found[0].error.message
        assert found[1]["Nats-Service-Error-Code"] == code
        assert found[0].error.message.count("\n") == 0


async def cancelled(cell: LiveCell) -> None:
    async with cell.client.infer(MODEL, prompt="cancel me", max_tokens=500) as answer:
        seen = 0
        async for chunk in answer:
            seen += len(chunk.tokens)
            if seen == 5:
                await cell.client.cancel(answer.request_id)
    assert answer.end == "cancelled"
    assert 5 <= seen < 100


async def a_deadline(cell: LiveCell) -> None:
    async with cell.client.infer(MODEL, prompt="late", max_tokens=500, deadline_ms=300) as answer:
        seen = sum([len(chunk.tokens) async for chunk in answer])
    assert answer.end == "deadline"
    assert seen < 100


async def resumed_and_read_again(cell: LiveCell) -> None:
    client = cell.client
    first = client.infer(MODEL, prompt="resume me", max_tokens=60, seed=4)
    seen: list[int] = []
    async for chunk in first:
        seen += chunk.tokens
        if len(seen) >= 10:
            break
    await first.aclose()
    rest = [token async for chunk in client.resume(first.request_id, len(seen)) for token in chunk.tokens]
    again = [token async for chunk in client.resume(first.request_id, 0) for token in chunk.tokens]
    result = await client.result(first.request_id, wait=10)
    assert len(again) == 60
    assert seen + rest == again == list(result.tokens)
    assert result.end == "length" and result.text


async def one_key_one_answer(cell: LiveCell) -> None:
    body = {"prompt": "order", "max_tokens": 4, "client": "shop", "key": "order-7"}
    first = await replies(cell, SUBJECTS.infer(MODEL), body)
    second = await replies(cell, SUBJECTS.infer(MODEL), body)
    tokens = [[t for one in found if isinstance(one, Chunk) for t in one.tokens] for found in (first, second)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 4
    assert first[0].request == second[0].request == request_id("shop", "order-7")
    other = await replies(cell, SUBJECTS.infer(MODEL), body | {"prompt": "another"})
    refused, headers = other
    assert refused.error.code == "key_reused" and headers["Nats-Service-Error-Code"] == "409"


async def the_fields_of_sampling(cell: LiveCell) -> None:
    infer = SUBJECTS.infer(MODEL)
    body = {"prompt": "fields", "max_tokens": 6, "seed": 3, "logprobs": 2, "key": "fields", "priority": 5}
    (plain,) = await replies(cell, infer, {"prompt": "fields", "max_tokens": 6, "seed": 3, "stream": False})
    streamed = [one for one in await replies(cell, infer, body) if isinstance(one, Chunk)]
    assert [token for chunk in streamed for token in chunk.tokens] == list(plain.tokens)
    logprobs = [one for chunk in streamed for one in chunk.logprobs]
    assert len(logprobs) == 6 and all(one.alternatives[0].text.startswith("tok") for one in logprobs)
    again = [
        one for one in await replies(cell, SUBJECTS.resume(streamed[0].request), {"from": 2}) if isinstance(one, Chunk)
    ]
    assert [one for chunk in again for one in chunk.logprobs] == logprobs[2:]
    assert list((await cell.client.result(streamed[0].request)).logprobs) == logprobs
    banned = plain.tokens[0]
    for more in ({"logit_bias": {str(banned): -100}}, {"logit_bias": {banned: -100}}):
        asked = {"prompt": "fields", "max_tokens": 6, "seed": 3, "stream": False} | more
        found = await replies(cell, infer, asked, msgpack=banned in more["logit_bias"])
        assert banned not in found[0].tokens and found[0].tokens[1:] == plain.tokens[1:]
    (ended,) = await replies(cell, infer, body | {"stop_tokens": [plain.tokens[2]], "stream": False, "key": "ended"})
    assert (ended.end, ended.tokens) == ("stop", plain.tokens[:3])
    (later,) = await replies(
        cell, infer, body | {"stop_tokens": [plain.tokens[2]], "min_tokens": 4, "stream": False, "key": "later"}
    )
    assert len(later.tokens) == 6 and plain.tokens[2] not in later.tokens[:4]


async def several_answers(cell: LiveCell) -> None:
    infer, body = SUBJECTS.infer(MODEL), {"prompt": "many", "max_tokens": 5, "seed": 3, "client": "shop", "n": 3}
    alone = []
    for seed in (3, 4, 5):
        asked = {"prompt": "many", "max_tokens": 5, "seed": seed, "stream": False}
        alone.append((await replies(cell, infer, asked))[0].tokens)
    name = request_id("shop", "many")
    for msgpack, subject in ((False, infer), (True, infer), (False, SUBJECTS.resume(name))):
        asked = body | {"key": "many"} if subject == infer else {}
        found = [one for one in await replies(cell, subject, asked, msgpack=msgpack) if isinstance(one, Chunk)]
        assert {chunk.request for chunk in found} == {name}
        for choice, tokens in enumerate(alone):
            mine = [chunk for chunk in found if chunk.choice == choice]
            assert tuple(token for chunk in mine for token in chunk.tokens) == tokens
            assert [(chunk.end, chunk.n) for chunk in mine if chunk.end] == [("length", 3)], "before the empty message"
    inbox = cell.bus.new_inbox()
    subscription = await cell.bus.subscribe(inbox)
    async with asyncio.timeout(20):
        for key in ("many", "many-2"):
            asked = json.dumps(body | {"key": key, "stream": False}).encode()
            await cell.bus.publish(infer, asked, reply=inbox)
            whole = decode_reply((await subscription.next()).payload)
            assert isinstance(whole, WholeAnswers) and [chunk.tokens for chunk in whole.choices] == alone
            assert [chunk.choice for chunk in whole.choices] == [0, 1, 2]
            assert whole.usage == TokenCounts(4, 15)
    await subscription.close()
    result = await cell.client.result(name)
    assert [chunk.tokens for chunk in result.choices] == alone and (result.positions, result.end) == (15, "length")
    answer = await cell.client.infer(MODEL, prompt="many", max_tokens=5, seed=3, n=3, key="many-3").whole()
    assert [chunk.tokens for chunk in answer.choices] == alone and answer.usage == TokenCounts(4, 15)
    resumed = await cell.client.resume(answer.request).whole()
    assert resumed.choices == answer.choices
    async with cell.client.infer(MODEL, prompt="cancel", max_tokens=500, n=2) as reading:
        async for chunk in reading:
            if chunk.position == 3:
                await reading.cancel()
                far = await cell.client.result(reading.request_id)
                assert far.status == "ended" or len(far.choices) == 2
    assert reading.end == "cancelled"
    other = choice_id(name, "shop", "many", 1)
    refused = (await replies(cell, SUBJECTS.result(other), b""))[0]
    assert refused.status == "refused" and refused.error.code == "unknown_request"


async def submitted(cell: LiveCell) -> None:
    client = cell.client
    request = await client.submit(MODEL, prompt="later", key="s-1", max_tokens=6)
    result = await client.result(request, wait=15)
    assert isinstance(result, Result) and len(result.tokens) == 6 and result.end == "length"
    acknowledged = await cell.bus.request(SUBJECTS.submit(MODEL), b'{"prompt":"keyless","max_tokens":2}')
    sequence = json.loads(acknowledged.payload)["seq"]
    keyless = await found_by_then(client, request_id("anonymous", f"submit:{sequence}"))
    assert len(keyless.tokens) == 2
    refused = await cell.bus.subscribe(SUBJECTS.refused("stub"))
    await cell.bus.request(SUBJECTS.submit(MODEL), b'{"prompt":""}')
    async with asyncio.timeout(10):
        told = await refused.next()
    assert b"must not be empty" in told.payload
    for body, code in (
        (b'{"prompt":"another","client":"test","key":"s-1"}', b"key_reused"),
        (b'{"key":"s-2"}', b"bad_request"),
    ):
        await cell.bus.request(SUBJECTS.submit(MODEL), body)
        async with asyncio.timeout(10):
            told = await refused.next()
        assert code in told.payload and json.loads(told.payload)["key"] == json.loads(body)["key"]


async def found_by_then(client: Client, request: str) -> Result:
    """Between the stream's acknowledgement and the ledger nobody knows a request that this client did not submit."""
    async with asyncio.timeout(15):
        while True:
            try:
                return await client.result(request, wait=15)
            except RequestFailed as failure:
                assert failure.code == "unknown_request"


async def services_api(cell: LiveCell) -> None:
    for verb in ("PING", "INFO", "STATS"):
        delivery = await cell.bus.request(f"$SRV.{verb}.longshore", b"")
        body = json.loads(delivery.payload)
        assert body["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
        assert body["name"] == "longshore" and body["id"]


async def models_and_status(cell: LiveCell) -> None:
    models = await cell.client.models()
    assert [model["model"] for model in models] == [MODEL]
    status = await cell.client.status()
    assert status["workers"] and status["requests"]["finished"] >= 3
    with pytest.raises(RequestFailed, match="no model"):
        await cell.client.remove_model("nobody")


async def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    async with slow_cell(tmp_path, slots=1, control=("--queue-limit", "3")) as cell:
        client = cell.client
        answers = [client.infer(MODEL, prompt=f"p{i}", max_tokens=100) for i in range(12)]
        ends = await asyncio.gather(*(answer.text() for answer in answers), return_exceptions=True)
        refused = [end for end in ends if isinstance(end, RequestFailed)]
        assert refused and all(one.code == "queue_full" and one.retry_ms >= 100 for one in refused)
        assert "the limit is 3" in str(refused[0])
        assert sum(isinstance(end, str) for end in ends) >= 3


async def test_results_are_forgotten_after_their_retention(tmp_path: Path) -> None:
    async with live_cell(tmp_path, control=("--retention", "1")) as cell:
        request = await cell.client.submit(MODEL, prompt="soon gone", key="k", max_tokens=2)
        async with asyncio.timeout(20):
            while True:
                try:
                    await cell.client.result(request)
                except RequestFailed as failure:
                    if failure.code == "unknown_request" and "kept for 1 s" in failure.message:
                        seen_kept = True
                        status = await cell.client.status()
                        if not status["requests"]:
                            break
                await asyncio.sleep(0.1)
        assert seen_kept


async def test_without_control_nobody_answers(tmp_path: Path) -> None:
    async with live_cell(tmp_path) as cell:
        await cell.controls[0].stop()
        with pytest.raises(NoResponders):
            await cell.bus.request(SUBJECTS.infer(MODEL), b'{"prompt":"x"}')
        failing = Client(cell.bus, CELL)
        with pytest.raises(RequestFailed):
            await failing.models()
