"""`longshore bench start`: a model that lies in DRAM, a worker that holds nothing, and a request for it.

Real processes: nats-server, one control, one node with its store and one worker. Each round ends the worker and waits
until the node has forked another one, so the worker has never seen the model. Then one request is measured, and the
same request again on the instance that now runs: what the first took longer is what the start cost. On a busy machine
that difference of two prefills says little; so the ledger's own times are shown beside it: how long the request waited
for its sequence to be started, which on the running instance is the step of the cell alone.

"Usable, every page touched" is shown in two ways: the kernel's list of the worker's mappings (/proc/PID/smaps) says how
many bytes of the packed file the worker has mapped when the first token is there, and by which pages; and its count
of page faults says how many of them the first request took beside the second.

`from_pretrained` runs in processes of its own that have imported everything: the first call and the second, each with
one byte of every 4 KiB page of every parameter read, from the same packed directory and a warm page cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from actors.up import CellProcesses, UpOptions
from bus.contract import Record
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import ModelAttached, decode_fact, decode_fact_body
from bus.replies import Chunk, decode_reply
from bus.subjects import Subjects, escape_model

CELL = "bench"
MODEL = "large"
WORKER = "gpu/s1/0"
PROMPT = "The"
AGAIN = 5
"""How often the request is repeated on the running instance; the median counts."""
SETTLE_SECONDS = 1.5
WORDS_SECONDS = 300.0

PRETRAINED = """
import json, sys, time
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
directory, found = sys.argv[1], []
for _ in range(2):
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
    returned = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
    found.append([(time.perf_counter() - began) * 1000, (returned - began) * 1000])
    del model
