"""`longshore bench serve`: streaming clients of a cell, over NATS and over HTTP, beside the engine called directly.

Everything is real: nats-server, one control, one node with one worker (one thread), one gateway, each a process, and a
process that holds the same packed model and calls the engine itself. The three ways take turns within one run, each
served round standing between two direct ones. A rate counts all tokens of a round from the first request to the last
token, so prefill is in it on all sides.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actors.children import Child
from actors.up import CellProcesses, UpOptions
from bus.client import Client
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.lifeline import ending_with_parent
from bus.subjects import escape_model

CELL, MODEL = "bench", "llama"
CONTEXT = 512
REACH = 0.93
STEP_MS = 25.0
"""The step at all sequences has to take at least so long, or the model is too small for the comparison."""
PROMPT = "The harbour was quiet until the ships came in at dawn, and number {} of them had lost a mast, so that"
_TICKS = os.sysconf("SC_CLK_TCK")


async def measure(
    *, parameters: int, clients: int, max_tokens: int, rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All figures of one run. Raises `UserError` where something did not come up or an answer was not whole."""
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as name:
        data = Path(name)
        tell("making the model")
        packed = await asyncio.to_thread(_pack, data, parameters)
        options = UpOptions(
            data=data,
            cell=CELL,
            nodes=1,
            workers=1,
            memory="6GB",
            dram="4GB",
            slots=clients,
            node_arguments=("--threads", "1", "--context", str(CONTEXT)),
        )
        async with CellProcesses(options) as cell, _engine(packed) as direct:
            bus = await JetStreamBus.connect(cell.url, CELL, name="longshore-bench", create=True)
            try:
                await cell.ready(bus)
                async with _gateway(cell.url, data) as (port, gateway):
                    prompts = [PROMPT.format(number) for number in range(clients)]
                    ways = _Ways(bus, port, prompts, max_tokens, direct)
                    return await _rounds(ways, await _processes(cell, bus, gateway.pid), rounds, tell)
            finally:
                await bus.close()


def _pack(data: Path, parameters: int) -> Path:
    from loaders import pack_checkpoint
    from models.sample import make_sample

    make_sample(data / "sample", arch="llama", parameters=parameters, seed=7, dtype="float32", context=CONTEXT)
    (data / "models").mkdir()
    packed = data / "models" / escape_model(MODEL)
    pack_checkpoint(data / "sample", packed)
    return packed


# ---- the three ways -------------------------------------------------------------------------------------------


class _Ways:
    """One round each: the tokens and the seconds that it took."""

    def __init__(self, bus: JetStreamBus, port: int, prompts: list[str], max_tokens: int, direct: _Engine) -> None:
        self._client = Client(bus, CELL)
        self._port = port
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._direct = direct
        self.step_ms: list[float] = []

    async def engine(self) -> tuple[int, float]:
        found = await self._direct.run(self._prompts, self._max_tokens)
        self.step_ms.append(found["step_ms"])
        return int(found["tokens"]), found["seconds"]

    async def nats(self) -> tuple[int, float]:
        return await self._together(self._over_nats)

    async def http(self) -> tuple[int, float]:
        return await self._together(self._over_http)

    async def _together(self, one: Callable[[str], Awaitable[int]]) -> tuple[int, float]:
        began = time.perf_counter()
        counts = await asyncio.gather(*(one(prompt) for prompt in self._prompts))
        seconds = time.perf_counter() - began
        if any(count != self._max_tokens for count in counts):
            raise UserError(f"an answer of the bench was not whole: tokens {counts} instead of {self._max_tokens} each")
        return sum(counts), seconds

    def _fields(self) -> dict[str, Any]:
        return {"max_tokens": self._max_tokens, "min_tokens": self._max_tokens, "temperature": 0}

    async def _over_nats(self, prompt: str) -> int:
        count = 0
        async for chunk in self._client.infer(MODEL, prompt=prompt, **self._fields()):
            count += len(chunk.tokens)
        return count

    async def _over_http(self, prompt: str) -> int:
        """The tokens as the usage at the end of the stream counts them."""
        body = {"model": MODEL, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
        payload = json.dumps(body | self._fields()).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(payload), payload)
        )
        last = b""
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                last = line
        writer.close()
        return int((json.loads(last[6:]).get("usage") or {}).get("completion_tokens", 0)) if last else 0


