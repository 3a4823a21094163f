"""docs/subjects.md is the contract: its tables name what the code has, and its examples run against a cell."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live_cell import CELL, LiveCell, live_cell

from actors.stub_node import MODEL
from bus import api, embeddings
from bus.client import Client, RequestFields
from bus.contract import NoResponders
from bus.embeddings import EmbeddingsAnswer
from bus.messages import decode_fact, decode_fact_body, decode_said, decode_said_body, request_id
from bus.messages.envelope import FactEnvelope, SaidEnvelope
from bus.pages import Page, PageSequence, decode_page
from bus.replies import CODES, Chunk, ErrorBody, Result, Status, TokenCounts, WholeAnswers, decode_reply
from bus.subjects import Subjects, escape_model

DOC = (Path(__file__).parents[2] / "docs" / "subjects.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
SHELL = [block for block in BLOCKS if re.search(r"^(nats|printf|split) ", block, re.MULTILINE)]
LINES = [line for block in BLOCKS if block not in SHELL for line in block.splitlines() if line.startswith("{")]

REPLIES = (Chunk, Status, Result, WholeAnswers, EmbeddingsAnswer, ErrorBody, TokenCounts)
RECORDS = (FactEnvelope, SaidEnvelope, Page, PageSequence)


def wire_names(kind: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def table(heading: str) -> list[str]:
    """The names in the first column of the table whose head begins so."""
    rows = DOC[DOC.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_every_field_of_a_request_stands_in_its_table() -> None:
    infer, embed = (part for part in re.split(r"^### ", DOC, flags=re.M) if part.startswith(("Fields of", "Body of")))
    for part, fields in ((infer, api._INFER), (embed, embeddings._EMBED)):
        rows = part[part.index("| field | type, range | default |") :].split("\n\n")[0].splitlines()[2:]
        named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
        assert sorted(named) == sorted(fields)


def test_the_python_library_takes_every_field() -> None:
    named = set(inspect.get_annotations(RequestFields)) | {"prompt", "key"}
    elsewhere = {"from": "start", "stream": "always", "prompt_parts": "by itself"}
    assert named == set(api._INFER) - set(elsewhere)


def test_every_field_of_a_reply_and_of_a_record_is_described() -> None:
    assert set(wire_names(Chunk)) - {"vectors"} == set(table("field of a chunk"))
    described = set(re.findall(r"`(?:\{)?\"?(\w+)\"?", DOC)) | set(re.findall(r"\"(\w+)\"", DOC))
    for kind in (*REPLIES, *RECORDS):
        assert set(wire_names(kind)) <= described, f"{kind.__name__}: {set(wire_names(kind)) - described}"
    assert set(table("envelope of a fact")) == set(wire_names(FactEnvelope))
    assert set(table("envelope of what was said")) == set(wire_names(SaidEnvelope))


def test_every_code_is_described() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", DOC, re.MULTILINE)
    assert {name: int(number) for name, number in rows} == CODES


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_an_example_is_what_it_is_shown_as(line: str) -> None:
    """Every line decodes as one thing that travels, and has no field that this thing has not."""
    payload, body = line.encode(), json.loads(line)
    if "page" in body or "seal" in body:
        page = decode_page(payload)
        assert isinstance(page, Page) and page.sequences
        known = [wire_names(Page), *(wire_names(PageSequence) for _ in page.sequences)]
        found = [body, *body["sequences"]]
    elif "sender" in body:
        decode_fact_body(decode_fact(payload).body)
        known, found = [wire_names(FactEnvelope)], [body]
    elif "fact" in body:
        decode_said_body(decode_said(payload).body)
        known, found = [wire_names(SaidEnvelope)], [body]
    elif "embeddings" in body:
        known, found = [wire_names(EmbeddingsAnswer)], [body]
    else:
        known, found = [wire_names(type(decode_reply(payload)))], [body]
    for names, one in zip(known, found, strict=True):
        assert set(one) <= set(names)


def test_names_in_subjects_are_made_as_described() -> None:
    assert f"`meta/Llama-3.1` is `{escape_model('meta/Llama-3.1')}`" in DOC


# ---- against a cell -------------------------------------------------------------------------------------------


RECORDER = """#!{python} -SE
import json, os, sys
arguments = sys.argv[1:]
told = sys.stdin.buffer.read().decode() if len(arguments) == 2 else ""
with open(os.environ["RECORDED"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), arguments, told]) + "\\n")
"""


def recorded(folder: Path) -> list[tuple[str, list[str], str]]:
    """What the shell examples would have the `nats` and `longshore` tools do, as a real shell expands them."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("nats", "longshore"):
        (tools / name).write_text(RECORDER.format(python=sys.executable))
        (tools / name).chmod(0o755 | stat.S_IXUSR)
    (folder / "prompt.txt").write_text("Once upon a time " * 3)
    output = folder / "recorded"
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "RECORDED": str(output)}
    for block in SHELL:
        script = ["bash", "-euc", block]
        done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (block, done.stderr)
        if block.startswith("printf"):
            assert done.stdout.strip() == request_id("shop", "order-7")
    return [tuple(json.loads(line)) for line in output.read_text().splitlines()]


