"""The in-memory log against a model so simple that it is right: a list. Hypothesis chooses what happens."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.contract import Appended, LogChanged, LogFull, NoAnswer, Reader, WrongLastSequence
from bus.memory import MemoryBus, MemoryServer
from bus.memory_faults import FINE, AppendFate, NoFaults
from bus.memory_stream import DEDUPE_SECONDS, stored_size
from chaos.virtual_time import VirtualLoop

SUBJECTS = ["longshore.main.fact.a.x", "longshore.main.fact.b.x", "longshore.main.said.a.b.y"]
FILTERS = {"": SUBJECTS, "longshore.main.fact.>": SUBJECTS[:2], "longshore.main.*.a.>": [SUBJECTS[0], SUBJECTS[2]]}
LIMIT = 2000


class OneFate(NoFaults):
    fate = FINE

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        return self.fate


class LogMachine(RuleBasedStateMachine):
    """`stored` is the model: (subject, payload) by sequence. Every reader must yield what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.stored: list[tuple[str, bytes]] = []
        self.ids: dict[str, tuple[int, float]] = {}
        self.readers: list[tuple[Reader, list[str], int]] = []
        self.counter = 0

    @initialize()
    def begin(self) -> None:
        async def make() -> None:
            self.server = MemoryServer("main", ledger_limit_bytes=LIMIT)
            self.faults = OneFate()
            self.writer: MemoryBus = self.server.bus("writer", faults=self.faults)
            self.reading: MemoryBus = self.server.bus("reader")

        self.loop.run_until_complete(make())

    def teardown(self) -> None:
        self.loop.close()

    @rule(
        subject=st.sampled_from(SUBJECTS),
        size=st.integers(0, 60),
        message_id=st.sampled_from(["", "", "i1", "i2"]),
        expect=st.sampled_from([None, None, "right", "zero", "outdated"]),
        lost=st.sampled_from(["", "", "", "acknowledgement", "message"]),
    )
    def append(self, subject: str, size: int, message_id: str, expect: str | None, lost: str) -> None:
        self.counter += 1
        payload = (b"%d." % self.counter).ljust(size, b".")
        numbers = [n for n, (s, _) in enumerate(self.stored, 1) if s == subject]
        last = numbers[-1] if numbers else 0
        expected = {None: None, "right": last, "zero": 0, "outdated": last + 1}[expect]
        self.faults.fate = replace(FINE, stored=lost != "message", acknowledged=lost != "acknowledgement")

        outcome: object
        known = self.ids.get(message_id)
        header_bytes = 0
        if message_id:
            header_bytes += len(f"Nats-Msg-Id: {message_id}\r\n")
        if expected is not None:
            header_bytes += len(f"Nats-Expected-Last-Subject-Sequence: {expected}\r\n")
        header_bytes += len("NATS/1.0\r\n\r\n") if header_bytes else 0
        size = stored_size(subject, header_bytes, payload)
        if lost == "message":
            outcome = NoAnswer
        elif expected not in (None, last):
            outcome = WrongLastSequence
        elif message_id and known is not None and known[1] > self.loop.time():
            outcome = Appended(known[0], True)
        elif self.used + size > LIMIT:
            outcome = LogFull
        else:
            self.used += size
            self.stored.append((subject, payload))
            outcome = Appended(len(self.stored), False)
            if message_id:
                self.ids[message_id] = (len(self.stored), self.loop.time() + DEDUPE_SECONDS)
        if lost == "acknowledgement":
            outcome = NoAnswer

        async def append() -> object:
            try:
                return await self.writer.ledger.append(subject, payload, message_id=message_id, expected_last=expected)
            except (NoAnswer, WrongLastSequence, LogFull) as error:
                return type(error)

        assert self.loop.run_until_complete(append()) == outcome

    used = 0

    @rule(pattern=st.sampled_from(sorted(FILTERS)), back=st.integers(0, 5))
    def open(self, pattern: str, back: int) -> None:
        if not self.reading.connected:
            return
        start = max(1, len(self.stored) + 1 - back)
        reader = self.loop.run_until_complete(self.reading.ledger.read([pattern] if pattern else [], start=start))
        self.readers.append((reader, FILTERS[pattern], start - 1))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), limit=st.integers(1, 5))
    def read(self, data: st.DataObject, limit: int) -> None:
        number = data.draw(st.integers(0, len(self.readers) - 1))
        reader, subjects, position = self.readers[number]
        wanted = [n for n in range(position + 1, len(self.stored) + 1) if self.stored[n - 1][0] in subjects]

        async def batch() -> list[tuple[int, str, bytes]]:
            try:
                async with asyncio.timeout(1):
                    return [(r.sequence, r.subject, r.payload) for r in await reader.batch(limit)]
            except TimeoutError:
                return []

        got = self.loop.run_until_complete(batch())
        expected = [(n, *self.stored[n - 1]) for n in wanted[:limit]]
        if self.reading.connected:
            assert got == expected
        else:
            assert got == expected[: len(got)]
        if got:
            self.readers[number] = (reader, subjects, got[-1][0])

    @rule()
    def cut(self) -> None:
        async def cut() -> None:
            self.server.cut(self.reading)

        self.loop.run_until_complete(cut())

    @rule()
    def heal(self) -> None:
        async def heal() -> None:
            self.server.heal(self.reading)

        self.loop.run_until_complete(heal())

    @rule(seconds=st.sampled_from([1, 100, 121]))
    def wait(self, seconds: int) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @rule()
    def recreate(self) -> None:
        async def recreate() -> None:
            self.server.heal(self.reading)
            await asyncio.sleep(1)
            self.server.ledger.recreate()
            for reader, subjects, position in self.readers:
                # Whoever stands behind a record that was there must hear of it.
                taken = [
                    n for n in range(1, len(self.stored) + 1) if n > position and self.stored[n - 1][0] in subjects
                ]
                if position or taken:
                    try:
                        async with asyncio.timeout(1):
                            await reader.batch()
                        raise AssertionError("a reader went on in another stream")
                    except LogChanged:
                        pass
                await reader.close()

        self.loop.run_until_complete(recreate())
        self.stored.clear()
        self.ids.clear()
        self.readers.clear()
        self.used = 0

    @invariant()
    def usage_agrees(self) -> None:
        if not hasattr(self, "server"):
            return
        usage = self.loop.run_until_complete(self.writer.ledger.usage())
        assert (usage.messages, usage.last_sequence, usage.stored_bytes) == (
            len(self.stored),
            len(self.stored),
            self.used,
        )


TestLog = LogMachine.TestCase
TestLog.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
