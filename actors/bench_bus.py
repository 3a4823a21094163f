"""`longshore bench bus`: from publishing a request to its first chunk, through all that stands between.

Real processes: nats-server, one control, one node (stub engines, or real ones with a small model), and this one as the
client. Requests leave at a steady rate whatever comes back, so waiting shows. What is measured: the client's publish,
intake, the fact in the ledger, the control's step, the effect, the driver's fetch of the prompt, the page in TOKENS and
its acknowledgement, the chunk on the reply subject.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from actors.children import Child
from actors.stub_node import MODEL
from actors.up import CellProcesses, UpOptions, cell_status
from bus.client import Client
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.replies import Chunk, decode_reply
from bus.server import EmbeddedServer
from bus.subjects import Subjects, escape_model

CELL = "bench"
WARM_REQUESTS = 50


@asynccontextmanager
async def stub_cell(folder: Path, *, fsync: bool, step_seconds: float = 0.0) -> AsyncIterator[JetStreamBus]:
    """A server, a control and a stub node, each a process; the bus of this process."""
    server = EmbeddedServer(folder / "nats", fsync_always=fsync)
    await server.start_async()
    children = [Child("control", ["control", "--nats", server.url, "--cell", CELL], folder / "control.log")]
    node = _StubChild("node", server.url, folder / "node.log", step_seconds)
    bus = await JetStreamBus.connect(server.url, CELL, name="longshore-bench", create=True)
    try:
        for child in (*children, node):
            await child.start()
        for _ in range(300):
            status = await cell_status(bus, CELL)
            if status is not None and status["workers"] and MODEL in status["models"]:
                break
            await asyncio.sleep(0.1)
        else:
            raise UserError(f"the bench's cell did not come up; the end of its log:\n{children[0].last_words()}")
        yield bus
    finally:
        await bus.close()
        for child in (node, *children):
            await child.stop()
        await asyncio.to_thread(server.stop)


class _StubChild(Child):
    """`python -m actors.stub_node` instead of a command of the program."""

    def __init__(self, name: str, url: str, log: Path, step_seconds: float) -> None:
        arguments = ["--nats", url, "--cell", CELL, "--step-seconds", str(step_seconds)]
        super().__init__(name, arguments, log, module="actors.stub_node")


async def measure(
    bus: JetStreamBus, model: str, *, rate: float, seconds: float, max_tokens: int, prompt: str
) -> dict[str, Any]:
    """Requests at `rate` per second for `seconds`; times in milliseconds from publish to first and to last chunk."""
    subjects = Subjects(CELL)
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(f"{inbox}.*")
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    failed: list[str] = []
    total = max(1, int(rate * seconds))
    done = asyncio.Event()

    async def receive() -> None:
        while True:
            delivery = await subscription.next()
            now = time.perf_counter()
            if not delivery.payload:
                continue
            reply = decode_reply(delivery.payload)
            number = delivery.subject.rsplit(".", 1)[1]
            if isinstance(reply, Chunk):
                first.setdefault(number, now)
                if reply.end:
                    last[number] = now
            elif getattr(reply, "status", "") != "accepted":
                failed.append(msgspec.json.encode(reply).decode())
            if len(last) + len(failed) >= total:
                done.set()

    receiving = asyncio.ensure_future(receive())
    body = msgspec.json.encode({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0})
    subject = subjects.infer(model)
    began = time.perf_counter()
    for number in range(total):
        due = began + number / rate
        delay = due - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        sent[str(number)] = time.perf_counter()
        await bus.publish(subject, body, reply=f"{inbox}.{number}")
    try:
        await asyncio.wait_for(done.wait(), 60)
    finally:
        receiving.cancel()
        await subscription.close()
    if failed:
        raise UserError(f"{len(failed)} of {total} requests of the bench failed, the first one with {failed[0]}")
    to_first = sorted((first[n] - sent[n]) * 1000 for n in first)
    to_last = sorted((last[n] - sent[n]) * 1000 for n in last)
    return {
        "requests": total,
        "finished": len(last),
        "first_chunk_ms": _spread(to_first),
        "last_chunk_ms": _spread(to_last),
    }


def _spread(values: list[float]) -> dict[str, float]:
    def at(share: float) -> float:
        return round(values[min(len(values) - 1, int(share * len(values)))], 3)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": round(values[-1], 3)}


async def primitives(bus: JetStreamBus, *, rate: float, rounds: int = 200) -> dict[str, float]:
    """What the parts cost on this machine at this pace, in milliseconds (medians), with nothing of ours in between.

    `request_reply`: a core request that this process answers itself. `append`: an awaited append to the ledger's
    stream. `chain`: what a request is made of, without any work on the way: one request and reply (infer, chunk) and
    three appends that somebody waits for (fact, effect, page).
    """
    subscription = await bus.subscribe("bench.echo")

    async def echo() -> None:
        while True:
            delivery = await subscription.next()
            await bus.publish(delivery.reply, b"x")

    echoing = asyncio.ensure_future(echo())
    asked, appended = [], []
    try:
        for _ in range(rounds):
            began = time.perf_counter()
            await bus.request("bench.echo", b"x")
            asked.append(time.perf_counter() - began)
            await asyncio.sleep(1 / rate)
            began = time.perf_counter()
            await bus.tokens.append(bus.subjects.tokens("bench", 1), b"x" * 300)
            appended.append(time.perf_counter() - began)
            await asyncio.sleep(1 / rate)
    finally:
        echoing.cancel()
        await subscription.close()
    request_reply, append = statistics.median(asked) * 1000, statistics.median(appended) * 1000
    return {
        "request_reply": round(request_reply, 3),
        "append": round(append, 3),
        "chain": round(request_reply + 3 * append, 3),
    }


async def bench_stub(*, fsync: bool, rate: float, seconds: float, max_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as folder:
        async with stub_cell(Path(folder), fsync=fsync) as bus:
            warm = WARM_REQUESTS / rate
            await measure(bus, MODEL, rate=rate, seconds=warm, max_tokens=max_tokens, prompt="warm")
            before = await primitives(bus, rate=rate)
            found = await measure(bus, MODEL, rate=rate, seconds=seconds, max_tokens=max_tokens, prompt="A crane moves")
            after = await primitives(bus, rate=rate)
            found["primitives_ms"] = {name: round((before[name] + after[name]) / 2, 3) for name in before}
            found["p50_over_chain"] = round(found["first_chunk_ms"]["p50"] / found["primitives_ms"]["chain"], 2)
            return found


async def bench_real(*, fsync: bool, seconds: float, max_tokens: int, parameters: int) -> dict[str, Any]:
    """The same with the real engine: a small model, one worker, at a rate that it can serve."""
    from loaders import pack_checkpoint
    from models.sample import make_sample

    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as name:
        data = Path(name)
        await asyncio.to_thread(make_sample, data / "sample", arch="llama", parameters=parameters, seed=7)
        (data / "models").mkdir()
        await asyncio.to_thread(pack_checkpoint, data / "sample", data / "models" / escape_model("llama"))
        options = UpOptions(data=data, cell=CELL, nodes=1, workers=1, fsync_always=fsync, memory="4GB", slots=16)
        async with CellProcesses(options) as cell:
            bus = await JetStreamBus.connect(cell.url, CELL, name="longshore-bench", create=True)
            try:
                await cell.ready(bus)
                answer = Client(bus, CELL).infer("llama", prompt="The harbour", max_tokens=4)
                await answer.text()
                found = await measure(
                    bus, "llama", rate=4, seconds=seconds, max_tokens=max_tokens, prompt="The harbour was quiet until"
                )
            finally:
                await bus.close()
        return found | {"parameters": parameters, "rate": 4}


async def probe_fsync(rounds: int = 200) -> float:
    """Median milliseconds of one write and fsync of 512 bytes, for comparison."""
    import os

    with tempfile.NamedTemporaryFile(prefix="longshore-fsync-") as file:
        spent = []
        for _ in range(rounds):
            began = time.perf_counter()
            file.write(b"x" * 512)
            file.flush()
            os.fsync(file.fileno())
            spent.append(time.perf_counter() - began)
    return round(statistics.median(spent) * 1000, 3)
