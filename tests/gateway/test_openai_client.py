"""OpenAI's own client against a real gateway, a real cell and real processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from packed_sample import pack_sample

from actors.stub_node import MODEL
from actors.up import CellProcesses, UpOptions, cell_status
from bus.client import Client
from bus.jetstream import JetStreamBus
from bus.messages import request_id
from tests.support.live_cell import CELL, LiveCell, live_cell
from tests.support.live_gateway import live_gateway

SHOP_KEY, OFFICE_KEY = "shop-key-123456", "office-key-1234"
CHAT: list[Any] = [{"role": "user", "content": "hi"}]


@dataclass
class World:
    cell: LiveCell
    url: str
    shop: AsyncOpenAI

    async def idle(self) -> None:
        """Until no worker holds a sequence."""
        await self.cell.until(
            lambda found: (
                not any(one["active"] for worker in found["workers"].values() for one in worker["instances"].values())
            )
        )


@asynccontextmanager
async def world(folder: Path, *gateway: str, **options: Any) -> AsyncIterator[World]:
    keys = folder / "keys"
    keys.write_text(f"# who may ask\nshop {SHOP_KEY}\n\noffice {OFFICE_KEY}\n")
    async with (
        live_cell(folder, **options) as cell,
        live_gateway(cell.server, CELL, folder, "--api-keys", str(keys), *gateway) as (url, _),
        AsyncOpenAI(base_url=f"{url}/v1", api_key=SHOP_KEY, max_retries=0, timeout=30) as shop,
    ):
        yield World(cell, url, shop)


async def test_openai_client_on_one_cell(tmp_path: Path) -> None:
    """One cell for all of it: starting one costs more than what is asked of it."""
    async with world(tmp_path, step_seconds=0.005, slots=4, control=("--queue-limit", "4")) as one:
        for check in (
            models,
            chat_whole_and_streamed,
            completions_of_one_and_of_several_prompts,
            texts_in_parts_and_roles,
            several_answers,
            log_probabilities,
            embeddings,
            one_key_one_answer,
            api_keys,
            errors_in_shape,
            a_client_that_goes_away_frees_its_slot,
            a_full_queue,
            health,
        ):
            await check(one)


async def models(world: World) -> None:
    listed = [model.id async for model in world.shop.models.list()]
    assert listed == [MODEL]
    assert (await world.shop.models.retrieve(MODEL)).owned_by == "longshore"
    with pytest.raises(openai.NotFoundError, match="no model 'a/b'"):
        await world.shop.models.retrieve("a/b")


async def chat_whole_and_streamed(world: World) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 6, "seed": 3, "temperature": 0.5}
    whole = await world.shop.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None and whole.usage.completion_tokens == 6
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 6
    assert whole.id == f"chatcmpl-{whole._request_id}"

    stream = await world.shop.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    events = [event async for event in stream]
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content and text.count("tok") == 6
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert all(event.usage is None for event in events[:-1])
    # The same request over NATS has the same answer.
    client = Client(world.cell.bus, CELL)
    assert await client.infer(MODEL, messages=CHAT, max_tokens=6, seed=3, temperature=0.5).text() == text


async def completions_of_one_and_of_several_prompts(world: World) -> None:
    complete = world.shop.completions.create
    one = await complete(model=MODEL, prompt=[5, 6, 7], max_tokens=3, seed=1)
    assert one.usage is not None and one.usage.prompt_tokens == 3
    assert (await complete(model=MODEL, prompt="x")).choices[0].text.count("tok") == 16  # OpenAI's default
    several = await complete(model=MODEL, prompt=["a", "bc", "def"], max_tokens=4, seed=-1)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage is not None and several.usage.prompt_tokens == 6 and several.usage.completion_tokens == 12
    texts = {0: "", 1: "", 2: ""}
    async for event in await complete(model=MODEL, prompt=["a", "bc", "def"], max_tokens=4, seed=-1, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert [texts[choice.index] for choice in several.choices] == [choice.text for choice in several.choices]


async def texts_in_parts_and_roles(world: World) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "name": "ann", "content": "hi"},
    ]
    plain: list[Any] = [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": "hi"}]
    ask = world.shop.chat.completions.create
    first = await ask(model=MODEL, messages=parts, max_tokens=3, seed=1, user="u", metadata={"a": "b"}, store=False)
    second = await ask(model=MODEL, messages=plain, max_completion_tokens=3, seed=1, extra_body={"top_k": 0})
    assert first.choices == second.choices and first.usage == second.usage


async def several_answers(world: World) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 4, "n": 3, "seed": 1, "temperature": 1}
    whole = await world.shop.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    streamed, ends = ["", "", ""], []
    async for event in await world.shop.chat.completions.create(**asked, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts and sorted(ends) == [0, 1, 2]
    both = await world.shop.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=2, seed=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage is not None and (both.usage.prompt_tokens, both.usage.completion_tokens) == (2, 8)


async def log_probabilities(world: World) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 4, "seed": 1}
    chat = world.shop.chat.completions.create
    whole = await chat(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    entries = whole.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == whole.choices[0].message.content and len(entries) == 4
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert bytes(entries[0].bytes or []).decode() == entries[0].token
    streamed = []
    async for event in await chat(**asked, logprobs=True, top_logprobs=2, stream=True):
        if event.choices[0].logprobs is not None:
            streamed += event.choices[0].logprobs.content or []
    assert streamed == entries
    with pytest.raises(openai.BadRequestError) as refused:
        await chat(**asked, logprobs=True, top_logprobs=21)
    assert refused.value.param == "top_logprobs" and refused.value.message.count("top_logprobs must be")
    old = await world.shop.completions.create(model=MODEL, prompt="x", max_tokens=3, logprobs=1, seed=1)
    found = old.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert "".join(found.tokens) == old.choices[0].text and found.text_offset[1] == len(found.tokens[0])
    assert found.top_logprobs is not None and len(found.top_logprobs) == 3


async def embeddings(world: World) -> None:
    create = world.shop.embeddings.create
    several = await create(model=MODEL, input=["a", "b", "a"], encoding_format="float")
    assert [one.index for one in several.data] == [0, 1, 2] and several.usage.prompt_tokens == 3
    assert several.data[0].embedding == several.data[2].embedding != several.data[1].embedding
    coded = await create(model=MODEL, input=[ord("a")])  # OpenAI's client asks for base64 by itself
    assert coded.data[0].embedding == pytest.approx(several.data[0].embedding)
    many = await create(model=MODEL, input=[f"text {number % 300}" for number in range(600)])
    assert len(many.data) == 600 and many.data[0].embedding == many.data[300].embedding != many.data[1].embedding
    for change, param in (({"input": []}, "input"), ({"dimensions": 5}, "dimensions"), ({"input": ["a", 1]}, "input")):
        with pytest.raises(openai.BadRequestError) as refused:
            await create(**({"model": MODEL, "input": "a"} | change))
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError):
        await create(model="nobody", input="a")


async def one_key_one_answer(world: World) -> None:
    async def ask(client: AsyncOpenAI, prompt: str) -> tuple[str, str]:
        answer = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=5, temperature=1, extra_headers={"Idempotency-Key": "order-7"}
        )
        return answer.choices[0].text, str(answer._request_id)

    first = await ask(world.shop, "buy")
    assert await ask(world.shop, "buy") == first
    assert first[1] == request_id("shop", "order-7")
    with pytest.raises(openai.ConflictError) as reused:
        await ask(world.shop, "sell")
    assert reused.value.code == "key_reused"
    office = world.shop.with_options(api_key=OFFICE_KEY)
    assert await ask(office, "sell") != first  # another client, other keys


async def api_keys(world: World) -> None:
    for key in ("wrong-key-12345", SHOP_KEY[:-1], SHOP_KEY + "x"):
        with pytest.raises(openai.AuthenticationError) as refused:
            await world.shop.with_options(api_key=key).models.list()
        assert refused.value.code == "invalid_api_key"
        assert refused.value.response.headers["www-authenticate"] == "Bearer"
    response = await world.shop._client.get(f"{world.url}/v1/models")  # without any
    assert response.status_code == 401


async def errors_in_shape(world: World) -> None:
    chat, complete = world.shop.chat.completions.create, world.shop.completions.create
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    table: list[tuple[Any, dict[str, Any], int, str, str]] = [
        (complete, {"model": "nobody"}, 404, "model", "nobody"),
        (complete, {"model": ""}, 400, "model", "model must be"),
        (complete, {"temperature": 200}, 400, "temperature", "from 0 to 100"),
        (complete, {"max_tokens": 0}, 400, "max_tokens", "from 1"),
        (complete, {"max_tokens": 9000}, 400, "max_tokens", "at most 8192"),
        (complete, {"stop": ["x"] * 9}, 400, "stop", "at most 8"),
        (complete, {"prompt": ""}, 400, "prompt", "must not be empty"),
        (complete, {"prompt": [[1], [2000]]}, 400, "", "vocabulary"),
        (complete, {"prompt": [1] * 9000}, 400, "messages", "context"),
        (complete, {"suffix": "x"}, 400, "suffix", "not supported"),
        (complete, {"extra_body": {"temprature": 1}}, 400, "temprature", "did you mean temperature"),
        (chat, {"messages": image}, 400, "messages[0].content[0]", "images"),
        (chat, {"messages": []}, 400, "messages", "at least one"),
        (chat, {"tools": tools}, 400, "tools", "not supported"),
        (chat, {"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        (chat, {"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "differ"),
        (chat, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream true"),
    ]
    for create, change, status, param, words in table:
        asked = {"model": MODEL} | ({"messages": CHAT} if create is chat else {"prompt": "x"}) | change
        with pytest.raises(openai.APIStatusError) as raised:
            await create(**asked)
        error = raised.value
        assert error.status_code == status and error.type == "invalid_request_error", (change, error.body)
        assert words in error.message and (error.param or "") == param, (change, error.body)
        assert error.response.headers["x-request-id"]
    http = world.shop._client
    headers = {"Authorization": f"Bearer {SHOP_KEY}"}
    for method, path, body, content_type, status in (
        ("GET", "/v1/nothing", b"", "", 404),
        ("GET", "/v1/completions", b"", "", 405),
        ("POST", "/v1/completions", b"{}", "text/plain", 415),
        ("POST", "/v1/completions", b"{", "application/json", 400),
        ("POST", "/v1/completions", b"[" * 100_000, "application/json", 400),
        ("POST", "/v1/completions", b" " * (13 << 20), "application/json", 413),
    ):
        response = await http.request(
            method, world.url + path, content=body, headers=headers | {"content-type": content_type}
        )
        assert response.status_code == status, (path, response.text)
        assert response.json()["error"]["message"]


async def a_client_that_goes_away_frees_its_slot(world: World) -> None:
    ask = world.shop.chat.completions.create
    await world.idle()
    before = (await world.cell.status())["requests"].get("cancelled", 0)
    stream = await ask(model=MODEL, messages=CHAT, stream=True)
    async for event in stream:
        if event.choices[0].delta.content:
            break
    await stream.close()
    await world.idle()
    waiting = asyncio.ensure_future(ask(model=MODEL, messages=CHAT))  # no stream: a whole answer of 8,191 tokens
    await world.cell.until(lambda found: any(one["active"] for one in _instances(found)))
    waiting.cancel()
    await world.idle()
    found = await world.cell.status()
    assert found["requests"]["cancelled"] == before + 2
    # With a key of its own a request goes on: whoever repeats it gets the answer.
    kept = await ask(model=MODEL, messages=CHAT, max_tokens=60, stream=True, extra_headers={"Idempotency-Key": "kept"})
    await anext(aiter(kept))
    await kept.close()
    result = await Client(world.cell.bus, CELL).result(request_id("shop", "kept"), wait=20)
    assert result.end == "length" and result.positions == 60


async def a_full_queue(world: World) -> None:
    async def ask() -> str:
        answer = await world.shop.completions.create(model=MODEL, prompt="x", max_tokens=200)
        return answer.choices[0].text

    answers = await asyncio.gather(*(ask() for _ in range(20)), return_exceptions=True)
    refused = [one for one in answers if isinstance(one, openai.RateLimitError)]
    finished = [one for one in answers if isinstance(one, str)]
    assert refused and len(finished) >= 5 and len(refused) + len(finished) == 20, answers
    assert all(one.count("tok") == 200 for one in finished)
    for error in refused:
        assert error.code == "queue_full" and error.type == "rate_limit_error"
        assert int(error.response.headers["retry-after"]) >= 1
        assert int(error.response.headers["retry-after-ms"]) >= 100
    # OpenAI's client comes again when it is told to.
    patient = world.shop.with_options(max_retries=100)
    more = [patient.completions.create(model=MODEL, prompt="x", max_tokens=20) for _ in range(20)]
    assert len(await asyncio.gather(*more)) == 20


async def health(world: World) -> None:
    http = world.shop._client
    for path in ("/health", "/health/ready", "/health/live"):
        assert (await http.get(world.url + path)).status_code == 200
    await world.cell.controls[0].stop()
    for _ in range(200):
        response = await http.get(world.url + "/health/ready")
        if response.status_code != 200:
            break
        await asyncio.sleep(0.1)
    assert response.status_code == 503 and "nobody listens" in response.json()["reason"]
    assert (await http.get(world.url + "/health/live")).status_code == 200


def _instances(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for worker in status["workers"].values() for one in worker["instances"].values()]


async def test_a_real_model(tmp_path: Path) -> None:
    await asyncio.to_thread(pack_sample, tmp_path / "models", "tiny/llama")
    async with CellProcesses(UpOptions(data=tmp_path, nodes=1, workers=1, memory="1GB", dram="1GB")) as cell:
        assert cell.server is not None
        bus = await JetStreamBus.connect(cell.url, "main", create=True)
        try:
            await cell.ready(bus)
            async with (
                live_gateway(cell.server, "main", tmp_path) as (url, _),
                AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
            ):
                messages: list[Any] = [{"role": "user", "content": "Where is the harbour? 海港"}]
                asked: dict[str, Any] = {"model": "tiny/llama", "messages": messages, "max_tokens": 24, "seed": 5}
                over_nats = (
                    await Client(bus, "main").infer("tiny/llama", messages=messages, max_tokens=24, seed=5).text()
                )
                stream = await client.chat.completions.create(**asked, stream=True)
                text = "".join([event.choices[0].delta.content or "" async for event in stream])
                whole = await client.chat.completions.create(**asked)
                assert text == over_nats == whole.choices[0].message.content and text
                stop = text[len(text) // 2 :][:2]
                stopped = await client.chat.completions.create(**asked, stop=[stop])
                assert stopped.choices[0].finish_reason == "stop"
                assert stopped.choices[0].message.content == text[: text.index(stop)]
                with pytest.raises(openai.BadRequestError, match="context") as too_long:
                    await client.chat.completions.create(
                        model="tiny/llama", messages=[{"role": "user", "content": "the sea " * 2000}]
                    )
                assert too_long.value.code == "context_length_exceeded"
                with pytest.raises(openai.BadRequestError, match="context"):
                    await client.chat.completions.create(
                        model="tiny/llama", messages=[{"role": "user", "content": "the sea " * 2000}], stream=True
                    )
                found = await cell_status(bus, "main")
                assert found is not None
                assert not any(
                    one["active"] for worker in found["workers"].values() for one in worker["instances"].values()
                )
        finally:
            await bus.close()


def test_shapes_are_json_lines() -> None:
    """Events are put together from bytes: whatever the text, each is one line of JSON."""
    from bus.gateway.shapes import ChatShape, Choice, CompletionShape
    from bus.replies import Chunk, TokenCounts

    for shape in (ChatShape("r", 'm"\n', with_usage=True), CompletionShape("r", 'm"\n')):
        for event in (
            shape.opening(Choice(1)),
            shape.piece(Choice(2), Chunk("r", 0, (1,), 'a"\n\u2028\x00')),
            shape.ending(Choice(3), "stop"),
            shape.usage(TokenCounts(1, 2)),
        ):
            if event:
                assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
                assert json.loads(event[6:])["model"] == 'm"\n'