print(json.dumps(found))
"""


async def bench_start(
    parameters: int, rounds: int, threads: int, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """One size. Makes the model under `folder`, which takes its bytes twice for a while."""
    packed = await make_model(folder, parameters, say)
    weight_bytes = (packed / "model.safetensors").stat().st_size
    found: dict[str, Any] = {"parameters": parameters, "bytes": weight_bytes, "rounds": rounds, "threads": threads}
    size = str(weight_bytes + weight_bytes // 4 + (1 << 30))
    of_node = ("--threads", str(threads)) if threads else ()
    options = UpOptions(data=folder, cell=CELL, nodes=1, workers=1, memory=size, dram=size, node_arguments=of_node)
    async with CellProcesses(options) as cell:
        bus = await JetStreamBus.connect(cell.url, CELL, name="longshore-bench", create=True)
        try:
            await cell.ready(bus)
            say("bringing it to DRAM")
            found["from_ssd_ms"] = round(await first_chunk(bus), 1)
            starts = []
            for number in range(rounds):
                say(f"start {number + 1} of {rounds}")
                await _fresh_worker(cell, bus)
                starts.append(await _start(cell, bus, packed / "model.safetensors"))
        finally:
            await bus.close()
    found["start"] = {name: _median([one[name] for one in starts]) for name in starts[0]}
    found["starts"] = starts
    say("from_pretrained")
    calls = [await _pretrained(packed) for _ in range(rounds)]
    for which, index in (("first", 0), ("second", 1)):
        found[f"pretrained_{which}_ms"] = _median([one[index][0] for one in calls])
        found[f"pretrained_{which}_call_ms"] = _median([one[index][1] for one in calls])
    return found


async def make_model(folder: Path, parameters: int, say: Callable[[str], None]) -> Path:
    """The directory of the packed model, among the models of a cell whose data is in `folder`."""
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    packed = models / escape_model(MODEL)
    say(f"making a model of {parameters:,} parameters")
    sample = folder / "sample"
    arguments = ["--arch", "llama", "--dtype", "bfloat16", "--size", str(parameters), "--untied"]
    await _longshore("model", "sample", str(sample), *arguments)
    await _longshore("pack", str(sample), str(packed))
    for path in sorted(sample.iterdir()):
        path.unlink()
    return packed


async def first_chunk(bus: JetStreamBus) -> float:
    """Milliseconds from publishing a request to its first chunk."""
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox)
    body = msgspec.json.encode({"prompt": PROMPT, "max_tokens": 1, "temperature": 0})
    try:
        began = time.perf_counter()
        await bus.publish(Subjects(CELL).infer(MODEL), body, reply=inbox)
        async with asyncio.timeout(WORDS_SECONDS):
            while True:
                delivery = await subscription.next()
                reply = decode_reply(delivery.payload) if delivery.payload else None
                if isinstance(reply, Chunk):
                    return (time.perf_counter() - began) * 1000
                if reply is not None and getattr(reply, "status", "") != "accepted":
                    raise UserError(f"the request of the bench failed: {delivery.payload.decode()[:500]}")
    finally:
        await subscription.close()


async def _fresh_worker(cell: CellProcesses, bus: JetStreamBus) -> None:
    """End the worker; return once another one is up, and has had a moment for what it does while it is idle."""
    before = (await cell.ready(bus))["workers"][WORKER]
    os.kill(before["process"], signal.SIGKILL)
    async with asyncio.timeout(60):
        while True:
            found = (await cell.ready(bus))["workers"][WORKER]
            if found["process"] != before["process"]:
                break
            await asyncio.sleep(0.05)
    assert not found["instances"]
    await asyncio.sleep(SETTLE_SECONDS)


async def _start(cell: CellProcesses, bus: JetStreamBus, weights: Path) -> dict[str, float]:
    process = (await cell.ready(bus))["workers"][WORKER]["process"]
    last = (await bus.ledger.usage()).last_sequence
    faults, wall = _faults(process), time.time_ns()
    whole = await first_chunk(bus)
    cold_faults = _faults(process) - faults
    mapped, huge = _mapped(process, weights)
    faults = _faults(process)
    stages = await _stages(bus, last, wall)
    again, waits = [], []
    for _ in range(AGAIN):
        last, wall = (await bus.ledger.usage()).last_sequence, time.time_ns()
        again.append(await first_chunk(bus))
        waits.append((await _stages(bus, last, wall))["waited_ms"])
    warm_faults = (_faults(process) - faults) / AGAIN
    attached = statistics.median(again)
    return {
        "first_chunk_ms": whole,
        "attached_first_chunk_ms": attached,
        "start_ms": whole - attached,
        **stages,
        "attached_waited_ms": statistics.median(waits),
        "mapped_share": mapped / weights.stat().st_size,
        "huge_share": huge / max(1, mapped),
        "faults": cold_faults,
        "attached_faults": warm_faults,
    }


async def _stages(bus: JetStreamBus, after: int, wall: int) -> dict[str, float]:
    """When what stood in the ledger, by its own times, in milliseconds since the request was published."""
    seen: dict[str, Record] = {}
    reader = await bus.ledger.read(start=after + 1)
    try:
        while "sequence.start" not in seen:
            for record in await reader.batch():
                seen.setdefault(".".join(record.subject.rsplit(".", 2)[1:]), record)
    finally:
        await reader.close()
    at = {kind: (record.timestamp - wall) / 1e6 for kind, record in seen.items()}
    waited = at["sequence.start"] - at["request.accepted"]
    if "model.attached" not in seen:
        return {"waited_ms": waited}
    message = decode_fact_body(decode_fact(seen["model.attached"].payload).body)
    assert isinstance(message, ModelAttached)
    return {
        "accepted_at_ms": at["request.accepted"],
        "attach_effect_at_ms": at["model.attach"],
        "usable_at_ms": at["model.attached"],
        "sequence_effect_at_ms": at["sequence.start"],
        "waited_ms": waited,
        "attach_ms": message.duration_ns / 1e6,
    }


def _faults(process: int) -> int:
    """Page faults of a process that needed no disk."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[7])


def _mapped(process: int, file: Path) -> tuple[int, int]:
    """Bytes of a file that a process has mapped into its memory, and how many of them by huge pages."""
    mapped = huge = 0
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.endswith(str(file))
        elif inside and words[0] == "Rss:":
            mapped += int(words[1]) * 1024
        elif inside and words[0] == "FilePmdMapped:":
            huge += int(words[1]) * 1024
    return mapped, huge


async def _pretrained(directory: Path) -> list[list[float]]:
    """Milliseconds of the first call and of the second: until all is touched, and until it returned."""
    out = await _run(sys.executable, "-c", PRETRAINED, str(directory))
    found: list[list[float]] = json.loads(out.splitlines()[-1])
    return found


async def _longshore(*arguments: str) -> None:
    await _run(sys.executable, "-m", "bus.main", *arguments)


async def _run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    if process.returncode:
        words = err.decode(errors="replace").strip().splitlines()
        raise UserError(f"`{' '.join(command[:4])} ...` ended with code {process.returncode}: {' '.join(words[-3:])}")
    return out.decode()


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)
