"""Dead letters and what the ledger tells of how they came to be."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from bus.contract import Bus, Record
from bus.messages import (
    Death,
    DriverLost,
    RequestQuarantined,
    SealTokens,
    decode_said,
    decode_said_body,
)
from bus.sentences import Event, read_event
from bus.subjects import Subjects

TOLD_KINDS = ("request.accepted", "request.placed", "sequence.run", "heir.go-on", "tokens.seal", "sequence.failed",
              "sequence.ended", "sequence.rejected", "request.ended", "request.quarantined")  # fmt: skip
"""What is told of a request beside the deaths of its workers."""


async def _records(bus: Bus, filters: list[str], start: int, last: int) -> AsyncIterator[Record]:
    """All records that match, from `start` to `last`, which is one of them."""
    reader = await bus.ledger.read(filters, start=start)
    try:
        while True:
            for record in await reader.batch():
                yield record
                if record.sequence >= last:
                    return
    finally:
        await reader.close()


async def dead_letters(bus: Bus, subjects: Subjects) -> AsyncIterator[tuple[int, RequestQuarantined]]:
    """Every dead letter of the ledger with its sequence, the oldest first; a letter that was said twice comes once."""
    subject = subjects.dead_letters()
    last = await bus.ledger.last(subject)
    if last is None:
        return
    seen: dict[tuple[int, int], bool] = {}
    async for record in _records(bus, [subject], 1, last.sequence):
        envelope = decode_said(record.payload)
        letter = decode_said_body(envelope.body)
        if isinstance(letter, RequestQuarantined) and (envelope.fact, envelope.index) not in seen:
            seen[envelope.fact, envelope.index] = True
            yield record.sequence, letter


async def history(bus: Bus, subjects: Subjects, letter: RequestQuarantined, at: int) -> tuple[list[Death], list[Event]]:
    """The deaths of a letter with all epochs that the ledger tells, and the records that led to them."""
    mark = letter.request.encode()
    epochs = {death.attempt: death.epoch for death in letter.deaths}
    workers = {death.worker for death in letter.deaths}
    events: dict[int, Event] = {}
    lost: list[tuple[DriverLost, Event]] = []
    sealed: set[tuple[str, int]] = set()
    async for record in _records(bus, [], max(1, letter.accepted), at):
        if mark not in record.payload and b'"driver.lost"' not in record.payload:
            continue
        event = read_event(subjects, record)
        message = event.message
        if isinstance(message, DriverLost):
            if message.driver in workers:
                lost.append((message, event))
        elif event.kind in TOLD_KINDS:
            events[event.sequence] = event
        if isinstance(message, SealTokens):
            for sequence in message.sequences:
                name, _, attempt = sequence.rpartition("/")
                if name == letter.request and attempt.isdigit():
                    sealed.add((message.worker, message.epoch))
                    epochs[int(attempt)] = message.epoch
    for fact, event in lost:
        if (fact.driver, fact.epoch) in sealed:
            events[event.sequence] = event
    deaths = [msgspec.structs.replace(death, epoch=epochs[death.attempt]) for death in letter.deaths]
    return deaths, [events[sequence] for sequence in sorted(events)]
