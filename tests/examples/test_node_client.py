"""The example in Node against a real cell: streams, resumes after its connection was dropped, cancels, submits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from bus_worlds import Proxy
from live_cell import CELL, LiveCell, live_cell

from actors.stub_node import MODEL
from bus.messages import request_id

SOURCE = Path(__file__).parents[2] / "examples" / "node"
OUT_OF_REACH = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "E403", "E503")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its packages, in a folder of its own."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed here")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < 20:
        pytest.skip(f"the example needs node 20, this is {version.strip()}")
    folder = tmp_path_factory.mktemp("example") / "node"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(
        [npm, "ci", "--prefer-offline"], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    if installed.returncode and any(word in installed.stderr for word in OUT_OF_REACH):
        pytest.skip(f"the npm registry is out of reach: {installed.stderr.strip().splitlines()[0]}")
    assert installed.returncode == 0, installed.stderr
    return folder


class Script:
    """One run of the example."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return found

    async def rest(self) -> tuple[list[dict[str, Any]], str]:
        out, error = await self.process.communicate()
        return [json.loads(line) for line in out.splitlines()], error.decode()


@contextlib.asynccontextmanager
async def script(example: Path, url: str, *arguments: str) -> AsyncIterator[Script]:
    process = await asyncio.create_subprocess_exec(
        "node",
        "example.js",
        *arguments,
        "--json",
        cwd=example,
        env=os.environ | {"LONGSHORE_NATS": url, "LONGSHORE_CELL": CELL},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            yield Script(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def check_whole(chunks: list[dict[str, Any]], length: int, start: int = 0) -> None:
    at = start
    for chunk in chunks:
        assert chunk["position"] == at
        at += len(chunk["tokens"])
    assert at == length
    assert [bool(chunk.get("end")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_the_example_in_node(example: Path, tmp_path: Path) -> None:
    """One cell for all of it, and what can go on at once does."""
    async with live_cell(tmp_path, step_seconds=0.01) as cell:
        await asyncio.gather(
            streams_and_attaches(example, cell),
            survives_a_dropped_connection(example, cell),
            cancels(example, cell),
            submits(example, cell),
            fails_in_one_sentence(example, cell),
        )
        await survives_a_restarted_control(example, cell)


async def streams_and_attaches(example: Path, cell: LiveCell) -> None:
    answers = []
    for _ in range(2):
        async with script(
            example, cell.server.url, "ask", MODEL, "hello", "--key", "order-7", "--max-tokens", "20"
        ) as run:
            chunks, error = await run.rest()
        assert error == ""
        check_whole(chunks, 20)
        assert chunks[-1]["end"] == "length" and chunks[-1]["usage"]["completion_tokens"] == 20
        answers.append("".join(chunk.get("text", "") for chunk in chunks))
    request = request_id("example", "order-7")
    assert answers[0] == answers[1] == (await cell.client.result(request, wait=10)).text
    async with script(example, cell.server.url, "resume", request, "--from", "12") as run:
        chunks, _ = await run.rest()
    check_whole(chunks, 20, 12)


async def survives_a_dropped_connection(example: Path, cell: LiveCell) -> None:
    proxy = Proxy(cell.server.port)
    url = await proxy.start()
    try:
        async with script(example, url, "ask", MODEL, "drop me", "--key", "dropped", "--max-tokens", "200") as run:
            chunks = [await run.line() for _ in range(20)]
            proxy.refusing = True
            proxy.drop()
            await asyncio.sleep(0.5)  # the answer goes on meanwhile, and nobody hears it
            proxy.refusing = False
            rest, error = await run.rest()
        assert error == ""
        check_whole(chunks + rest, 200)
        assert len(rest[0]["tokens"]) > 1 or len(rest) < 180, "what was missed comes at once"
    finally:
        await proxy.stop()


async def survives_a_restarted_control(example: Path, cell: LiveCell) -> None:
    async with script(
        example, cell.server.url, "ask", MODEL, "restart", "--key", "restarted", "--max-tokens", "150"
    ) as run:
        chunks = [await run.line() for _ in range(50)]
        await cell.controls[0].stop()
        await cell.controls[0].start()
        rest, error = await run.rest()
    assert error == ""
    check_whole(chunks + rest, 150)


async def cancels(example: Path, cell: LiveCell) -> None:
    arguments = ("ask", MODEL, "cancel me", "--key", "cancelled", "--max-tokens", "2000", "--cancel-after", "5")
    async with script(example, cell.server.url, *arguments) as run:
        chunks, error = await run.rest()
    assert error == "" and chunks[-1]["end"] == "cancelled"
    check_whole(chunks, chunks[-1]["position"] + len(chunks[-1]["tokens"]))
    assert (await cell.client.result(request_id("example", "cancelled"), wait=10)).end == "cancelled"


async def submits(example: Path, cell: LiveCell) -> None:
    async with script(example, cell.server.url, "later", MODEL, "later", "--key", "s-1", "--max-tokens", "7") as run:
        (result,), error = await run.rest()
    assert error == "" and (result["status"], result["positions"], result["end"]) == ("ended", 7, "length")
    assert result["request"] == request_id("example", "s-1")


async def fails_in_one_sentence(example: Path, cell: LiveCell) -> None:
    for arguments, sentence in (
        (("ask", "no/such model", "x"), "no model 'no/such model' in this cell"),
        (("ask", MODEL, ""), "prompt must not be empty"),
        (("resume", "0" * 32), "is known here"),
    ):
        async with script(example, cell.server.url, *arguments) as run:
            chunks, error = await run.rest()
        assert chunks == [] and sentence in error and error.count("\n") == 1
        assert run.process.returncode == 1


def test_the_lock_file_names_packages_and_no_host() -> None:
    """Where packages come from is the affair of whoever installs them."""
    lock = (SOURCE / "package-lock.json").read_text()
    packages = json.loads(lock)["packages"]
    assert not re.findall(r"https?://|\"resolved\"", lock)
    assert all(one.get("integrity", "").startswith("sha512-") for name, one in packages.items() if name)
    assert "registry=" not in (SOURCE / ".npmrc").read_text()
