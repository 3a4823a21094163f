"""Real processes, real kills: whatever dies, accepted requests finish, and no position is lost, changed or repeated.

Engines are stubs whose tokens follow from the prompt, so the undisturbed answer is known. Everything else is real:
nats-server, controls, drivers, signals.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from actors.replay import verify
from actors.stub_node import MODEL
from bus.answer import RequestFailed
from bus.client import Client, RequestFields
from bus.contract import Record
from bus.log_reading import read_to_end
from bus.messages import (
    DriverLost,
    FactEnvelope,
    SealedSequence,
    SequencesSealed,
    StoreStarted,
    decode_fact,
    decode_fact_body,
    decode_said,
    encode,
    extend_chain,
    kind_of,
)
from bus.pages import Page, Seal, decode_page
from bus.replies import Chunk, WholeAnswers, decode_reply
from bus.subjects import Subjects
from tests.support.live_cell import CELL, LiveCell, live_cell

pytestmark = pytest.mark.slow
SUBJECTS = Subjects(CELL)


class Reading:
    """One answer as its reader sees it through the client library."""

    def __init__(self, client: Client, prompt: str, max_tokens: int) -> None:
        self.tokens: list[int] = []
        self.end = ""
        self.slowest = 0.0
        self.moved = asyncio.Event()
        self.answer = client.infer(MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, seed=1)
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time()
        async for chunk in self.answer:
            self.slowest, before = max(self.slowest, loop.time() - before), loop.time()
            assert chunk.position == len(self.tokens), "every position once and in order"
            self.tokens += chunk.tokens
            self.moved.set()
        self.end = self.answer.end

    async def reach(self, position: int) -> None:
        while len(self.tokens) < position:
            self.moved.clear()
            await self.moved.wait()


async def undisturbed(client: Client, prompts: list[str], max_tokens: int) -> dict[str, list[int]]:
    readings = {prompt: Reading(client, prompt, max_tokens) for prompt in prompts}
    await asyncio.gather(*(reading.task for reading in readings.values()))
    return {prompt: reading.tokens for prompt, reading in readings.items()}


async def all_facts(cell: LiveCell) -> list[Record]:
    """Every fact in the ledger now."""
    return [record for record in await read_to_end(cell.bus.ledger) if ".fact." in record.subject]


async def test_the_publishing_control_is_killed(tmp_path: Path) -> None:
    """Nobody waits for more than a second longer: neither who reads, nor who asks at that moment or a moment later."""
    async with live_cell(tmp_path, controls=2, step_seconds=0.01) as cell:
        client = cell.client
        expected = await undisturbed(client, ["warm 1", "warm 2"], 8)
        readings = [Reading(client, f"prompt {i}", 60) for i in range(12)]
        for reading in readings:
            await reading.reach(5)
        publishers = await publishers_of(cell)
        victim = publishers.most_common(1)[0][0]
        usual = max(reading.slowest for reading in readings)
        killing = asyncio.ensure_future(kill_control(cell, victim))
        later = []
        for number in range(40):
            later.append(Reading(client, f"later {number}", 5))
            await asyncio.sleep(0.01)
        await killing
        await asyncio.gather(*(reading.task for reading in (*readings, *later)))
        assert all(reading.end == "length" for reading in (*readings, *later))
        assert max(reading.slowest for reading in (*readings, *later)) < usual + 1.0
        assert [len(reading.tokens) for reading in readings] == [60] * 12
        again = await undisturbed(client, list(expected), 8)
        assert again == expected


async def publishers_of(cell: LiveCell) -> Counter[str]:
    """How many derived messages each control published."""
    end = (await cell.bus.ledger.usage()).last_sequence
    reader = await cell.bus.ledger.read([SUBJECTS.said_prefix + ">"], start=1)
    counts: Counter[str] = Counter()
    try:
        pending = end
        while pending:
            for record in await reader.batch():
                counts[record.publisher] += 1
                pending = record.pending
    finally:
        await reader.close()
    return counts


async def kill_control(cell: LiveCell, boot: str) -> None:
    """SIGKILL the control whose log names this boot id."""
    child = next(c for c in cell.controls if boot in c.log.read_text())
    child.signal(signal.SIGKILL)
    await child.wait()


async def test_the_only_control_is_killed_and_another_started(tmp_path: Path) -> None:
    async with live_cell(tmp_path, step_seconds=0.01) as cell:
        readings = [Reading(cell.client, f"prompt {i}", 80) for i in range(8)]
        for reading in readings:
            await reading.reach(3)
        cell.controls[0].signal(signal.SIGKILL)
        await cell.controls[0].wait()
        await cell.add_control()
        await asyncio.gather(*(reading.task for reading in readings))
        assert [len(reading.tokens) for reading in readings] == [80] * 8


async def test_the_nats_server_is_killed_and_comes_back(tmp_path: Path) -> None:
    async with live_cell(tmp_path, step_seconds=0.01) as cell:
        expected = await undisturbed(cell.client, ["prompt 0"], 50)
        readings = [Reading(cell.client, f"prompt {i}", 50) for i in range(6)]
        for reading in readings:
            await reading.reach(5)
        cell.server.kill()
        await cell.server.start_async()
        await asyncio.gather(*(reading.task for reading in readings))
        assert [len(reading.tokens) for reading in readings] == [50] * 6
        assert readings[0].tokens == expected["prompt 0"]


async def test_a_worker_a_control_and_the_nats_server_are_killed_at_once(tmp_path: Path) -> None:
    async with live_cell(tmp_path, controls=2, nodes=2, step_seconds=0.01) as cell:
        prompts = [f"prompt {i}" for i in range(8)]
        expected = await undisturbed(cell.client, prompts, 80)
        readings = {prompt: Reading(cell.client, prompt, 80) for prompt in prompts}
        for reading in readings.values():
            await reading.reach(10)
        publisher = (await publishers_of(cell)).most_common(1)[0][0]
        busy = await cell.until(lambda found: any(active(found, name) for name in found["workers"]))
        worker = max(busy["workers"], key=lambda name: active(busy, name))
        assert active(busy, worker)
        node = next(one for one in cell.nodes if one.name == f"node-{worker.split('/')[1]}")
        node.signal(signal.SIGKILL)
        next(one for one in cell.controls if publisher in one.log.read_text()).signal(signal.SIGKILL)
        cell.server.kill()
        await cell.server.start_async()
        later = Reading(cell.client, "asked while all of it comes back", 20)
        await asyncio.gather(*(reading.task for reading in (*readings.values(), later)))
        assert {prompt: reading.tokens for prompt, reading in readings.items()} == expected
        assert len(later.tokens) == 20
        sealed = [record for record in await all_facts(cell) if record.subject.endswith("sequences.sealed")]
        assert sealed, "the killed worker held answers"
        assert verify(CELL, await read_to_end(cell.bus.ledger)).difference is None


async def test_a_node_is_killed_in_mid_answer(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=2, step_seconds=0.01) as cell:
        prompts = [f"prompt {i}" for i in range(8)]
        expected = await undisturbed(cell.client, prompts, 60)
        several: RequestFields = {"max_tokens": 60, "seed": 1, "n": 6, "logprobs": 2, "presence_penalty": 0.5}
        whole = await cell.client.infer(MODEL, "several", **several).whole()
        readings = {prompt: Reading(cell.client, prompt, 60) for prompt in prompts}
        answers = cell.client.infer(MODEL, "several", key="several", **several)
        single = await cell.bus.subscribe(inbox := cell.bus.new_inbox())
        once = asyncio.ensure_future(answers.whole())
        for reading in readings.values():
            await reading.reach(10)
        await cell.bus.publish(SUBJECTS.resume(answers.request_id), b'{"stream":false}', reply=inbox)
        busy = await cell.until(lambda found: any(active(found, name) for name in found["workers"]))
        name = max(busy["workers"], key=lambda worker: active(busy, worker))
        node = next(n for n in cell.nodes if n.name == f"node-{name.split('/')[1]}")
        node.signal(signal.SIGKILL)
        await asyncio.gather(*(reading.task for reading in readings.values()))
        assert {prompt: reading.tokens for prompt, reading in readings.items()} == expected
        # Each of several answers has gone on for itself, and its logprobs with it; the one reply has all of them.
        found = await once
        assert shown(found.choices) == shown(whole.choices) and len(whole.choices[5].logprobs) == 60
        async with asyncio.timeout(20):
            replied = decode_reply((await single.next()).payload)
        assert isinstance(replied, WholeAnswers) and shown(replied.choices) == shown(whole.choices)


def shown(choices: Sequence[Chunk]) -> list[object]:
    return [(one.choice, one.tokens, one.text, one.logprobs, one.end, one.usage) for one in choices]


def active(status: dict, worker: str) -> int:  # type: ignore[type-arg]
    return sum(one["active"] for one in status["workers"][worker]["instances"].values())


async def test_a_zombie_worker_shows_nothing_after_the_seal(tmp_path: Path) -> None:
    """SIGSTOP, recovery elsewhere, SIGCONT: its next page is refused, and positions behind the seal come from the
    other worker alone.
    """
    async with live_cell(tmp_path, nodes=2, step_seconds=0.02) as cell:
        inbox = cell.bus.new_inbox()
        subscription = await cell.bus.subscribe(inbox)
        body = msgspec.json.encode({"prompt": "zombie", "max_tokens": 150, "temperature": 0, "client": "t", "key": "z"})
        await cell.bus.publish(SUBJECTS.infer(MODEL), body, reply=inbox)
        shown: Counter[int] = Counter()
        tokens: dict[int, int] = {}
        stopped = False
        node = None
        async with asyncio.timeout(40):
            while True:
                delivery = await subscription.next()
                reply = decode_reply(delivery.payload) if delivery.payload else None
                if not isinstance(reply, Chunk):
                    continue
                for offset, token in enumerate(reply.tokens):
                    position = reply.position + offset
                    shown[position] += 1
                    assert tokens.setdefault(position, token) == token, "a position never changes"
                if len(tokens) >= 20 and not stopped:
                    stopped = True
                    status = await cell.status()
                    name = next(name for name in status["workers"] if active(status, name))
                    node = next(n for n in cell.nodes if n.name == f"node-{name.split('/')[1]}")
                    node.signal(signal.SIGSTOP)
                if reply.end:
                    break
        assert node is not None and reply.end == "length"
        sealed = await the_seal(cell)
        worker, boundary = sealed.worker, sealed.sequences[0].first + len(sealed.sequences[0].tokens)
        before = (await cell.bus.tokens.usage()).last_sequence
        epoch_before = (await cell.status())["workers"].get(worker, {}).get("epoch", 0)
        node.signal(signal.SIGCONT)
        # The zombie notices, begins a new epoch, and is back as a worker.
        await cell.until(
            lambda found: found["workers"].get(worker, {}).get("epoch", 0) > max(sealed.epoch, epoch_before)
        )
        while True:
            try:
                async with asyncio.timeout(0.3):
                    delivery = await subscription.next()
            except TimeoutError:
                break
            reply = decode_reply(delivery.payload) if delivery.payload else None
            if isinstance(reply, Chunk):
                assert reply.position + len(reply.tokens) <= boundary, "shown by a zombie behind its seal"
        assert sorted(tokens) == list(range(150))
        assert 20 <= boundary < 150
        assert all(shown[position] == 1 for position in range(boundary, 150))
        pages = await pages_of(cell, worker, sealed.epoch)
        assert isinstance(pages[-1], Seal)
        assert sum(isinstance(page, Seal) for page in pages) == 1
        assert before == (await cell.bus.tokens.usage()).last_sequence


async def the_seal(cell: LiveCell) -> SequencesSealed:
    for record in await all_facts(cell):
        if record.subject.endswith(".sequences.sealed"):
            message = decode_fact_body(decode_fact(record.payload).body)
            assert isinstance(message, SequencesSealed) and isinstance(message.sequences[0], SealedSequence)
            return message
    raise AssertionError("no epoch was sealed")


async def pages_of(cell: LiveCell, worker: str, epoch: int) -> list[Page | Seal]:
    reader = await cell.bus.tokens.read([SUBJECTS.tokens(worker, epoch)])
    pages: list[Page | Seal] = []
    try:
        while True:
            for record in await reader.batch():
                pages.append(decode_page(record.payload))
                if record.pending == 0:
                    return pages
    finally:
        await reader.close()


async def test_a_hole_in_a_drivers_facts_is_reported(tmp_path: Path) -> None:
    """A driver that keeps its heartbeats and skips a fact is lost, and the reason names the hole."""
    async with live_cell(tmp_path, nodes=1) as cell:
        driver, boot = "store/holed", "b" * 16
        started = StoreStarted("holed", 10**9)
        epoch = (await state(cell, driver, started, boot=boot)).sequence
        lie = DriverLost("store/holed", epoch, "a body is all that is needed: this fact is never taken")
        await state(cell, driver, lie, boot=boot, epoch=epoch, count=2)
        beat = msgspec.json.encode({"driver": driver, "epoch": epoch, "boot": boot})
        async with asyncio.timeout(20):
            while True:
                await cell.bus.publish(SUBJECTS.heartbeat(driver), beat)
                facts = [r for r in await all_facts(cell) if r.subject == SUBJECTS.fact(driver, "driver.lost")]
                stated = [decode_fact(record.payload) for record in facts]
                lost = [decode_fact_body(one.body) for one in stated if one.sender == "watch"]
                if lost:
                    break
                await asyncio.sleep(0.1)
        assert isinstance(lost[0], DriverLost)
        assert lost[0].epoch == epoch and "fact 1 of the epoch is missing" in lost[0].reason


async def state(cell: LiveCell, driver: str, message, *, boot: str, epoch: int = 0, count: int = 0):  # type: ignore[no-untyped-def]
    body = encode(message)
    chain = extend_chain(boot, body) if count else ""
    envelope = FactEnvelope(driver, msgspec.Raw(body), epoch, boot, count, chain=chain)
    return await cell.bus.ledger.append(SUBJECTS.fact(driver, kind_of(message)), encode(envelope))


async def test_a_difference_stops_the_control_until_an_operator_accepts_it(tmp_path: Path) -> None:
    async with live_cell(tmp_path) as cell:
        await undisturbed(cell.client, ["before"], 4)
        last = await cell.bus.ledger.last(SUBJECTS.said("requests", "placement", "request.place"))
        assert last is not None
        changed = last.payload.replace(b'"index":0', b'"index":77')
        await cell.bus.ledger.append(last.subject, changed)
        async with asyncio.timeout(10):
            assert await cell.controls[0].wait() == 3
        words = cell.controls[0].last_words()
        fact = decode_said(last.payload).fact
        assert "request.place" in words and f"fact {fact}, index 77" in words and "Traceback" not in words
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bus.main", "difference", "accept", str(fact), "77", "--nats", cell.server.url,
            "--cell", CELL, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await done.communicate()
        assert done.returncode == 0 and b"stands" in out
        await cell.add_control()
        assert len((await undisturbed(cell.client, ["after"], 4))["after"]) == 4


async def test_intake_refuses_before_the_ledger_is_full(tmp_path: Path) -> None:
    """At 80 % of the limit new requests are refused; what runs goes on to its end."""
    async with live_cell(tmp_path, step_seconds=0.02, ledger_limit_bytes=300_000) as cell:
        running = Reading(cell.client, "running", 200)
        await running.reach(1)
        refused = None
        for number in range(400):
            try:
                await cell.client.infer(MODEL, prompt=f"p{number}" * 200, max_tokens=1).text()
            except RequestFailed as failure:
                refused = failure
                break
        assert refused is not None and refused.code == "ledger_full" and refused.retry_ms > 0
        usage = await cell.bus.ledger.usage()
        assert 0.7 * usage.limit_bytes < usage.stored_bytes < 0.95 * usage.limit_bytes
        await running.task
        assert len(running.tokens) == 200
