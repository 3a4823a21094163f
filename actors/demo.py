"""The main job as a story: three models, four workers, a burst of requests, a worker killed in mid-answer, a replay.

Everything is real: models in Hugging Face layout, processes, a NATS server, a SIGKILL. The requests are published the
way an event-driven backend does it, through the client library over NATS; where each start came from and who died is
read from the ledger, as anybody can.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from actors.replay import Verdict, collect_accepted, verify
from actors.up import CellProcesses, UpOptions
from bus.answer import RequestFailed
from bus.client import Client
from bus.contract import Bus, Record
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import (
    DriverLost,
    InstanceReady,
    PlacementDecided,
    RequestEnded,
    RequestPlaced,
    SequencesSealed,
    decode_fact,
    decode_fact_body,
    decode_said,
    decode_said_body,
)
from bus.recording import Recording, write_recording
from bus.sentences import read_event
from bus.subjects import FactSubject, SaidSubject, Subjects, escape_model

CELL = "demo"
SAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama-a", {"arch": "llama", "parameters": 16_000_000, "seed": 7, "shards": 3}),
    ("qwen3-b", {"arch": "qwen3", "parameters": 12_000_000, "seed": 8, "tied": True}),
    ("gpt2-c", {"arch": "gpt2", "parameters": 12_000_000, "seed": 9}),
)
CONTEXT = 512
WORKER_MEMORY = "150MB"
SLOTS = 4
SHOWN_KINDS = ("placement.decided", "instance.ready", "model.evict", "model.detach", "driver.lost", "sequences.sealed")
PROMPTS = (
    "The harbour was quiet until the first ship",
    "Every queue has a head, and whoever stands there",
    "A crane moves what others cannot",
    "The tide does not wait for a schedule",
)


@dataclass(slots=True)
class Asked:
    """One request as its reader saw it. Times in seconds of the demo's clock."""

    number: int
    model: str
    max_tokens: int
    asked: float = 0.0
    request: str = ""
    first: float = 0.0
    last: float = 0.0
    positions: int = 0
    lost: int = 0
    repeated: int = 0
    end: str = ""
    worker: str = ""
    tier: str = ""
    attempts: int = 0
    text: str = ""

    @property
    def ttft_ms(self) -> float:
        return (self.first - self.asked) * 1000 if self.first else 0.0

    @property
    def tokens_per_second(self) -> float:
        spent = self.last - self.first
        return (self.positions - 1) / spent if spent > 0 and self.positions > 1 else 0.0


@dataclass(slots=True)
class Story:
    """What has happened so far; the display reads it."""

    stage: str = "starting"
    asked: list[Asked] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    killed: str = ""
    killed_holding: int = 0
    verdict: Verdict | None = None
    on_change: Callable[[], None] = lambda: None

    def say(self, text: str) -> None:
        self.events.append(text)
        self.on_change()


async def run_demo(data: Path, story: Story, *, recording: Path) -> dict[str, Any]:
    """The whole story; what `--json` prints. Raises `UserError` where a part of it could not be played."""
    began = time.perf_counter()
    options = UpOptions(data=data, cell=CELL, nodes=2, workers=2, memory=WORKER_MEMORY, dram="1GB", slots=SLOTS)
    story.stage = "starting a NATS server, a control and two servers with two workers each; making three models"
    story.on_change()
    making = asyncio.ensure_future(asyncio.to_thread(_make_models, data, story))
    try:
        async with CellProcesses(options) as cell:
            bus = await JetStreamBus.connect(cell.url, CELL, name="longshore-demo", create=True)
            try:
                await making
                await cell.ready(bus)
                story.say(f"ready after {time.perf_counter() - began:.1f} s: 4 workers, NATS at {cell.url}")
                await _play(bus, story)
                story.stage = "replaying the recorded ledger"
                story.on_change()
                await write_recording(recording, bus, cell=CELL, force=True)
            finally:
                await bus.close()
    finally:
        making.cancel()
    recorded = Recording.open(recording)
    records = list(recorded.ledger())
    story.verdict = await asyncio.to_thread(verify, CELL, records, accepted=collect_accepted(records))
    return summary(story, time.perf_counter() - began)


def _make_models(data: Path, story: Story) -> None:
    """Samples in Hugging Face layout, packed into the models directory that the nodes look in."""
    from loaders import pack_checkpoint
    from models.sample import make_sample

    (data / "samples").mkdir(parents=True, exist_ok=True)
    for name, arguments in SAMPLES:
        source = data / "samples" / name
        make_sample(source, context=CONTEXT, **arguments)
        manifest = pack_checkpoint(source, data / "models" / escape_model(name))
        story.say(f"made {name}: {manifest.architecture}, {manifest.parameters / 1e6:.0f} million parameters, packed")


async def _play(bus: JetStreamBus, story: Story) -> None:
    client = Client(bus, CELL, name="demo")
    following = asyncio.ensure_future(_follow_ledger(bus, story))
    try:
        for name, _ in SAMPLES:
            await client.add_model(name)
        await _until(lambda: client.models(), lambda models: len(models) == len(SAMPLES), "the models are known")
        story.stage = "first burst: no model is loaded yet"
        wave = [("llama-a", 192), *[("llama-a", 40)] * 5, *[("qwen3-b", 40)] * 4, *[("gpt2-c", 40)] * 3]
        first = [asyncio.ensure_future(_ask(client, story, model, tokens)) for model, tokens in wave]
        victim = story.asked[0] if story.asked else None
        while victim is None or (victim.positions < 24 and not victim.end):
            await asyncio.sleep(0.02)
            victim = story.asked[0] if story.asked else None
        await _kill_worker_of(client, story, victim)
        await asyncio.gather(*first)
        story.stage = "second burst: what is idle makes room for what is wanted"
        wave = [*[("gpt2-c", 32)] * 9, *[("llama-a", 32)] * 4, *[("qwen3-b", 32)] * 4]
        await asyncio.gather(*(_ask(client, story, model, tokens) for model, tokens in wave))
        await asyncio.sleep(0.3)
    finally:
        following.cancel()
        await client.close()


