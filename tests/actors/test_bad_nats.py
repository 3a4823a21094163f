"""Bad input over NATS: any bytes on any subject of a client, in both encodings, to a real control on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.stub_node import MODEL
from bus.client import Client
from bus.connection import Connection
from bus.contract import BusError
from bus.jetstream_api import stream_info
from bus.replies import Chunk, Result, Status, decode_reply
from bus.subjects import Subjects
from tests.support.live_cell import CELL, LiveCell, live_cell

SUBJECTS = Subjects(CELL)
EXAMPLES = int(os.environ.get("LONGSHORE_FUZZ", "400"))

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
any_value = st.recursive(
    scalars | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
OTHER_FIELDS = (
    *("temperature", "top_p", "top_k", "seed", "stop", "client", "key", "deadline_ms", "from", "model", "input"),
    *("n", "logprobs", "min_tokens", "stop_tokens", "repetition_penalty", "presence_penalty", "logit_bias", "priority"),
)
near_bodies = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=5) | any_value,
        "tokens": st.lists(st.integers(0, 999), max_size=3) | any_value,
        "messages": st.lists(st.fixed_dictionaries({"role": any_value, "content": any_value}), max_size=2) | any_value,
        "max_tokens": st.integers(1, 3) | any_value,
        "stream": st.booleans() | any_value,
        **dict.fromkeys(OTHER_FIELDS, any_value),
    },
)


def both_encodings(value: Any) -> st.SearchStrategy[bytes]:
    return st.sampled_from([msgspec.json.encode(value), msgspec.msgpack.encode(value)])


payloads = st.binary(max_size=60) | (any_value | near_bodies).flatmap(both_encodings)
token_bytes = st.lists(
    st.sampled_from(
        [
            b"a",
            b"X",
            b"0",
            b"=",
            b"=4",
            b"-",
            b"_",
            b"%",
            b"$",
            b"/",
            b":",
            b"\xc3\xa9",
            b"\xff",
            b"\x01",
            b"\xe2\x80\xa8",
        ]
    ),
    min_size=1,
    max_size=12,
).map(b"".join)
VERBS = ["infer", "submit", "resume", "result", "cancel", "admin", "embed"]
subjects = st.one_of(
    st.just(SUBJECTS.infer(MODEL).encode()),
    st.just(SUBJECTS.infer(MODEL).encode()),
    st.sampled_from(["resume", "result", "cancel"]).map(lambda verb: f"{SUBJECTS.prefix}.{verb}.{'0' * 32}".encode()),
    st.sampled_from(["models", "status", "model.add", "nothing"]).map(lambda verb: SUBJECTS.admin(verb).encode()),
    st.tuples(st.sampled_from(VERBS), st.lists(token_bytes, min_size=1, max_size=3)).map(
        lambda parts: b".".join([SUBJECTS.prefix.encode(), parts[0].encode(), *parts[1]])
    ),
    st.sampled_from([b"$SRV.PING.longshore", b"$SRV.INFO.longshore", b"$SRV.STATS.longshore"]),
)
replies = (
    st.just(b"") | st.just(b"") | st.just(b"") | token_bytes | token_bytes.map(lambda token: b"longshore." + token)
)
headers = st.one_of(
    st.just(b"NATS/1.0\r\n\r\n"),
    st.sampled_from([b"application/msgpack", b"application/json", b"text/plain"]).map(
        lambda kind: b"NATS/1.0\r\nContent-Type: " + kind + b"\r\n\r\n"
    ),
    st.binary(max_size=30).map(lambda raw: b"NATS/1.0\r\n" + raw + b"\r\n\r\n"),
)


async def test_any_bytes_on_any_subject_are_answered_or_ignored(tmp_path: Path) -> None:
    async with live_cell(tmp_path) as cell:
        loop = asyncio.get_running_loop()
        # A raw connection of its own: the server may end it for what it is sent.
        connection = await Connection.open(cell.server.url, name="fuzz")

        async def send(subject: bytes, payload: bytes, header: bytes, reply: bytes) -> None:
            inbox = connection.new_inbox()
            answers: asyncio.Queue[bytes] = asyncio.Queue()
            sid = await connection.hook(inbox, lambda *parts: answers.put_nowait(parts[2]))
            try:
                sizes = b"%d %d" % (len(header), len(header) + len(payload))
                connection.write(b"HPUB %s %s %s\r\n" % (subject, reply or inbox.encode(), sizes))
                connection.write(header + payload + b"\r\n")
                if not reply and readable(subject):
                    async with asyncio.timeout(5):
                        check_reply(subject.decode(), await answers.get(), b"msgpack" in header)
            finally:
                connection.unhook(sid)

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(subjects, payloads, headers, replies)
        def try_message(subject: bytes, payload: bytes, header: bytes, reply: bytes) -> None:
            asyncio.run_coroutine_threadsafe(send(subject, payload, header, reply), loop).result()

        await asyncio.to_thread(try_message)
        with contextlib.suppress(BusError):
            await connection.close()
        await still_serves(cell)
        stream = (await stream_info(cell.bus.raw, SUBJECTS.intake_stream))["state"]
        assert stream["messages"] == 0, "submissions that can never be requests leave the stream"


def readable(subject: bytes) -> bool:
    """Nobody is owed an answer on a subject that is no text."""
    try:
        return subject.decode().isprintable()
    except UnicodeDecodeError:
        return False


def check_reply(subject: str, payload: bytes, msgpack: bool) -> None:
    """What a cell says there: an answer, a refusal, or the server's own word that nobody listens (empty)."""
    if not payload or subject.startswith("$SRV"):
        return
    if ".submit." in subject:
        assert b"seq" in payload or b"error" in payload
        return
    kinds = [msgspec.msgpack.decode, msgspec.json.decode] if msgpack else [msgspec.json.decode]
    for decode in kinds:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            value = decode(payload)
            break
    else:
        raise AssertionError(f"{subject} answered {payload!r}")
    if ".admin." in subject or ".embed." in subject:
        assert isinstance(value, (dict, list))
        return
    reply = decode_reply(payload, "msgpack" if decode is msgspec.msgpack.decode else "json")
    assert isinstance(reply, Chunk | Result | Status)
    if isinstance(reply, Status) and reply.status == "refused":
        assert reply.error is not None and reply.error.message.count("\n") == 0


