"""Asking the cell to drain a server, or to take it back, and hearing what became of it."""

from __future__ import annotations

import asyncio
import re

import msgspec

from bus.contract import Bus
from bus.errors import UserError
from bus.messages import DrainRequested, FactEnvelope, ServerDrained, decode_said, decode_said_body, encode, kind_of
from bus.subjects import Subjects

PATIENCE_SECONDS = 10.0
"""For control to say so, beyond the deadline."""

_TIME = re.compile(r"(\d{1,6})(ms|s|m)?")
_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000}


def parse_time(text: str, option: str) -> int:
    """Milliseconds. Raises `UserError`."""
    time = _TIME.fullmatch(text)
    if time is None:
        raise UserError(f"{option} {text!r} is no time: write 500ms, 30s or 5m")
    return int(time[1]) * _MILLISECONDS[time[2] or "s"]


async def order(bus: Bus, subjects: Subjects, message: DrainRequested) -> int:
    """State the fact; its ledger sequence."""
    payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
    return (await bus.ledger.append(subjects.fact("placement", kind_of(message)), payload)).sequence


async def until_told(bus: Bus, subjects: Subjects, server: str, fact: int, deadline_ms: int) -> ServerDrained:
    """What control says of a drain that was asked for at `fact`. Raises `TimeoutError` where it says nothing."""
    subject = subjects.said("placement", f"node/{server}", "server.drained")
    reader = await bus.ledger.read([subject], start=fact)
    try:
        async with asyncio.timeout(deadline_ms / 1000 + PATIENCE_SECONDS):
            while True:
                for record in await reader.batch():
                    found = decode_said_body(decode_said(record.payload).body)
                    if isinstance(found, ServerDrained):
                        return found
    finally:
        await reader.close()
