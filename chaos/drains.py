"""A simulated operator who takes servers out of service and back, with all that `longshore drain` can say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import msgspec

from bus.contract import Bus, BusError
from bus.messages import DrainRequested, FactEnvelope, encode, kind_of
from bus.subjects import Subjects
from chaos.options import Options

PAUSE_SECONDS = 0.3
DEADLINES_MS = (0, 300, 1500, 30_000)


class Drainer:
    """States `drain.requested` as often as the world wants; when all is calm all servers are taken back: `done`."""

    def __init__(
        self,
        random: Random,
        options: Options,
        bus: Bus,
        subjects: Subjects,
        note: Callable[[str], None],
        active: Callable[[], bool],
    ) -> None:
        self.done = not options.drains
        self._random, self._options, self._bus, self._subjects, self._note = random, options, bus, subjects, note
        self._active = active
        self._drained: dict[str, bool] = {}

    async def run(self) -> None:
        if self.done:
            return
        random, options = self._random, self._options
        servers = [f"s{number}" for number in range(options.servers)]
        for _ in range(options.drains):
            await asyncio.sleep(random.expovariate(1.5 * options.drains / options.fault_seconds))
            if not self._active():
                break
            server = random.choice(servers)
            self._drained[server] = True
            await self._state(DrainRequested(server, random.choice(DEADLINES_MS), leave=random.random() < 0.5))
            if random.random() < 0.4:
                await asyncio.sleep(random.choice((0.0, 0.2, 1.0)) * random.random())
                await self._state(DrainRequested(server, undo=True))
        await asyncio.sleep(max(0.0, options.fault_seconds - asyncio.get_running_loop().time()) + PAUSE_SECONDS)
        for server in self._drained:
            await self._insist(DrainRequested(server, undo=True))
        self.done = True

    async def _insist(self, message: DrainRequested) -> None:
        while True:
            if await self._state(message):
                return
            await asyncio.sleep(PAUSE_SECONDS)

    async def _state(self, message: DrainRequested) -> bool:
        self._note(f"the operator asks: {msgspec.to_builtins(message)}")
        payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
        try:
            await self._bus.ledger.append(self._subjects.fact("placement", kind_of(message)), payload)
        except BusError as error:
            self._note(f"the operator is told: {error}")
            return False
        return True
