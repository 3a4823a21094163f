"""A simulated rolling upgrade: old controls are replaced one after the other, and the rules are switched meanwhile.

Some worlds switch before the last old control is gone (as `longshore rules activate --force` does): it falls silent
until it is replaced. Some go back, and forth again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import msgspec

from actors.rules import FIRST_RULES, KNOWN_RULES
from bus.contract import Bus, BusError
from bus.messages import FactEnvelope, RulesActivated, encode, kind_of
from bus.subjects import Subjects
from chaos.options import Options
from chaos.processes import Process

PAUSE_SECONDS = 0.3


class Upgrade:
    """`known_rules` says what the program of a control knows now; `done`: nothing of it is left to do."""

    def __init__(
        self, random: Random, options: Options, bus: Bus, subjects: Subjects, note: Callable[[str], None]
    ) -> None:
        self.done = not options.upgrade and options.rules == FIRST_RULES
        self._random = random
        self._options = options
        self._bus = bus
        self._subjects = subjects
        self._note = note
        self._new: dict[str, bool] = {}

    def known_rules(self, control: str) -> tuple[int, ...]:
        """An old program knows the first rules alone."""
        old = self._options.upgrade and control not in self._new
        return (FIRST_RULES,) if old else KNOWN_RULES

    async def run(self, controls: list[Process]) -> None:
        if self.done:
            return
        if not self._options.upgrade:
            await self._activate(self._options.rules)
            self.done = True
            return
        random = self._random
        early = random.random() < 0.4
        pause = self._options.fault_seconds / (len(controls) + 3)
        for number, process in enumerate(controls):
            await asyncio.sleep(random.uniform(0.2, 1.8) * pause)
            if early and number == len(controls) - 1:
                await self._activate(KNOWN_RULES[-1])
                await asyncio.sleep(random.uniform(0.0, pause))
            self._new[process.name] = True
            self._note(f"{process.name} is replaced by a new program")
            process.die(random.choice((0.05, 0.5, 1.5)))
        for version in (KNOWN_RULES[-1], *random.choice(((), (FIRST_RULES,), (FIRST_RULES, KNOWN_RULES[-1])))):
            await asyncio.sleep(random.uniform(0.2, 1.8) * pause)
            await self._activate(version)
        self.done = True

    async def _activate(self, version: int) -> None:
        self._note(f"the operator activates rule version {version}")
        message = RulesActivated(version)
        payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
        while True:
            try:
                await self._bus.ledger.append(self._subjects.fact("cell", kind_of(message)), payload)
                return
            except BusError as error:
                self._note(f"the operator is told {error}")
            await asyncio.sleep(PAUSE_SECONDS)