async def test_the_examples_run_against_a_cell(tmp_path: Path) -> None:
    commands = await asyncio.to_thread(recorded, tmp_path)
    asked = [(arguments[1], arguments[2:], told) for tool, arguments, told in commands if arguments[0] == "req"]
    assert len(asked) >= 9
    async with live_cell(tmp_path / "cell") as cell:
        replied = [kind for one in asked for kind in await run(cell, *one)]
        assert set(await cell.status()) <= admin_names("status")
        await run_python(cell)
        described = json.loads((await cell.bus.request("$SRV.INFO.longshore", b"")).payload)
    assert {"accepted", "chunk", "end", "empty", "ended", "acknowledged", "unknown_request", "models"} <= set(replied)
    for endpoint in described["endpoints"]:
        assert any(subject.startswith(f"longshore.<cell>.{endpoint['name']}.") for subject in table("subject"))
    for tool, arguments, _ in commands:
        if arguments[0] == "sub":
            assert Subjects("main").parse(arguments[1].replace("*", "x").replace(">", "y.z.k")) is not None
        elif arguments[0] != "req":
            assert (tool, arguments[0]) in {("nats", "stream"), ("longshore", "tail")}


async def run_python(cell: LiveCell) -> None:
    """The examples of docs/clients.md, as they stand."""
    text = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, Any] = {"print": lambda *_, **__: None}
    for block in blocks:
        source = block.replace('"nats://127.0.0.1:4222"', f'"{cell.server.url}", cell="{CELL}"')
        source = source.replace('"llama-a"', f'"{MODEL}"')
        code = compile(source, "clients.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        async with asyncio.timeout(20):
            await eval(code, names)


async def run(cell: LiveCell, subject: str, arguments: list[str], told: str) -> list[str]:
    """Send one request of the documentation as the `nats` tool would; the kinds of what comes back."""
    body = told.encode() if told else arguments[0].encode()
    for model in ("llama-a", "bert-a"):
        subject = subject.replace(f".{model}", f".{MODEL}")
    subject = subject.replace("longshore.main.", f"longshore.{CELL}.")
    verb = subject.split(".")[2]
    if verb == "result":  # the request that the line before has submitted
        with_time = Client(cell.bus, CELL)
        with_time._submitted[subject.split(".")[3]] = None
        await with_time.result(subject.split(".")[3], wait=10)
    inbox = await cell.bus.open_inbox(limit=1000, limit_bytes=1 << 20)
    await cell.bus.publish(subject, body, reply=inbox.subject)
    kinds: list[str] = []
    while not kinds or ("--wait-for-empty" in arguments and kinds[-1] != "empty"):
        async with asyncio.timeout(10):
            delivery = await inbox.next()
        kinds += kinds_of(verb, delivery.payload)
        if not delivery.payload and not kinds[:-1]:
            raise NoResponders(subject)
    await inbox.close()
    return kinds


def admin_names(verb: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", DOC[DOC.index(f"| `admin.{verb}` |") :].splitlines()[0]))


def kinds_of(verb: str, payload: bytes) -> list[str]:
    if not payload:
        return ["empty"]
    body: Any = json.loads(payload)
    if verb == "admin":
        assert {model["model"] for model in body} == {MODEL}
        assert all(set(model) <= admin_names("models") for model in body)
        return ["models"]
    if "stream" in body and "seq" in body:
        return ["acknowledged"]
    if "embeddings" in body:
        assert set(body) <= set(wire_names(EmbeddingsAnswer))
        return ["embeddings"]
    reply = decode_reply(payload)
    assert set(body) <= set(wire_names(type(reply)))
    if isinstance(reply, Chunk):
        return ["chunk", "end"] if reply.end else ["chunk"]
    if isinstance(reply, Status) and reply.error is not None:
        assert reply.error.code in CODES
        return [reply.error.code]
    return [getattr(reply, "status", "choices")]