async def still_serves(cell: LiveCell) -> None:
    assert await Client(cell.bus, CELL).infer(MODEL, prompt="x", max_tokens=2).text()
    for child in (*cell.controls, *cell.nodes):
        assert child.process is not None and child.process.returncode is None
        log = child.log.read_text()
        assert "Traceback" not in log and "was not understood" not in log, log[-3000:]


@pytest.mark.slow
async def test_a_client_that_never_reads_holds_up_nobody(tmp_path: Path) -> None:
    """The cell writes on and never waits for it; others are served as before."""
    async with live_cell(tmp_path, step_seconds=0.001) as cell:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", cell.server.port))
        body = b'{"prompt":"x","max_tokens":2000}'
        infer = SUBJECTS.infer(MODEL).encode()
        with deaf:
            deaf.sendall(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\nSUB deaf.> 1\r\n')
            for number in range(16):
                deaf.sendall(b"PUB %s deaf.%d %d\r\n%s\r\n" % (infer, number, len(body), body))
            await cell.until(lambda found: found["requests"].get("running", 0) >= 16)
            texts = await asyncio.gather(
                *(Client(cell.bus, CELL).infer(MODEL, prompt="x", max_tokens=50).text() for _ in range(8))
            )
            assert all(text.count("tok") == 50 for text in texts)
            found = await cell.until(lambda found: found["requests"].get("finished", 0) >= 24, seconds=50)
        assert found["waiting"] == 0
        await still_serves(cell)
