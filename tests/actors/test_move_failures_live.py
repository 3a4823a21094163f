"""What can happen to a move, at its stages, on real processes over a real server; each node behind a wire of its own.

One cell for all cases: whoever is killed comes back, and the next answer moves the other way or the same.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bus_worlds import Proxy
from live_cell import CELL, LiveCell, live_cell

from actors.moves_watch import watch_moves
from actors.replay import verify
from bus.log_reading import read_to_end
from bus.messages import (
    FactEnvelope,
    Message,
    MigrateRequested,
    MoveEnded,
    MoveStarted,
    RequestPlaced,
    RequestsConfigured,
    decode_fact,
    decode_said,
    encode,
    kind_of,
    request_id,
)
from bus.sentences import read_event
from bus.subjects import FactSubject, SaidSubject, Subjects

pytestmark = pytest.mark.slow

SUBJECTS = Subjects(CELL)
TOKENS = 90
MOVE_AT = 8


class Moving:
    """One answer on its way: it is asked for, and moved once it has begun."""

    def __init__(self, stage: Stages, key: str, tokens: int) -> None:
        self.stage, self.key, self.tokens = stage, key, tokens
        self.request = request_id("test", key)
        self.found: list[int] = []
        self.end = ""
        self.source, self.heir = "", ""
        self.begun = asyncio.Event()

    async def read(self) -> None:
        cell = self.stage.cell
        async for chunk in cell.client.infer("stub", prompt="the same", max_tokens=self.tokens, key=self.key, seed=7):
            assert chunk.position == len(self.found), f"{self.key}: every position once and in order"
            self.found += chunk.tokens
            self.end = chunk.end
            if len(self.found) >= MOVE_AT:
                self.begun.set()
            if len(self.found) >= MOVE_AT and self.stage.wanted:
                self.stage.wanted = False
                await self.migrate()

    async def migrate(self, to: str = "") -> int:
        message = MigrateRequested(request=self.request, to=to)
        payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
        fact = await self.stage.cell.bus.ledger.append(SUBJECTS.fact("migration", kind_of(message)), payload)
        return fact.sequence

    async def moved(self, to: str) -> MoveEnded:
        """Asked for, and what became of it."""
        fact = await self.migrate(to)
        (ended,) = [one async for one in watch_moves(self.stage.cell.bus, SUBJECTS, fact)]
        return ended

    async def placed(self) -> list[str]:
        """The workers on which placement gave it a slot, moves apart."""
        said = await self.stage.said(0)
        return [one.worker for one in said if isinstance(one, RequestPlaced) and one.request == self.request]


class Stages:
    """The cell, and what is done to it at a stage."""

    def __init__(self, cell: LiveCell, proxies: dict[str, Proxy]) -> None:
        self.cell, self.proxies = cell, proxies
        self.wanted = False

    async def case(
        self, name: str, kind: str, act: Callable[[Moving], Awaitable[None]], tokens: int = TOKENS
    ) -> tuple[Moving, list[MoveEnded]]:
        """An answer that moves; `act` is awaited as soon as the first record of `kind` about it is stored."""
        after = (await self.cell.bus.ledger.usage()).last_sequence
        moving = Moving(self, name, tokens)
        self.wanted = True
        reading = asyncio.ensure_future(moving.read())
        watching = asyncio.ensure_future(self._watch(moving, kind, act, after))
        async with asyncio.timeout(40):
            await reading
            ended = await self._ended(moving, after)
            await watching
        for node in self.cell.nodes:
            if node.process is not None and node.process.returncode is not None:
                await node.start()
        for control in self.cell.controls:
            if control.process is not None and control.process.returncode is not None:
                await control.start()
        await self.cell.until(lambda found: len(found["workers"]) == len(self.cell.nodes))
        return moving, ended

    async def _watch(self, moving: Moving, kind: str, act: Callable[[Moving], Awaitable[None]], after: int) -> None:
        async for found, fields in self._about(moving, after):
            # Effects stand before the records of their step.
            if found in ("sequence.follow", "heir.introduced"):
                moving.source = fields["source"].split("/")[1]
                moving.heir = "n1" if moving.source == "n0" else "n0"
            if found == kind:
                await act(moving)
                return

    async def _ended(self, moving: Moving, after: int) -> list[MoveEnded]:
        """What became of its moves, once one has ended."""
        ended = []
        async for found, fields in self._about(moving, after):
            if found == "move.ended":
                ended.append(msgspec.convert({"kind": "move.ended", **fields}, MoveEnded))
                return ended
        return ended

    async def _about(self, moving: Moving, after: int) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        reader = await self.cell.bus.ledger.read(start=after + 1)
        try:
            while True:
                for record in await reader.batch():
                    subject = SUBJECTS.parse(record.subject)
                    if not isinstance(subject, FactSubject | SaidSubject):
                        continue
                    decode = decode_fact if isinstance(subject, FactSubject) else decode_said
                    fields = msgspec.json.decode(decode(record.payload).body)
                    if fields.get("request") == moving.request:
                        yield subject.kind, fields
        finally:
            await reader.close()

    async def said(self, after: int) -> list[Message]:
        """What stands in the ledger behind this sequence."""
        records = await read_to_end(self.cell.bus.ledger, after + 1)
        return [event.message for record in records if (event := read_event(SUBJECTS, record)).message is not None]

    # ---- what is done -----------------------------------------------------------------------------------------

    def node(self, server: str) -> Any:
        return next(node for node in self.cell.nodes if node.name == f"node-{server}")

    async def kill_source(self, moving: Moving) -> None:
        self.node(moving.source).signal(signal.SIGKILL)

    async def kill_heir(self, moving: Moving) -> None:
        self.node(moving.heir).signal(signal.SIGKILL)

    async def kill_first_control(self, moving: Moving) -> None:
        self.cell.controls[0].signal(signal.SIGKILL)

    async def kill_second_control(self, moving: Moving) -> None:
        self.cell.controls[1].signal(signal.SIGKILL)

    async def kill_all(self, moving: Moving) -> None:
        for child in (self.node(moving.source), self.node(moving.heir), self.cell.controls[0]):
            child.signal(signal.SIGKILL)
        for child in (self.node(moving.source), self.node(moving.heir), self.cell.controls[0]):
            await child.wait()
            await child.start()

    async def cut_source(self, moving: Moving) -> None:
        self.proxies[moving.source].drop()

    async def cut_heir(self, moving: Moving) -> None:
        self.proxies[moving.heir].drop()

    async def slow_source(self, moving: Moving) -> None:
        self.proxies[moving.source].delay = 0.15

    async def slow_heir(self, moving: Moving) -> None:
        self.proxies[moving.heir].delay = 0.15

    async def ask_again(self, moving: Moving) -> None:
        await moving.migrate()

    async def ask_back(self, moving: Moving) -> None:
        await moving.migrate(to=moving.source)

    async def cancel(self, moving: Moving) -> None:
        await self.cell.client.cancel(moving.request)

    async def nothing(self, moving: Moving) -> None:
        return


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stages]:
    async with live_cell(folder, controls=2, nodes=0) as cell:
        proxies = {}
        for server in ("n0", "n1"):
            proxies[server] = Proxy(cell.server.port)
            await cell.add_node(server, step_seconds=0.015, nats=await proxies[server].start())
        # Two who die under an answer are no reason to give it up here.
        configured = encode(RequestsConfigured(deaths_limit=100, dead_letters=True))
        payload = encode(FactEnvelope("operator", msgspec.Raw(configured)))
        await cell.bus.ledger.append(SUBJECTS.fact("requests", kind_of(RequestsConfigured)), payload)
        await cell.until(lambda found: len(found["workers"]) == 2 and len(found["models"]) == 1)
        try:
            yield Stages(cell, proxies)
        finally:
            for child in cell.nodes:
                await child.stop()
            for proxy in proxies.values():
                await proxy.stop()


async def replay(cell: LiveCell) -> None:
    assert verify(CELL, await read_to_end(cell.bus.ledger)).difference is None


async def test_whoever_dies_at_whichever_stage(tmp_path: Path) -> None:
    async with staged(tmp_path) as stages:
        calm, _ = await stages.case("calm", "move.ended", stages.nothing)
        assert calm.end == "length" and len(calm.found) == TOKENS
        deaths = {
            "source before the rounds": ("sequence.follow", stages.kill_source),
            "source after a round": ("round.finished", stages.kill_source),
            "source caught up with": ("sequence.caught-up", stages.kill_source),
            "source after its hand-over": ("sequence.released", stages.kill_source),
            "destination at its beginning": ("sequence.follow", stages.kill_heir),
            "destination as the source stops": ("sequence.hand-over", stages.kill_heir),
            "destination as it goes on": ("sequence.resume", stages.kill_heir),
            "a control at the beginning": ("heir.introduced", stages.kill_first_control),
            "the other control in the middle": ("sequence.caught-up", stages.kill_second_control),
            "a control at the hand-over": ("sequence.released", stages.kill_first_control),
            "three of five": ("sequence.hand-over", stages.kill_all),
        }
        for name, (kind, act) in deaths.items():
            moving, ended = await stages.case(name, kind, act)
            assert (moving.found, moving.end) == (calm.found, "length"), name
            assert ended, name
        await replay(stages.cell)


async def test_wires_wishes_and_ends(tmp_path: Path) -> None:
    async with staged(tmp_path) as stages:
        calm, ended = await stages.case("calm", "move.ended", stages.nothing)
        assert [one.moved for one in ended] == [True]
        cases = {
            "source is cut off": ("round.finished", stages.cut_source),
            "destination is cut off": ("sequence.follow", stages.cut_heir),
            "source is slow": ("sequence.follow", stages.slow_source),
            "destination is slow": ("sequence.follow", stages.slow_heir),
            "asked for twice": ("sequence.follow", stages.ask_again),
            "wanted back at once": ("sequence.hand-over", stages.ask_back),
        }
        for name, (kind, act) in cases.items():
            moving, _ = await stages.case(name, kind, act)
            assert (moving.found, moving.end) == (calm.found, "length"), name
            for proxy in stages.proxies.values():
                proxy.delay = 0.0
        for kind in ("sequence.follow", "round.finished", "sequence.hand-over", "sequence.released"):
            moving, _ = await stages.case(f"cancelled at {kind}", kind, stages.cancel)
            assert moving.end == "cancelled", kind
            assert moving.found == calm.found[: len(moving.found)] and len(moving.found) < TOKENS
        for tokens in range(MOVE_AT + 1, MOVE_AT + 6):
            moving, ended = await stages.case(f"over after {tokens}", "move.described", stages.nothing, tokens)
            assert (moving.found, moving.end) == (calm.found[:tokens], "length")
        await replay(stages.cell)


async def test_two_change_places_again_and_again(tmp_path: Path) -> None:
    async with staged(tmp_path) as stages:
        first, second = Moving(stages, "one", 150), Moving(stages, "two", 150)
        reading = [asyncio.ensure_future(one.read()) for one in (first, second)]
        for moving in itertools.cycle((first, second)):
            if all(task.done() for task in reading):
                break
            await moving.migrate()
            await asyncio.wait(reading, timeout=0.1)
        await asyncio.gather(*reading)
        assert first.found == second.found and first.end == second.end == "length"
        after = [one for one in await stages.said(0) if isinstance(one, MoveEnded)]
        assert sum(one.moved for one in after) >= 4
        await at_once_from_a_to_b_and_from_b_to_a(stages)
        await to_where_no_memory_is_left_after_all(stages)
        await replay(stages.cell)


async def at_once_from_a_to_b_and_from_b_to_a(stages: Stages) -> None:
    one, other = Moving(stages, "from a", 200), Moving(stages, "from b", 200)
    reading = [asyncio.ensure_future(moving.read()) for moving in (one, other)]
    places = {one: "gpu/n0/0", other: "gpu/n1/0"}
    for moving, place in places.items():
        await moving.begun.wait()
        if await moving.placed() != [place]:
            assert (await moving.moved(place)).moved
    after = (await stages.cell.bus.ledger.usage()).last_sequence
    ended = await asyncio.gather(one.moved(places[other]), other.moved(places[one]))
    assert [(move.moved, move.destination) for move in ended] == [(True, places[other]), (True, places[one])]
    said = [type(message) for message in await stages.said(after)]
    assert said.index(MoveEnded) > said.index(MoveStarted, said.index(MoveStarted) + 1), "both were on their way"
    await asyncio.gather(*reading)
    assert one.found == other.found and one.end == other.end == "length"


async def to_where_no_memory_is_left_after_all(stages: Stages) -> None:
    """Placement counts on the device's memory, and the attach finds that it is not there."""
    await stages.cell.add_node("n2", step_seconds=0.015, full=True)
    await stages.cell.until(lambda found: len(found["workers"]) == 3)
    moving = Moving(stages, "nowhere", 120)
    reading = asyncio.ensure_future(moving.read())
    await moving.begun.wait()
    ended = await moving.moved("n2")
    assert (ended.moved, ended.reason) == (False, "stub: no free slot, and n2 did not start it")
    await reading
    assert moving.end == "length" and len(moving.found) == 120
    assert len(await moving.placed()) == 1, "it never left"
