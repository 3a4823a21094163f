"""How a node learns that it was drained and may end."""

from __future__ import annotations

from bus.contract import Bus
from bus.messages import ServerDrained, decode_said, decode_said_body
from bus.subjects import Subjects


async def until_drained(bus: Bus, subjects: Subjects, server: str) -> None:
    """Until the ledger says, from now on, that this server is drained and its process is to end."""
    start = (await bus.ledger.usage()).last_sequence + 1
    reader = await bus.ledger.read([subjects.said("placement", f"node/{server}", "server.drained")], start=start)
    try:
        while True:
            for record in await reader.batch():
                told = decode_said_body(decode_said(record.payload).body)
                if isinstance(told, ServerDrained) and told.leave:
                    return
    finally:
        await reader.close()
