"""A simulated operator: takes models out of the cell while they are in use, and brings them back, packed anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from random import Random

import msgspec

from bus.answer import RequestFailed
from bus.client import Client
from bus.contract import Bus
from chaos.machines import SimulatedStorage
from chaos.options import Options

PAUSE_SECONDS = 0.3


class Operator:
    """`removed`: models that were out of the cell at some time."""

    def __init__(self, random: Random, options: Options, bus: Bus, cell: str, note: Callable[[str], None]) -> None:
        self.removed: dict[str, bool] = {}
        self.done = not options.removals
        self._random = random
        self._options = options
        self._client = Client(bus, cell, name="operator")
        self._note = note

    async def run(self, storages: Iterable[SimulatedStorage]) -> None:
        """All removals of this world, one after the other."""
        random, kept = self._random, list(storages)
        for _ in range(self._options.removals):
            await asyncio.sleep(random.uniform(0.5, self._options.fault_seconds / 2))
            card = random.choice(self._options.models)
            self.removed[card.model] = True
            self._note(f"the operator removes {card.model}")
            await self._insist(self._client.remove_model, card.model)
            await asyncio.sleep(random.uniform(0.1, 1.5))
            if random.random() < 0.5:
                card = msgspec.structs.replace(card, digest=f"{card.digest}-again")
            for storage in kept:
                storage.pack(card)
            self._note(f"the operator adds {card.model} with {card.digest}")
            await self._insist(self._client.add_model, card.model)
        # A deletion that was under way may have taken what was packed anew, and a control that is behind does not know.
        seen = 0
        while self._options.removals and seen < 3:
            if await self._all_there():
                seen += 1
            else:
                seen = 0
                for model in self.removed:
                    for storage in kept:
                        storage.pack(next(card for card in self._options.models if card.model == model))
                    await self._insist(self._client.add_model, model)
            await asyncio.sleep(1.5)
        self.done = True

    async def _all_there(self) -> bool:
        try:
            models = await self._client.models()
        except RequestFailed:
            return False
        held = {one["model"] for one in models if not one["removed"] and one["servers"]}
        return all(model in held for model in self.removed)

    async def _insist(self, ask: Callable[[str], Awaitable[object]], model: str) -> None:
        while True:
            try:
                await ask(model)
                return
            except RequestFailed as failure:
                self._note(f"the operator is told {failure.code}: {failure}")
                if failure.code == "unknown_model":
                    return
            await asyncio.sleep(PAUSE_SECONDS)
