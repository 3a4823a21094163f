"""A real model in float64 in a cell of two workers: what moves, or outlives its worker, is the undisturbed answer.

Sequences that have their beginning in common move together: the destination computes it once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from packed_sample import pack_sample
from tiny_control import Listener, TinyControl

from actors.driver import DriverShell
from actors.local_runtime import LocalRuntime
from actors.local_storage import LocalStorage
from actors.rules import KNOWN_RULES
from actors.store_driver import StoreDriver
from actors.worker_driver import WorkerDriver
from bus.memory import MemoryServer
from bus.messages import (
    Generation,
    MigrateRequested,
    MoveEnded,
    RequestEnded,
    RulesActivated,
    SequencesSealed,
    ServerReady,
    WorkerReady,
)
from models.contract import Engine

SEQUENCES = 4
SHARED, OWN, LENGTH = 240, 6, 120
"""Tokens that all prompts begin with, that follow in each, and of each answer."""
SOURCE, DESTINATION = "gpu/s/0", "gpu/s/1"


class CountingRuntime(LocalRuntime):
    """`fed`: tokens that its engines have computed."""

    fed = 0

    async def attach(self, *arguments: Any, **named: Any) -> Engine:
        engine: Any = await super().attach(*arguments, **named)
        decoder = engine.decoder
        forward = decoder._forward

        def counting(rows: Any, counts: list[int]) -> Any:
            self.fed += sum(counts)
            return forward(rows, counts)

        decoder._forward = counting
        return engine  # type: ignore[no-any-return]


class Server:
    """A cell with one server of two workers, all in this process, on a bus in memory."""

    def __init__(self, models: Path) -> None:
        self.bus = MemoryServer("main")
        self.control = TinyControl(self.bus.bus("control"))
        self.client = self.bus.bus("client")
        self.runtimes = {name: CountingRuntime(models) for name in (SOURCE, DESTINATION)}
        boots = (f"boot-{number}" for number in itertools.count())
        store = StoreDriver("s", dram_bytes=1 << 30, storage=LocalStorage(models))
        line = self.bus.bus("store")
        self.shells = {"store/s": DriverShell(line, line.subjects, store, boot=lambda: next(boots))}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        for index, (name, runtime) in enumerate(self.runtimes.items()):
            line = self.bus.bus(name)
            worker = WorkerDriver(
                line, line.subjects, "s", index, memory_bytes=1 << 30, max_slots=SEQUENCES, runtime=runtime
            )
            self.shells[name] = DriverShell(line, line.subjects, worker, boot=lambda: next(boots))

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Server]:
        try:
            async with asyncio.timeout(60), self.control:
                await self.control.state("cell", RulesActivated(KNOWN_RULES[-1]))
                self.tasks = {name: asyncio.ensure_future(shell.run()) for name, shell in self.shells.items()}
                await self.control.wait(ServerReady)
                await self.control.wait(WorkerReady, len(self.runtimes))
                yield self
        finally:
            for task in self.tasks.values():
                task.cancel()
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)
            for runtime in self.runtimes.values():
                runtime.close()

    async def kill(self, worker: str) -> None:
        """It says nothing more; watch misses it, and what it made durable is sealed."""
        self.tasks[worker].cancel()
        current = self.control.cell.order.epoch_of(worker)
        assert current is not None
        await self.control.lose(worker, current.epoch)
        await self.control.seal(worker, current.epoch)

    async def ask(self, name: str, prompt: tuple[int, ...]) -> Listener:
        listener = await Listener(self.client).open()
        generation = Generation(LENGTH, tokens=prompt, temperature=0.0, min_tokens=LENGTH)
        await self.control.request(name, "tiny", generation, listener.reply)
        return listener


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Computed with on one thread: two engines that step at once would wait for each other's."""
    directory = tmp_path_factory.mktemp("together") / "models"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pack_sample(directory, "tiny", dtype="float64", parameters=600_000)
    yield directory
    torch.set_num_threads(threads)


async def test_a_beginning_that_they_share_is_computed_once(models: Path) -> None:
    random = Random(7)
    shared = tuple(random.randrange(8, 400) for _ in range(SHARED))
    prompts = {f"r{n}": shared + tuple(random.randrange(8, 400) for _ in range(OWN)) for n in range(SEQUENCES)}
    async with Server(models).up() as server:
        calm = {name: await read(await server.ask(f"calm-{name}", prompt)) for name, prompt in prompts.items()}
        assert len({tuple(answer) for answer in calm.values()}) == SEQUENCES

        listeners = {name: await server.ask(name, prompt) for name, prompt in prompts.items()}
        begun = {name: await begin(listener) for name, listener in listeners.items()}
        source, destination = server.runtimes[SOURCE], server.runtimes[DESTINATION]
        assert source.fed and not destination.fed
        await server.control.state("migration", MigrateRequested(model="tiny", to=DESTINATION))
        await server.control.wait(MoveEnded, SEQUENCES)
        ended = server.control.find(MoveEnded)
        where = [(one.moved, one.destination) for one in ended if isinstance(one, MoveEnded)]
        assert where == [(True, DESTINATION)] * SEQUENCES
        for name, listener in listeners.items():
            assert begun[name] + await read(listener) == calm[name], "in float64 it is the undisturbed answer"
        # Each position of an answer is computed there once, caught up with or decoded; the last one not at all.
        assert destination.fed <= SHARED + SEQUENCES * (OWN + LENGTH)
        assert destination.fed > SHARED + SEQUENCES * OWN


async def test_what_a_dead_worker_leaves_goes_on_elsewhere_as_it_would_have(models: Path) -> None:
    prompts = {f"r{n}": tuple(Random(n).randrange(8, 400) for _ in range(20 + n)) for n in range(SEQUENCES)}
    async with Server(models).up() as server:
        calm = {name: await read(await server.ask(f"calm-{name}", prompt)) for name, prompt in prompts.items()}
        listeners = {name: await server.ask(name, prompt) for name, prompt in prompts.items()}
        begun = {name: await begin(listener) for name, listener in listeners.items()}
        await server.kill(SOURCE)
        answers = {name: begun[name] + await read(listener) for name, listener in listeners.items()}
        await server.control.wait(RequestEnded, 2 * SEQUENCES)
        ended = [one for one in server.control.find(RequestEnded) if isinstance(one, RequestEnded)]
    sealed = {
        one.request: one for seal in server.control.find(SequencesSealed) if isinstance(seal, SequencesSealed)
        for one in seal.sequences
    }  # fmt: skip
    for name, answer in answers.items():
        # Nobody shows here what was durable and not shown yet: that is the reader of control.
        known = sealed[name].tokens
        assert len(known) < LENGTH and calm[name][: len(known)] == list(known)
        assert answer[-(LENGTH - len(known)) :] == calm[name][len(known) :], "in float64 it is the undisturbed answer"
    assert [(one.outcome, one.positions, one.attempts) for one in ended[-SEQUENCES:]] == [
        ("finished", LENGTH, 2)
    ] * SEQUENCES


async def begin(listener: Listener) -> list[int]:
    """Its first tokens, a few."""
    found: list[int] = []
    while len(found) < 4:
        chunk = await listener.chunk()
        assert chunk is not None and chunk.position == len(found)
        found += chunk.tokens
    return found


async def read(listener: Listener) -> list[int]:
    """Every position once and in order; what is shown again is passed over."""
    found: dict[int, int] = {}
    for chunk in await listener.all():
        found |= dict(enumerate(chunk.tokens, chunk.position))
    return [found[position] for position in sorted(found)]