async def _ask(client: Client, story: Story, model: str, max_tokens: int) -> None:
    asked = Asked(len(story.asked) + 1, model, max_tokens, asked=time.perf_counter())
    story.asked.append(asked)
    prompt = PROMPTS[asked.number % len(PROMPTS)]
    answer = client.infer(model, prompt=prompt, max_tokens=max_tokens, temperature=0.8, seed=asked.number)
    asked.request = answer.request_id
    expected = 0
    try:
        async for chunk in answer:
            asked.last = time.perf_counter()
            asked.first = asked.first or asked.last
            asked.lost += max(0, chunk.position - expected)
            asked.repeated += max(0, expected - chunk.position)
            expected = max(expected, chunk.position + len(chunk.tokens))
            asked.positions = expected
            asked.text += chunk.text
            story.on_change()
        asked.end = answer.end
    except RequestFailed as failure:
        asked.end = failure.code
        story.say(f"request {asked.number} failed: {failure.message}")
    story.on_change()


async def _kill_worker_of(client: Client, story: Story, victim: Asked) -> None:
    """SIGKILL the process that decodes this answer right now."""
    status = await client.status()
    worker = status["workers"].get(victim.worker)
    if worker is None or not worker["process"]:
        raise UserError(f"the demo found no process for worker {victim.worker!r}")
    story.killed = victim.worker
    story.killed_holding = sum(one["active"] for one in worker["instances"].values())
    story.say(
        f"SIGKILL for {victim.worker} (process {worker['process']}) at position {victim.positions} of request "
        f"{victim.number}, with {story.killed_holding} answers under way"
    )
    os.kill(worker["process"], signal.SIGKILL)


async def _follow_ledger(bus: Bus, story: Story) -> None:
    """Read the ledger as `longshore tail` does: who started from where, who died, which attempt goes on."""
    subjects = Subjects(CELL)
    decided: dict[tuple[str, str], int] = {}
    reader = await bus.ledger.read(start=1)
    try:
        while True:
            for record in await reader.batch():
                _note(subjects, story, decided, record)
    finally:
        await reader.close()


def _note(subjects: Subjects, story: Story, decided: dict[tuple[str, str], int], record: Record) -> None:
    subject = subjects.parse(record.subject)
    try:
        if isinstance(subject, SaidSubject):
            message = decode_said_body(decode_said(record.payload).body)
        elif isinstance(subject, FactSubject):
            message = decode_fact_body(decode_fact(record.payload).body)
        else:
            return
    except msgspec.DecodeError:
        return
    if isinstance(message, RequestPlaced):
        for asked in story.asked:
            if asked.request == message.request:
                asked.worker = message.worker
                asked.tier = asked.tier or message.tier
                asked.attempts = message.attempt
    elif isinstance(message, PlacementDecided):
        decided[(message.worker, message.model)] = record.timestamp
    elif isinstance(message, InstanceReady):
        since = decided.pop((message.worker, message.model), record.timestamp)
        milliseconds = (record.timestamp - since) / 1e6
        story.starts.append(
            {"model": message.model, "worker": message.worker, "tier": message.tier, "start_ms": round(milliseconds, 1)}
        )
    if isinstance(message, DriverLost | SequencesSealed | RequestEnded) or subject.kind in SHOWN_KINDS:
        if isinstance(message, RequestEnded) and message.outcome == "finished":
            return
        story.say(read_event(subjects, record).text)


async def _until(ask: Callable[[], Any], reached: Callable[[Any], bool], what: str) -> None:
    for _ in range(300):
        if reached(await ask()):
            return
        await asyncio.sleep(0.1)
    raise UserError(f"the demo waited 30 s in vain until {what}")


def summary(story: Story, seconds: float) -> dict[str, Any]:
    """One object with the figures of the story."""
    ttft = sorted(asked.ttft_ms for asked in story.asked if asked.first)
    tiers = {"running": 0, "dram": 0, "ssd": 0, "remote": 0}
    for asked in story.asked:
        if asked.tier:
            tiers[asked.tier] += 1
    verdict = story.verdict
    return {
        "requests": len(story.asked),
        "finished": sum(asked.end in ("stop", "length") for asked in story.asked),
        "positions": sum(asked.positions for asked in story.asked),
        "positions_lost": sum(asked.lost for asked in story.asked),
        "positions_repeated": sum(asked.repeated for asked in story.asked),
        "starts_by_tier": tiers,
        "ttft_ms": {"p50": round(_quantile(ttft, 0.5), 1), "p99": round(_quantile(ttft, 0.99), 1)},
        "tokens_per_second": round(
            statistics.median([a.tokens_per_second for a in story.asked if a.positions > 1] or [0]), 1
        ),
        "killed_worker": story.killed,
        "answers_on_killed_worker": story.killed_holding,
        "answers_moved": sum(asked.attempts > 1 for asked in story.asked),
        "instance_starts": story.starts,
        "decisions_verified": verdict.verified if verdict is not None else 0,
        "divergences": 0 if verdict is None or verdict.difference is None else 1,
        "difference": verdict.sentence if verdict is not None else "not replayed",
        "seconds": round(seconds, 1),
    }


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
