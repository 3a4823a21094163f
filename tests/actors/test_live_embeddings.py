"""Embeddings and prompts in parts on real processes: a worker is killed in between, and nobody notices."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from actors.replaying import replay_recording
from actors.stub_node import MODEL
from bus.answer import RequestFailed
from bus.client import Client
from bus.embed_cli import embed
from bus.embeddings import numbers
from bus.errors import UserError
from bus.messages.requests import request_id
from bus.recording import write_recording
from bus.subjects import Subjects
from tests.support.live_cell import CELL, LiveCell, live_cell

pytestmark = pytest.mark.slow
SUBJECTS = Subjects(CELL)
INPUTS = [f"{number} of the ships in the harbour " + "x" * (230 - number % 20) for number in range(150)]
PROMPT = "The harbour was quiet. " * 300


async def ask(cell: LiveCell, subject: str, body: dict[str, Any]) -> Any:
    return json.loads((await cell.bus.request(subject, json.dumps(body).encode(), timeout=10)).payload)


async def test_a_worker_dies_and_vectors_and_answers_go_on_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with live_cell(tmp_path, nodes=2, step_seconds=0.01) as cell:
        in_parts = Client(cell.bus, CELL, name="parts", parts_from_bytes=1000)
        expected = await cell.client.embed(MODEL, INPUTS)
        answered = await cell.client.infer(MODEL, PROMPT, max_tokens=60, seed=1).text()
        answer = in_parts.infer(MODEL, PROMPT, max_tokens=60, seed=1, key="large")
        vectors: list[bytes] = []
        texts: list[str] = []
        moved = asyncio.Event()

        async def watch() -> None:
            async for chunk in embedding:
                assert chunk.position == len(vectors)
                vectors.extend(chunk.vectors)
                moved.set()

        async def read() -> None:
            async for chunk in answer:
                texts.append(chunk.text)
                moved.set()

        embedding = cell.client.embedding(MODEL, INPUTS, key="vectors")
        tasks = [asyncio.ensure_future(watch()), asyncio.ensure_future(read())]
        while len(vectors) < 10 or len(texts) < 3:
            moved.clear()
            await moved.wait()
        status = await cell.status()
        busy = [
            worker
            for worker, known in status["workers"].items()
            if any(one["active"] for one in known["instances"].values())
        ]
        assert len(vectors) < len(INPUTS) and busy
        for worker in busy:
            node = next(node for node in cell.nodes if node.name == f"node-{worker.split('/')[1]}")
            node.signal(signal.SIGKILL)
        if len(busy) == len(cell.nodes):
            await cell.add_node("n9")
        await asyncio.gather(*tasks)
        assert (tuple(vectors), embedding.end) == (expected.vectors, "stop")
        assert embedding.usage is not None
        assert embedding.usage.prompt_tokens == expected.prompt_tokens == sum(map(len, INPUTS))
        assert "".join(texts) == answered
        await the_command(cell, capsys)
        for check in (one_answer_in_every_form, read_again, submitted, cancelled, told_what_is_wrong, parts_are_told):
            await check(cell)
        recording = tmp_path / "all.lsrec"
        await write_recording(recording, cell.bus, cell=CELL)
    verdict, _ = replay_recording(recording, verify=True, at=0)
    assert verdict is not None and not verdict.difference, "replay needs no parts"


async def the_command(cell: LiveCell, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    await embed(MODEL, ["one", "two"], as_json=True, nats=cell.server.url, cell=CELL)
    found = json.loads(capsys.readouterr().out)
    assert found["embeddings"] == (await cell.client.embed(MODEL, ["one", "two"])).numbers
    await embed(MODEL, ["one"], nats=cell.server.url, cell=CELL)
    assert capsys.readouterr().out.endswith("]  4 numbers  one\n")
    with pytest.raises(UserError, match="no model 'nobody'"):
        await embed("nobody", ["one"], nats=cell.server.url, cell=CELL)


async def one_answer_in_every_form(cell: LiveCell) -> None:
    subject = SUBJECTS.embed(MODEL)
    found = await ask(cell, subject, {"input": ["one", "two"]})
    vectors = (await cell.client.embed(MODEL, ["one", "two"])).numbers
    assert found["embeddings"] == vectors and found["usage"] == {"prompt_tokens": 6}
    found = await ask(cell, subject, {"input": "two", "encoding": "base64"})
    assert [numbers(base64.b64decode(one)) for one in found["embeddings"]] == vectors[1:]
    found = await ask(cell, subject, {"tokens": [[ord(c) for c in "two"]]})
    assert found["embeddings"] == vectors[1:]


async def read_again(cell: LiveCell) -> None:
    """The request is over: whoever asks again, and however, is shown the same vectors."""
    client = Client(cell.bus, CELL, name="test", encoding="msgpack")
    request = request_id("test", "vectors")
    result = await client.result(request)
    assert (result.status, result.end, len(result.vectors)) == ("ended", "stop", len(INPUTS))
    resumed = [vector async for chunk in client.resume(request, 100) for vector in chunk.vectors]
    assert tuple(resumed) == result.vectors[100:]
    again = await client.embed(MODEL, INPUTS, key="vectors")
    assert again.vectors == result.vectors
    with pytest.raises(RequestFailed) as failed:
        await client.embed(MODEL, ["other"], key="vectors")
    assert failed.value.code == "key_reused"
    single = await ask(cell, SUBJECTS.embed(MODEL), {"input": INPUTS, "client": "test", "key": "vectors", "from": 149})
    assert (single["position"], single["embeddings"]) == (149, [numbers(result.vectors[149])])


async def submitted(cell: LiveCell) -> None:
    body = {"input": ["left for later"], "client": "test", "key": "later"}
    assert (await ask(cell, SUBJECTS.submit(MODEL), body))["stream"] == SUBJECTS.intake_stream
    request = request_id("test", "later")
    await cell.until(lambda found: found["waiting"] == 0)
    async with asyncio.timeout(10):
        while True:
            try:
                result = await cell.client.result(request, wait=5)
                break
            except RequestFailed as failure:
                assert failure.code == "unknown_request"
                await asyncio.sleep(0.02)
    assert result.vectors == (await cell.client.embed(MODEL, ["left for later"])).vectors


async def cancelled(cell: LiveCell) -> None:
    with pytest.raises(RequestFailed) as failed:
        await cell.client.embed(MODEL, INPUTS, deadline_ms=1)
    assert failed.value.code == "deadline"
    answer = cell.client.embedding(MODEL, [text * 3 for text in INPUTS])
    seen = 0
    async for chunk in answer:
        if not seen:
            await answer.cancel()
        seen += len(chunk.vectors)
    assert answer.end == "cancelled" and 0 < seen < len(INPUTS)


async def told_what_is_wrong(cell: LiveCell) -> None:
    for body, code, sentence in [
        ({"input": []}, "bad_request", "list of 1 to 256 texts"),
        ({"tokens": [[1001]]}, "bad_request", "token id 1001 in tokens[0] is outside of stub's vocabulary of 1000"),
        ({"tokens": [[1] * 8193]}, "bad_request", "tokens[0] has 8193 tokens, the context of stub is 8192"),
    ]:
        found = await ask(cell, SUBJECTS.embed(MODEL), body)
        assert found["error"]["code"] == code and sentence in found["error"]["message"]
    found = await ask(cell, SUBJECTS.embed(MODEL), {"input": ["fits", "x" * 8193]})
    assert (found["end"], found["error"]["code"], found["embeddings"]) == ("failed", "invalid_request", [])
    assert "Input 1 has 8193 tokens and the context holds 8192" in found["error"]["message"]


async def parts_are_told(cell: LiveCell) -> None:
    data = b"first half, second half"
    good = {"upload": "mine", "count": 2, "digest": hashlib.sha256(data).hexdigest()}

    async def infer(**changed: Any) -> dict[str, Any]:
        body = {"prompt_parts": good | changed, "max_tokens": 4, "seed": 2, "stream": False}
        found: dict[str, Any] = await ask(cell, SUBJECTS.infer(MODEL), body)
        return found

    found = await infer()
    assert found["error"]["code"] == "unknown_parts" and "part 0 of 2 of upload mine" in found["error"]["message"]
    for index, part in enumerate((data[:11], data[11:])):
        stored = await ask_raw(cell, SUBJECTS.part("mine", index), part)
        assert stored["stream"] == SUBJECTS.parts_stream
    again = await ask_raw(cell, SUBJECTS.part("mine", 0), b"else")
    assert "per subject" in again["error"]["description"]
    assert "part 2 of 3" in (await infer(count=3))["error"]["message"]
    found = await infer(digest="0" * 64)
    assert found["error"]["code"] == "invalid_request" and "have the SHA-256" in found["error"]["message"]
    found = await infer(form="tokens", digest=good["digest"])
    assert "not the JSON of tokens" in found["error"]["message"]
    found = await infer()
    plain = await ask(
        cell, SUBJECTS.infer(MODEL), {"prompt": data.decode(), "max_tokens": 4, "seed": 2, "stream": False}
    )
    assert found["tokens"] == plain["tokens"] and found["usage"] == plain["usage"]


async def ask_raw(cell: LiveCell, subject: str, payload: bytes) -> Any:
    return json.loads((await cell.bus.request(subject, payload)).payload)
