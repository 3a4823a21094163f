"""A simulated operator who moves what runs: one request, a model, a whole server, to somewhere or anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import msgspec

from bus.contract import Bus, BusError
from bus.messages import FactEnvelope, MigrateRequested, RequestAccepted, decode_fact, decode_fact_body, encode, kind_of
from bus.subjects import Subjects
from chaos.options import Options


class Mover:
    """States `migrate.requested` now and then, as long as the world is troubled; `moves` of them in all."""

    def __init__(
        self,
        random: Random,
        options: Options,
        bus: Bus,
        subjects: Subjects,
        note: Callable[[str], None],
        active: Callable[[], bool],
    ) -> None:
        self._random, self._options, self._bus, self._subjects, self._note = random, options, bus, subjects, note
        self._active = active

    async def run(self) -> None:
        for _ in range(self._options.moves):
            await asyncio.sleep(self._random.expovariate(self._options.moves / self._options.fault_seconds))
            if not self._active():
                return
            message = await self._wish()
            self._note(f"the operator asks: {msgspec.to_builtins(message)}")
            payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
            try:
                await self._bus.ledger.append(self._subjects.fact("migration", kind_of(message)), payload)
            except BusError as error:
                self._note(f"the operator is told: {error}")

    async def _wish(self) -> MigrateRequested:
        random = self._random
        servers = [f"s{number}" for number in range(self._options.servers)]
        workers = [f"gpu/{server}/{index}" for server in servers for index in range(self._options.workers)]
        places = ["", "", *servers] if self._options.longest_prompt else ["", "", *servers, *workers, "s9"]
        to = random.choice(places)
        kind = random.random()
        if kind < 0.4:
            return MigrateRequested(model=random.choice(self._options.models).model, to=to)
        if kind < 0.7:
            return MigrateRequested(server=random.choice([*servers, *workers]), to=to)
        return MigrateRequested(request=await self._newest() or "0" * 32, to=to)

    async def _newest(self) -> str:
        """The request that was accepted last: the one that most likely still runs."""
        try:
            last = await self._bus.ledger.last(self._subjects.fact("requests", "request.accepted"))
        except BusError:
            return ""
        if last is None:
            return ""
        fact = decode_fact_body(decode_fact(last.payload).body)
        return fact.request if isinstance(fact, RequestAccepted) else ""
