"""Prompts in parts: stored once, found whole or refused in a sentence; in memory and on a real server."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from bus_worlds import World

from bus.answer import RequestFailed
from bus.api import Refusal, parse_infer
from bus.client import Client
from bus.contract import LogFull, WrongLastSequence
from bus.memory import MemoryServer
from bus.messages import ChatMessage, Generation, PromptParts, body_digest
from bus.part_limits import PART_LIMIT_BYTES, PARTS_LIMIT, PARTS_SECONDS, UPLOAD_LIMIT_BYTES
from bus.parts import PartsRefused, Upload, UploadFailed, assemble, fetch, large_form


def cited(data: bytes, **more: Any) -> Generation:
    digest = hashlib.sha256(data).hexdigest()
    return Generation(5, parts=PromptParts(**{"upload": "u", "count": 1, "digest": digest} | more))


async def test_parts_are_stored_once_and_found_whole(world: World) -> None:
    async with world.running():
        client, worker = await world.bus(), await world.bus()
        prompt = "Der Hafen lag still, ⚓ alles schlief. " * 40_000
        upload = Upload.of("prompt", prompt, "shop\0order-7")
        assert len(upload.parts) == -(-len(prompt.encode()) // PART_LIMIT_BYTES) > 2
        await upload.store(client.parts, world.subjects, patience=5.0)
        await upload.store(client.parts, world.subjects, patience=5.0)
        usage = await worker.parts.usage()
        assert usage.messages == len(upload.parts)
        assert usage.max_age_ns == PARTS_SECONDS * 10**9
        data = await fetch(worker.parts, world.subjects, upload.cited)
        found = assemble(Generation(5, seed=3, parts=upload.cited), data)
        assert found == Generation(5, seed=3, prompt=prompt)
        subject = world.subjects.part(upload.cited.upload, 0)
        with pytest.raises(WrongLastSequence):
            await client.parts.append(subject, b"other", expected_last=0)
        with pytest.raises(LogFull, match="per subject"):
            await client.parts.append(subject, b"other")
        await client.publish(subject, b"other")
        assert (await fetch(worker.parts, world.subjects, upload.cited)) == data


async def test_a_part_that_is_not_there_is_named(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        await bus.parts.append(world.subjects.part("u", 0), b"half of", expected_last=0)
        with pytest.raises(PartsRefused, match=r"part 1 of 2 of upload u is not stored \(any more\)"):
            await fetch(bus.parts, world.subjects, PromptParts("u", 2, "0" * 64))


async def test_what_all_parts_hold_is_bounded(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        for index in range(UPLOAD_LIMIT_BYTES // PART_LIMIT_BYTES + 1):
            await bus.parts.append(world.subjects.part("u", index), bytes(PART_LIMIT_BYTES), expected_last=0)
        with pytest.raises(PartsRefused, match="more than 8388608 bytes"):
            await fetch(bus.parts, world.subjects, PromptParts("u", PARTS_LIMIT, "0" * 64))


async def test_a_full_stream_of_parts_is_a_sentence() -> None:
    server = MemoryServer("main", parts_limit_bytes=1000)
    upload = Upload.of("prompt", "x" * 3000, "k", part_bytes=600)
    with pytest.raises(UploadFailed, match="no room for the parts"):
        await upload.store(server.bus("client").parts, server.subjects, patience=1.0)


def test_every_form_is_put_together_as_it_was_cut() -> None:
    messages = [{"role": "user", "content": "Guten Tag \u2693"}]
    for form, value, expected in [
        ("messages", messages, Generation(5, messages=(ChatMessage("user", "Guten Tag \u2693"),))),
        ("tokens", [1, 2, 3] * 50, Generation(5, tokens=(1, 2, 3) * 50)),
        ("prompt", "so", Generation(5, prompt="so")),
    ]:
        upload = Upload.of(form, value, "k", part_bytes=7)
        assert max(map(len, upload.parts)) <= 7
        assert assemble(Generation(5, parts=upload.cited), b"".join(upload.parts)) == expected
    assert len(Upload.of("prompt", "x" * 1000, "k", part_bytes=7).parts) <= PARTS_LIMIT


@pytest.mark.parametrize(
    ("data", "form", "sentence"),
    [
        (b"\xff\xfe", "prompt", "not UTF-8"),
        (b"", "prompt", "are empty"),
        (b"[1, 2", "tokens", "not the JSON of tokens"),
        (b'["1"]', "tokens", "not the JSON of tokens"),
        (b"[]", "tokens", "hold no tokens"),
        (b'[{"role":"","content":"x"}]', "messages", "not the JSON of messages"),
        (b'[{"role":"user"}]', "messages", "not the JSON of messages"),
        (b"[" * 100_000, "messages", "not the JSON of messages"),
        (json.dumps([7] * 1_000_001).encode(), "tokens", "1000001 tokens, at most 1000000"),
    ],
)
def test_parts_that_make_no_prompt_are_refused(data: bytes, form: str, sentence: str) -> None:
    with pytest.raises(PartsRefused, match=sentence):
        assemble(cited(data, form=form), data)


def test_another_content_is_refused() -> None:
    with pytest.raises(PartsRefused, match="the parts of upload u have the SHA-256"):
        assemble(cited(b"said"), b"sent")


def test_the_reference_is_checked_and_its_content_tells_repeats_apart() -> None:
    good = {"upload": "u-1", "count": 2, "digest": "a" * 64}

    def parse(**changed: Any) -> Generation:
        body = {"prompt_parts": good | changed, "key": "k"}
        return parse_infer(json.dumps(body).encode(), None, "m").accepted.generation

    assert parse().parts == PromptParts("u-1", 2, "a" * 64)
    assert body_digest(parse(), "m") == body_digest(parse(upload="elsewhere", count=3), "m")
    assert body_digest(parse(), "m") != body_digest(parse(digest="b" * 64), "m")
    assert body_digest(parse(), "m") != body_digest(parse(form="tokens"), "m")
    for changed in ({"upload": "a.b"}, {"upload": ""}, {"count": 0}, {"count": 65}, {"digest": "A" * 64}, {"x": 1}):
        with pytest.raises(Refusal, match="prompt_parts must be") as caught:
            parse(**changed)
        assert caught.value.name == "bad_request"
    with pytest.raises(Refusal, match="exactly one of"):
        parse_infer(json.dumps({"prompt": "a", "prompt_parts": good}).encode(), None, "m")


async def test_the_client_sends_in_parts_what_is_too_large_and_nothing_else() -> None:
    server = MemoryServer("main")
    client = Client(server.bus("client"))
    for body, form in [
        ({"prompt": "x" * 262_144}, ""),
        ({"prompt": "x" * 262_145}, "prompt"),
        ({"prompt": "\u2693" * 90_000}, "prompt"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, "messages"),
        ({"tokens": [12345] * 60_000}, "tokens"),
        ({"tokens": [1] * 60_000}, ""),
    ]:
        assert large_form(body, 262_144) == form
    with pytest.raises(RequestFailed, match="at most 8388608") as caught:
        client.infer("m", "x" * (UPLOAD_LIMIT_BYTES + 1))
    assert caught.value.code == "too_large"
    with pytest.raises(RequestFailed, match="not valid Unicode"):
        client.infer("m", "\ud800" * 300_000)
    with pytest.raises(RequestFailed):
        await client.infer("m", "x" * 600_000, timeout=0.5).text()  # nobody listens: the parts are stored all the same
    assert (await server.bus("look").parts.usage()).messages == 3


def test_the_ledger_holds_the_reference_alone() -> None:
    upload = Upload.of("prompt", "secret " * 100_000, "k")
    fact = msgspec.json.encode(Generation(5, parts=upload.cited))
    assert b"secret" not in fact and len(fact) < 300
