"""A rolling upgrade on real processes: old programs replaced one after the other under load, and a switch of the rules.

The old program is the same code, told to know rule version 1 alone.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.replaying import replay_live
from actors.rules import KNOWN_RULES
from actors.rules_cli import activate, described
from actors.stub_node import MODEL
from bus.client import Client
from bus.log_reading import read_to_end
from bus.options import Failure
from bus.service import instances
from tests.support.live_cell import CELL, LiveCell, live_cell

pytestmark = pytest.mark.slow
OLD = ("--known-rules", "1")
POSITIONS = 12


class Load:
    """Requests that follow each other on several lines, until `stop`. `slowest`: the longest anybody waited."""

    def __init__(self, client: Client, models: list[str], lines: int) -> None:
        self.answers = 0
        self.slowest = 0.0
        self._client = client
        self._stopping = False
        self._numbers = itertools.count()
        self._tasks = [asyncio.ensure_future(self._line(models)) for _ in range(lines)]

    async def _line(self, models: list[str]) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping:
            number = next(self._numbers)
            answer = self._client.infer(
                models[number % len(models)], prompt=f"p{number}", max_tokens=POSITIONS, temperature=0
            )
            before = loop.time()
            positions: list[int] = []
            async for chunk in answer:
                positions += range(chunk.position, chunk.position + len(chunk.tokens))
                self.slowest = max(self.slowest, loop.time() - before)
                before = loop.time()
            assert answer.end == "length" and positions == list(range(POSITIONS))
            self.answers += 1

    async def more(self, answers: int) -> None:
        """Until so many further answers were read to their end."""
        wanted = self.answers + answers
        while self.answers < wanted:
            failed = [task for task in self._tasks if task.done()]
            for task in failed:
                task.result()
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)


async def longshore(cell: LiveCell, *arguments: str) -> tuple[int, str]:
    """A command's exit code, and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bus.main", *arguments, "--nats", cell.server.url, "--cell", CELL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def states(cell: LiveCell, wanted: list[tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """Until the controls are as wanted: (state, known rules) of each, in any order."""
    async with asyncio.timeout(30):
        while True:
            found = [described(one) for one in await instances(cell.bus, CELL, seconds=0.1)]
            if sorted((one["state"], one["known_rules"]) for one in found) == sorted(wanted):
                return found


def where(status: dict[str, Any], model: str) -> list[str]:
    return [name for name, worker in status["workers"].items() if model in worker["instances"]]


async def test_a_rolling_upgrade_with_a_changed_placement_rule(tmp_path: Path) -> None:
    old, new = ("live", [1]), ("live", list(KNOWN_RULES))
    async with live_cell(tmp_path, controls=2, control=OLD, workers=2, models=3, step_seconds=0.005) as cell:
        load = Load(cell.client, [MODEL, f"{MODEL}-1"], lines=6)
        await load.more(12)
        await states(cell, [old, old])
        first, second = where(await cell.status(), MODEL), where(await cell.status(), f"{MODEL}-1")
        assert first == second and len(first) == 1, "under version 1 everything starts on the first device"
        with pytest.raises(Failure, match="no control that answers knows rule version 2"):
            await activate(cell.bus, CELL, 2)

        await cell.add_control()
        await states(cell, [old, old, new])
        await cell.controls[0].stop()
        await load.more(6)
        with pytest.raises(Failure, match=r"rule version 2 is not known to control .*--force"):
            await activate(cell.bus, CELL, 2)
        await cell.add_control()
        await states(cell, [old, new, new])
        await cell.controls[1].stop()
        await states(cell, [new, new])
        await load.more(6)
        assert [child.process and child.process.returncode for child in cell.controls] == [0, 0, None, None]
        code, told = await longshore(cell, "rules", "activate", "2")
        assert code == 0 and "in force since ledger sequence" in told
        further = Load(cell.client, [f"{MODEL}-2"], lines=2)
        await further.more(4)
        third = where(await cell.status(), f"{MODEL}-2")
        assert third and third != first, "under version 2 the idle device gets the instance"

        # The old program again: it cannot follow, says so, and takes no request away from those that can.
        await cell.add_control(*OLD)
        silent = next(one for one in await states(cell, [("silent", [1]), new, new]) if one["state"] == "silent")
        assert re.search("rule version 2 is in force at .*run a newer one", silent["reason"])
        # It answers before its log is written.
        await cell.until(lambda _: silent["reason"] in cell.controls[4].last_words())
        await load.more(12)
        assert silent["id"] not in {record.publisher for record in await read_to_end(cell.bus.ledger)}

        # Back, while requests run.
        assert (await activate(cell.bus, CELL, 1))[0] == 2
        await load.more(6)
        await asyncio.gather(load.stop(), further.stop())
        await states(cell, [("silent", [1]), new, new])
        verdict, _ = await replay_live(cell.bus, CELL, verify=True, at=0)
        # The ledger may end between a fact and what follows from it.
        assert verdict is not None and verdict.difference is None and verdict.verified > 1000
        code, told = await longshore(cell, "rules")
        assert code == 0 and "rule version 1 is in force, since" in told and f"control {silent['id']}" in told
