"""Recovery of a closed epoch: seal its token subject, read what it holds, state it.

The seal is an append like the pages of the worker, under the same expected sequence: one of the two wins, and after the
seal the worker's next page is refused. What stands before the seal is durable and final; nothing else is.
"""

from __future__ import annotations

import asyncio

import msgspec

from bus.contract import Bus, NoAnswer, WrongLastSequence
from bus.messages import FactEnvelope, SealedSequence, SealTokens, SequencesSealed, encode, kind_of
from bus.pages import Page, Seal, decode_page, encode_page
from bus.subjects import Subjects

PART_BYTES = 500_000
"""A statement is split so that each part stays well below the largest message."""


async def seal(bus: Bus, subjects: Subjects, order: SealTokens, me: str) -> None:
    """Seal, read, state. May be done by several processes at once and repeated: the outcome is the same.

    Raises `BusError` where the bus does not answer; then it is to be repeated.
    """
    worker, epoch = order.worker, order.epoch
    subject = subjects.tokens(worker, epoch)
    end = await _append_seal(bus, subject, me)
    sequences = await _read(bus, subject, end, order)
    parts = _parts(sequences)
    for number, part in enumerate(parts):
        sealed = SequencesSealed(worker, epoch, tuple(part), number, len(parts))
        await bus.ledger.append(
            subjects.fact(worker, kind_of(sealed)),
            encode(FactEnvelope("sealer", msgspec.Raw(encode(sealed)))),
            message_id=f"fact.sealer.{worker}.{epoch}.{number}",
            publisher=me,
        )


async def _append_seal(bus: Bus, subject: str, me: str) -> int:
    """The sequence of the seal that closes the subject, ours or an earlier one."""
    while True:
        last = await bus.tokens.last(subject)
        if last is not None and _is_seal(last.payload):
            return last.sequence
        try:
            appended = await bus.tokens.append(
                subject,
                encode_page(Seal(True, me)),
                expected_last=last.sequence if last is not None else 0,
                publisher=me,
            )
        except (WrongLastSequence, NoAnswer):
            # A page came in between, or the answer got lost: look again.
            continue
        return appended.sequence


async def _read(bus: Bus, subject: str, end: int, order: SealTokens) -> list[SealedSequence]:
    """Every wanted attempt that has pages before the seal, in order of its first page."""
    wanted = dict.fromkeys(order.sequences)
    found: dict[tuple[str, int], SealedSequence] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    reader = await bus.tokens.read([subject], start=order.after + 1)
    try:
        at = 0
        while at < end:
            for record in await asyncio.wait_for(reader.batch(), 5.0):
                at = record.sequence
                page = _page(record.payload) if at < end else None
                for sequence in page.sequences if page is not None else ():
                    key = (sequence.request, sequence.attempt)
                    if f"{key[0]}/{key[1]}" not in wanted:
                        continue
                    known = found.get(key)
                    first = sequence.position if known is None else known.first
                    tokens.setdefault(key, []).extend(sequence.tokens)
                    found[key] = SealedSequence(
                        request=sequence.request,
                        attempt=sequence.attempt,
                        first=first,
                        tokens=(),
                        first_page=record.sequence if known is None else known.first_page,
                        last_page=record.sequence,
                        end=sequence.end if sequence.end != "failed" else "",
                        prompt_tokens=sequence.prompt_tokens or (known.prompt_tokens if known is not None else 0),
                    )
    except TimeoutError:
        raise NoAnswer(f"the pages of {subject} could not be read up to the seal at {end}") from None
    finally:
        await reader.close()
    return [msgspec.structs.replace(sealed, tokens=tuple(tokens[key])) for key, sealed in found.items()]


def _parts(sequences: list[SealedSequence]) -> list[list[SealedSequence]]:
    parts: list[list[SealedSequence]] = [[]]
    size = 0
    for sequence in sequences:
        weight = len(encode(sequence))
        if parts[-1] and size + weight > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(sequence)
        size += weight
    return parts


def _page(payload: bytes) -> Page | None:
    """None for what is no page: no worker wrote that, and the worker that met it there has stopped."""
    try:
        page = decode_page(payload)
    except ValueError:
        return None
    return page if isinstance(page, Page) else None


def _is_seal(payload: bytes) -> bool:
    try:
        return isinstance(decode_page(payload), Seal)
    except ValueError:
        return False
