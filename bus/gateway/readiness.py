"""Whether a gateway can serve: the NATS server is there, and a control of the cell answers."""

from __future__ import annotations

import asyncio

from bus.answer import RequestFailed
from bus.client import Client
from bus.contract import Bus

FRESH_SECONDS = 1.0


class Readiness:
    """Asks the cell at most once a second, whoever wants to know. `stopping` is set by whoever ends the gateway."""

    def __init__(self, bus: Bus, client: Client) -> None:
        self._bus = bus
        self._client = client
        self._asking = asyncio.Lock()
        self._asked_at = float("-inf")
        self._reason = ""
        self.stopping = False

    async def why_not(self) -> str:
        """One sentence, empty where it can serve."""
        if not self._bus.connected:
            return "the connection to the NATS server is down"
        now = asyncio.get_running_loop().time
        async with self._asking:
            if now() - self._asked_at > FRESH_SECONDS:
                self._reason = await self._ask()
                self._asked_at = now()
        return self._reason

    async def _ask(self) -> str:
        try:
            status = await self._client.status()
        except RequestFailed as failure:
            return failure.message
        return "" if status.get("live") else "the control that answered is still reading the ledger"