class _Engine:
    """The process of `actors.bench_serve_engine`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, prompts: list[str], max_tokens: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode() + b"\n")
        found: dict[str, float] = json.loads(await self.line())
        return found

    async def line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise UserError("the process that calls the engine directly has ended; its error stands above")
        return line


@asynccontextmanager
async def _engine(packed: Path) -> AsyncIterator[_Engine]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "actors.bench_serve_engine", str(packed), str(CONTEXT)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=ending_with_parent(),
    )
    try:
        engine = _Engine(process)
        await engine.line()
        yield engine
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def _gateway(url: str, data: Path) -> AsyncIterator[tuple[int, Child]]:
    log = data / "logs" / "gateway.log"
    child = Child("gateway", ["gateway", "--nats", url, "--cell", CELL, "--port", "0"], log)
    await child.start()
    try:
        for _ in range(300):
            for line in log.read_text().splitlines():
                if line.startswith("listening on "):
                    yield int(line.rpartition(":")[2]), child
                    return
            await asyncio.sleep(0.1)
        raise UserError(f"the gateway of the bench did not come up; the end of its log:\n{child.last_words()}")
    finally:
        await child.stop()


# ---- rounds and CPU time --------------------------------------------------------------------------------------


async def _processes(cell: CellProcesses, bus: JetStreamBus, gateway: int) -> dict[str, int]:
    status = await cell.ready(bus)
    assert cell.server is not None
    worker = next(iter(status["workers"].values()))["process"]
    return {
        "control": cell.controls[0].pid,
        "worker": worker,
        "gateway": gateway,
        "nats-server": cell.server.pid,
        "client": os.getpid(),
    }


async def _rounds(ways: _Ways, processes: dict[str, int], rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    served: dict[str, Callable[[], Awaitable[tuple[int, float]]]] = {"nats": ways.nats, "http": ways.http}
    for name, way in {"direct": ways.engine, **served}.items():
        tell(f"warming up: {name}")
        await way()
    ways.step_ms.clear()
    rates: dict[str, list[float]] = {"direct": [_rate(await ways.engine())], "nats": [], "http": []}
    ratios: dict[str, list[float]] = {"nats": [], "http": []}
    spent: dict[str, dict[str, list[float]]] = {"nats": {}, "http": {}}
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for name, way in served.items():
            before = _cpu(processes)
            tokens, seconds = await way()
            for process, used in _cpu(processes).items():
                spent[name].setdefault(process, []).append((used - before[process]) / tokens * 1e6)
            rates["direct"].append(_rate(await ways.engine()))
            rates[name].append(tokens / seconds)
            ratios[name].append(tokens / seconds / statistics.mean(rates["direct"][-2:]))
    step_ms = statistics.median(ways.step_ms)
    return {
        "step_ms": round(step_ms, 1),
        "step_is_long_enough": step_ms >= STEP_MS,
        "tokens_per_second": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "of_direct": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "of_direct_rounds": {name: [round(one, 3) for one in found] for name, found in ratios.items()},
        "cpu_us_per_token": {
            name: {process: round(statistics.median(one)) for process, one in found.items()}
            for name, found in spent.items()
        },
        "reach": {"of_direct": REACH, "step_ms": STEP_MS},
    }


def _rate(found: tuple[int, float]) -> float:
    return found[0] / found[1]


def _cpu(processes: dict[str, int]) -> dict[str, float]:
    """CPU seconds of each process so far. The thread of the worker that computes steps counts for itself."""
    used = {name: _seconds(Path(f"/proc/{process}/stat")) for name, process in processes.items() if name != "worker"}
    threads = [_seconds(task / "stat") for task in Path(f"/proc/{processes['worker']}/task").iterdir()]
    used["worker's engine"] = max(threads)
    used["worker's shell"] = sum(threads) - max(threads)
    return used


def _seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
