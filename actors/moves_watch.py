"""What became of the moves that one fact asked for, as the ledger tells it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from bus.contract import Bus
from bus.messages import MoveDescribed, MoveEnded, SaidEnvelope, decode_said, decode_said_body
from bus.subjects import FactSubject, Subjects


async def watch_moves(bus: Bus, subjects: Subjects, fact: int) -> AsyncIterator[MoveEnded]:
    """The end of every move that `fact` led to, as they come; ends with the last one."""
    reader = await bus.ledger.read(start=fact)
    expected: dict[str, bool] = {}
    seen: set[tuple[int, int]] = set()
    heard = total = 0
    try:
        while True:
            for record in await reader.batch():
                subject = subjects.parse(record.subject)
                if subject is None or isinstance(subject, FactSubject):
                    continue
                envelope: SaidEnvelope = decode_said(record.payload)
                if (envelope.fact, envelope.index) in seen or envelope.fact < fact:
                    continue
                seen.add((envelope.fact, envelope.index))
                if envelope.fact == fact:
                    heard, total = heard + 1, envelope.of
                if not subject.kind.startswith("move."):
                    continue
                message = decode_said_body(envelope.body)
                if isinstance(message, MoveDescribed) and envelope.fact == fact:
                    expected[message.request] = True
                elif isinstance(message, MoveEnded) and (envelope.fact == fact or message.request in expected):
                    expected.pop(message.request, None)
                    yield message
            if total and heard == total and not expected:
                return
    finally:
        await reader.close()
