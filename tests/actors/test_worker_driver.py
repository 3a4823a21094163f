"""A worker, a store and a real cell on the bus in memory: requests become chunks, pages and one answer each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from tiny_control import Listener, TinyControl, card

from actors.driver import DriverShell
from actors.store_driver import StoreDriver
from actors.stub_runtime import StubRuntime
from actors.stub_storage import StubStorage
from actors.worker_driver import WorkerDriver
from actors.worker_sequences import tokens_digest
from bus.contract import Record
from bus.memory import MemoryBus, MemoryServer
from bus.memory_faults import FINE, AppendFate, NoFaults
from bus.messages import (
    AddReader,
    AttachFailed,
    AttachModel,
    CancelRequested,
    CancelTaken,
    Generation,
    ModelAttached,
    ProgressReported,
    ReaderAdded,
    ReaderAttached,
    RequestEnded,
    SequenceFailed,
    SequenceFinished,
    SequenceRefused,
    ServerReady,
    StartSequence,
    WorkerReady,
    WorkerStarted,
)
from bus.pages import Page, Seal, decode_page
from bus.replies import Chunk

WORKER = "gpu/s1/0"


class Faults(NoFaults):
    """Appends to TOKENS lose their acknowledgement, or are held up, as told."""

    def __init__(self) -> None:
        self.lose_tokens = 0
        self.lose_ledger = 0
        self.delay_tokens = 0.0

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        if log == "tokens":
            if self.lose_tokens:
                self.lose_tokens -= 1
                return replace(FINE, acknowledged=False)
            return replace(FINE, acknowledgement_delay=self.delay_tokens)
        if self.lose_ledger:
            self.lose_ledger -= 1
            return replace(FINE, acknowledged=False)
        return FINE


class World:
    """One server with one worker and its control."""

    def __init__(self) -> None:
        self.server = MemoryServer("main")
        self.faults = Faults()
        self.control = TinyControl(self.server.bus("control"))
        self.client = self.server.bus("client")
        self.runtime = StubRuntime()
        self.storage = StubStorage((card("m"), card("n")))
        self.worker_bus = self.server.bus("worker", faults=self.faults, ack_timeout=0.2)
        self.shell = self._worker(self.worker_bus)
        self.boots = boot_ids()
        self._tasks: list[asyncio.Task[None]] = []

    def _worker(self, bus: MemoryBus) -> DriverShell:
        self.boots = boot_ids()
        driver = WorkerDriver(
            bus, bus.subjects, "s1", 0, memory_bytes=100_000, max_slots=4, runtime=self.runtime, process=1
        )
        return DriverShell(bus, bus.subjects, driver, boot=lambda: next(self.boots))

    def start(self, shell: DriverShell) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(shell.run()))

    async def ask(self, name: str, *, model: str = "m", max_tokens: int = 20, **reply: object) -> Listener:
        listener = await Listener(self.client, **reply).open()  # type: ignore[arg-type]
        await self.control.request(name, model, Generation(max_tokens, prompt="hello " + name), listener.reply)
        return listener

    def pages(self) -> list[tuple[Record, Page | Seal]]:
        return [(r, decode_page(r.payload)) for r in self.server.tokens.since(1)]

    async def page(self, sequence: int) -> None:
        """Until the record at this sequence of TOKENS is stored."""
        stored = asyncio.get_running_loop().create_future()
        self.server.observe(
            lambda log, record: (
                stored.set_result(None)
                if log == "tokens" and record.sequence >= sequence and not stored.done()
                else None
            )
        )
        if self.server.tokens.last_sequence < sequence:
            await stored

    async def end(self) -> None:
        for task in self._tasks:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def boot_ids() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"boot-{number}"


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    here = World()
    store_bus = here.server.bus("store")
    store = StoreDriver("s1", dram_bytes=10_000, storage=here.storage)
    store_boots = boot_ids()
    async with here.control:
        here.start(DriverShell(store_bus, store_bus.subjects, store, boot=lambda: next(store_boots)))
        here.start(here.shell)
        await here.control.wait(ServerReady)
        await here.control.wait(WorkerReady)
        try:
            yield here
        finally:
            await here.end()


def joined(chunks: list[Chunk]) -> tuple[list[int], str]:
    """Tokens and text of chunks that must follow each other without a hole."""
    tokens: list[int] = []
    for chunk in chunks:
        assert chunk.position == len(tokens)
        tokens += chunk.tokens
    return tokens, "".join(chunk.text for chunk in chunks)


async def test_a_request_becomes_chunks_in_order_and_one_fact() -> None:
    async with world() as here:
        listener = await here.ask("r1")
        chunks = await listener.all()
        tokens, text = joined(chunks)
        assert len(tokens) == 20
        assert text == "".join(f"tok{token} " for token in tokens)
        assert [chunk.end for chunk in chunks] == [""] * (len(chunks) - 1) + ["length"]
        assert chunks[-1].usage is not None
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (8, 20)
        finished = await here.control.wait(SequenceFinished)
        assert isinstance(finished, SequenceFinished)
        assert (finished.first, finished.next, finished.reason) == (0, 20, "length")
        assert finished.tokens_digest == tokens_digest(tokens)
        ended = await here.control.wait(RequestEnded)
        assert isinstance(ended, RequestEnded)
        assert (ended.outcome, ended.positions, ended.shown) == ("finished", 20, True)
        pages = [page for _, page in here.pages()]
        assert [page.page for page in pages if isinstance(page, Page)] == list(range(20))


async def test_a_position_is_shown_only_after_its_page_is_acknowledged() -> None:
    async with world() as here:
        here.faults.delay_tokens = 0.02
        stored: list[float] = []
        loop = asyncio.get_running_loop()
        here.server.observe(lambda log, record: stored.append(loop.time()) if log == "tokens" else None)
        listener = await here.ask("r1", max_tokens=5)
        for position in range(5):
            chunk = await listener.chunk()
            assert chunk is not None
            assert chunk.position == position
            assert loop.time() - stored[position] >= 0.02


async def test_the_next_step_computes_while_a_page_waits_and_no_further() -> None:
    async with world() as here:
        await here.ask("warm", max_tokens=1)
        await here.control.wait(RequestEnded)
        here.faults.delay_tokens = 0.05
        steps: list[int] = []
        before = here.runtime.step

        async def counted(engines: object) -> object:
            steps.append(len(here.server.tokens.since(1)))
            return await before(engines)  # type: ignore[arg-type]

        here.runtime.step = counted  # type: ignore[method-assign, assignment]
        listener = await here.ask("r1", max_tokens=6)
        await listener.all()
        # Step k+1 begins while page k is under way, at most one page ahead of what is durable.
        assert steps == [1, 1, 2, 3, 4, 5] or steps == [1, 2, 3, 4, 5, 6]


async def test_many_requests_of_two_models_share_the_worker() -> None:
    async with world() as here:
        listeners = [await here.ask(f"r{i}", model="m" if i % 2 else "n", max_tokens=10 + i) for i in range(12)]
        answers = await asyncio.gather(*(listener.all() for listener in listeners))
        for i, chunks in enumerate(answers):
            assert len(joined(chunks)[0]) == 10 + i
        await here.control.wait(RequestEnded, 12)
        assert len(here.control.find(SequenceFinished)) == 12
        assert here.shell.endings == 0
        shared = [page for _, page in here.pages() if isinstance(page, Page) and len(page.sequences) > 1]
        assert shared


async def test_cancel_ends_the_sequence_with_a_page() -> None:
    async with world() as here:
        here.runtime.step_seconds = 0.005
        listener = await here.ask("r1", max_tokens=400)
        assert await listener.chunk() is not None
        await here.control.state("requests", CancelRequested("r1"))
        chunks = await listener.all()
        assert chunks[-1].end == "cancelled"
        finished = await here.control.wait(SequenceFinished)
        assert isinstance(finished, SequenceFinished)
        assert finished.reason == "cancelled"
        assert 0 < finished.next < 400
        assert here.control.find(CancelTaken) == [CancelTaken("r1", 1, True)]
        last = here.pages()[-1][1]
        assert isinstance(last, Page)
        assert last.sequences[0].end == "cancelled"
        ended = await here.control.wait(RequestEnded)
        assert isinstance(ended, RequestEnded)
        assert ended.outcome == "cancelled"


async def test_a_reader_that_joins_is_shown_everything_it_asked_for() -> None:
    async with world() as here:
        here.runtime.step_seconds = 0.005
        first = await here.ask("r1", max_tokens=30)
        for _ in range(10):
            assert await first.chunk() is not None
        late = await Listener(here.client, start=3, encoding="msgpack").open()
        whole = await Listener(here.client, single=True).open()
        for listener in (late, whole):
            await here.control.state("requests", ReaderAttached("r1", listener.reply))
        rest = await late.all()
        single = await whole.all()
        tokens: list[int] = []
        for chunk in rest:
            assert chunk.position == 3 + len(tokens)
            tokens += chunk.tokens
        assert len(tokens) == 27
        assert late.deliveries[0].headers == {"Content-Type": "application/msgpack"}
        assert len(single) == 1
        assert single[0].tokens[3:] == tuple(tokens)
        assert single[0].end == "length"
        assert [added.found for added in here.control.find(ReaderAdded) if isinstance(added, ReaderAdded)] == [True] * 2


async def test_a_reader_of_a_sequence_that_is_not_here_is_sent_elsewhere() -> None:
    async with world() as here:
        await (await here.ask("r1", max_tokens=2)).all()
        await here.control.wait(RequestEnded)
        await here.control.state("requests", ReaderAttached("r1", Listener(here.client).reply))
        await here.control.wait(RequestEnded, 2)
        assert not here.control.find(AddReader)


async def test_lost_acknowledgements_change_nothing() -> None:
    async with world() as here:
        await here.ask("warm", max_tokens=1)
        await here.control.wait(RequestEnded)
        here.faults.lose_tokens = 3
        here.faults.lose_ledger = 3
        listener = await here.ask("r1", max_tokens=8)
        tokens, _ = joined(await listener.all())
        assert len(tokens) == 8
        await here.control.wait(RequestEnded, 2)
        assert len(here.control.find(SequenceFinished, request="r1")) == 1
        assert here.shell.endings == 0


async def test_refusals_are_one_sentence() -> None:
    async with world() as here:
        generation = Generation(5, tokens=tuple(range(600)))
        await here.control.request("long", "m", generation)
        refused = await here.control.wait(SequenceRefused, request="long")
        assert isinstance(refused, SequenceRefused)
        assert refused.reason == "the prompt has 600 tokens, the context of m is 512: shorten it"
        await here.control.request("strange", "m", Generation(5, tokens=(5000,)))
        refused = await here.control.wait(SequenceRefused, request="strange")
        assert isinstance(refused, SequenceRefused)
        assert "outside the vocabulary" in refused.reason
        await here.control.wait(RequestEnded, 2)
        assert here.shell.endings == 0


async def test_max_tokens_is_cut_to_the_context() -> None:
    async with world() as here:
        listener = await Listener(here.client).open()
        await here.control.request("r1", "m", Generation(10_000, tokens=tuple(range(500))), listener.reply)
        chunks = await listener.all()
        assert len(joined(chunks)[0]) == 12
        assert chunks[-1].end == "length"


async def test_a_model_that_cannot_be_attached_is_said_to_be() -> None:
    async with world() as here:
        here.runtime.refuse["m"] = "the header of m is damaged"
        await here.control.request("r1", "m", Generation(5, prompt="x"))
        failed = await here.control.wait(AttachFailed)
        assert isinstance(failed, AttachFailed)
        assert failed.reason == "the header of m is damaged"
        ended = await here.control.wait(RequestEnded)
        assert isinstance(ended, RequestEnded)
        assert ended.outcome == "failed"


async def test_an_engine_that_breaks_off_fails_its_sequences_and_they_go_on() -> None:
    async with world() as here:
        here.runtime.step_seconds = 0.002
        listener = await here.ask("r1", max_tokens=40)
        for _ in range(5):
            assert await listener.chunk() is not None
        here.runtime.broken["m"] = "out of memory"
        tokens: dict[int, int] = {}
        for chunk in await listener.all():
            tokens.update(zip(range(chunk.position, chunk.next), chunk.tokens, strict=True))
        assert sorted(tokens)[-1] == 39
        assert len(tokens) >= 35
        failed = await here.control.wait(SequenceFailed)
        assert isinstance(failed, SequenceFailed)
        assert failed.next > 0
        finished = await here.control.wait(SequenceFinished)
        assert isinstance(finished, SequenceFinished)
        assert (finished.attempt, finished.first, finished.next) == (2, failed.next, 40)
        assert here.shell.endings == 0
        undisturbed = await here.ask("r1-again", max_tokens=1)
        await undisturbed.all()


async def test_a_zombie_shows_nothing_after_the_seal_and_starts_a_new_epoch() -> None:
    async with world() as here:
        here.runtime.step_seconds = 0.005
        listener = await here.ask("r1", max_tokens=100)
        for _ in range(5):
            assert await listener.chunk() is not None
        epoch = here.shell.epoch
        # Its reading stands still, so that only the fence can stop it.
        here.worker_bus.faults = _Deaf()
        await here.control.lose(WORKER, epoch)
        seal = await here.control.seal(WORKER, epoch)
        sealed_positions = sum(
            len(part.tokens)
            for record, page in here.pages()
            if isinstance(page, Page)
            for part in page.sequences
            if record.sequence < seal
        )
        here.worker_bus.faults = here.faults
        await here.control.wait(WorkerStarted, 2)
        assert "fenced" in here.shell.last_ending
        finished = await here.control.wait(SequenceFinished)
        assert isinstance(finished, SequenceFinished)
        assert (finished.attempt, finished.first, finished.next) == (2, sealed_positions, 100)
        tokens: dict[int, int] = {}
        for chunk in await listener.all():
            for position, token in zip(range(chunk.position, chunk.next), chunk.tokens, strict=True):
                assert tokens.setdefault(position, token) == token, "a durable position never changes"
        old = [record for record, _ in here.pages() if record.subject.endswith(f".{epoch}") and record.sequence > seal]
        assert not old


class _Deaf(NoFaults):
    """What the bus has for its readers comes late."""

    def deliver(self, log: str, record: Record) -> float:
        return 0.3


async def test_a_recovered_answer_equals_an_undisturbed_one() -> None:
    async def answer_of(disturb: bool) -> tuple[object, ...]:
        async with world() as here:
            here.runtime.step_seconds = 0.002
            whole = await Listener(here.client, single=True).open()
            generation = Generation(60, prompt="hello", seed=7, logprobs=2, presence_penalty=1.0, min_tokens=9)
            await here.control.request("r1", "m", generation, whole.reply)
            if disturb:
                await here.control.wait(StartSequence)
                await here.page(10)
                epoch = here.shell.epoch
                await here.control.lose(WORKER, epoch)
                await here.control.wait(WorkerStarted, 2)
                await here.control.seal(WORKER, epoch)
            (chunk,) = await whole.all()
            if disturb:
                starts = here.control.find(StartSequence)
                assert isinstance(starts[-1], StartSequence)
                assert starts[-1].position >= 10
            assert len(chunk.logprobs) == 60 and len(chunk.logprobs[0].alternatives) == 2
            return chunk.tokens, chunk.text, chunk.logprobs

    assert await answer_of(True) == await answer_of(False)


async def test_progress_is_reported_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.worker_driver.PROGRESS_SECONDS", 0.05)
    async with world() as here:
        here.runtime.step_seconds = 0.01
        listener = await here.ask("r1", max_tokens=30)
        await listener.all()
        reports = here.control.find(ProgressReported)
        assert 2 <= len(reports) <= 8
        last = reports[-1]
        assert isinstance(last, ProgressReported)
        assert 0 < last.sequences[0].next < 30
        assert len(last.sequences[0].tokens_digest) == 16


async def test_large_steps_are_split_into_several_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.worker_sequences.PAGE_LIMIT_BYTES", 250)
    async with world() as here:
        listeners = [await here.ask(f"r{i}", max_tokens=10) for i in range(4)]
        for chunks in await asyncio.gather(*(listener.all() for listener in listeners)):
            assert len(joined(chunks)[0]) == 10
        pages = [page for _, page in here.pages() if isinstance(page, Page)]
        assert [page.page for page in pages] == list(range(len(pages)))
        assert max(len(record.payload) for record, _ in here.pages()) <= 250


async def test_an_idle_writer_keeps_its_last_page_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.worker_driver.KEEPALIVE_SECONDS", 0.05)
    async with world() as here:
        await (await here.ask("r1", max_tokens=2)).all()
        await here.page(4)
        assert here.pages()[-1][1] == Page(3, ())
        assert here.shell.endings == 0


async def test_a_model_is_detached_to_make_room_for_another() -> None:
    async with world() as here:
        here.storage.cards["big"] = card("big", weight_bytes=9_000)
        await (await here.ask("r1", model="m", max_tokens=2)).all()
        await here.control.wait(RequestEnded)
        attached = await here.control.wait(ModelAttached)
        assert isinstance(attached, ModelAttached)
        assert here.control.find(AttachModel)
