"""What stands in a log now, read once from a position to its end."""

from __future__ import annotations

from bus.contract import Log, Record


async def read_to_end(log: Log, start: int = 1) -> list[Record]:
    """All records from `start` on, up to the last one as it is at the call. Raises `BusError`."""
    last = (await log.usage()).last_sequence
    if last < start:
        return []
    found: list[Record] = []
    reader = await log.read(start=start)
    try:
        while not found or found[-1].sequence < last:
            found += await reader.batch()
    finally:
        await reader.close()
    return found
