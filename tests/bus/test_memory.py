"""What only the in-memory bus has: injected faults, simulated deaths, virtual time, the same run twice."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from bus.contract import Appended, BusError, NoAnswer, Record
from bus.memory import EPOCH_NS, MemoryServer
from bus.memory_faults import FINE, AppendFate, NoFaults
from chaos.virtual_time import run as run_virtual

ROOT = Path(__file__).parents[2]


class Scripted(NoFaults):
    """Faults by number of the append, by sequence of the delivery, by number of the core message."""

    def __init__(
        self,
        appends: dict[int, AppendFate] | None = None,
        deliveries: dict[int, float] | None = None,
        core: dict[int, float | None] | None = None,
    ) -> None:
        self.appends = appends or {}
        self.deliveries = deliveries or {}
        self.cores = core or {}
        self.appended = self.published = 0

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        self.appended += 1
        return self.appends.get(self.appended, FINE)

    def deliver(self, log: str, record: Record) -> float:
        return self.deliveries.get(record.sequence, 0.0)

    def core(self, subject: str) -> float | None:
        self.published += 1
        return self.cores.get(self.published, 0.0)


def test_fates_of_an_append() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = MemoryServer("main")
        fates = {
            1: AppendFate(delay=3.0),
            3: AppendFate(acknowledged=False),
            4: AppendFate(stored=False),
            5: AppendFate(repeated=True),
            6: AppendFate(acknowledgement_delay=7.0),
        }
        bus = server.bus("driver", faults=Scripted(fates))
        subject = server.subjects.fact("gpu/s1/0", "done")
        sent = [bus.ledger.send(subject, b"%d" % i, message_id=f"id.{i}") for i in range(1, 7)]
        # The second was sent behind the first, and comes in behind it.
        assert await sent[1] == Appended(2, False)
        assert loop.time() == 3.0
        assert await sent[0] == Appended(1, False)
        with pytest.raises(NoAnswer, match="within 5 s"):
            await sent[2]
        with pytest.raises(NoAnswer):
            await sent[3]
        assert loop.time() == 5.0
        assert await sent[4] == Appended(4, False)
        with pytest.raises(NoAnswer):  # the answer would have come after the time-out
            await sent[5]
        assert [record.payload for record in server.ledger.since(1)] == [b"1", b"2", b"3", b"5", b"5", b"6"]
        assert await bus.ledger.append(subject, b"3", message_id="id.3") == Appended(3, True)
        assert await bus.ledger.append(subject, b"4", message_id="id.4") == Appended(7, False)

    run_virtual(main())


def test_the_dedupe_window_forgets() -> None:
    async def main() -> None:
        server = MemoryServer("main")
        bus = server.bus("driver")
        subject = server.subjects.fact("requests", "accepted")
        await bus.ledger.append(subject, b"", message_id="a")
        await asyncio.sleep(119)
        assert await bus.ledger.append(subject, b"", message_id="a") == Appended(1, True)
        await asyncio.sleep(2)
        assert await bus.ledger.append(subject, b"", message_id="a") == Appended(2, False)

    run_virtual(main())


def test_tokens_expire_and_readers_go_on() -> None:
    async def main() -> None:
        server = MemoryServer("main", result_retention_seconds=60)
        bus = server.bus("reader")
        subject = server.subjects.tokens("gpu/s1/0", 1)
        for i in range(10):
            await bus.tokens.append(subject, b"%d" % i)
            await asyncio.sleep(10)
        usage = await bus.tokens.usage()
        assert (usage.first_sequence, usage.last_sequence, usage.messages) == (6, 10, 5)
        assert await bus.tokens.get(5) is None
        reader = await bus.tokens.read()
        assert [record.sequence for record in await reader.batch()] == [6, 7, 8, 9, 10]
        await asyncio.sleep(1000)
        server.outage(1.0)
        await asyncio.sleep(2)
        assert (await bus.tokens.append(subject, b"new")).sequence == 11
        assert [record.sequence for record in await reader.batch()] == [11]

    run_virtual(main())


def test_deliveries_are_late_in_order_and_for_one_reader_only() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = MemoryServer("main")
        slow, quick = server.bus("slow", faults=Scripted(deliveries={2: 5.0})), server.bus("quick")
        readers = [await slow.ledger.read(), await quick.ledger.read()]
        subject = server.subjects.fact("requests", "accepted")
        for i in range(3):
            await quick.ledger.append(subject, b"%d" % i)
        assert [record.sequence for record in await readers[1].batch()] == [1, 2, 3]
        assert [record.sequence for record in await readers[0].batch()] == [1]
        assert loop.time() == 0.0
        assert [record.sequence for record in await readers[0].batch()] == [2, 3]
        assert loop.time() == 5.0

    run_virtual(main())


def test_core_messages_are_lost_and_late() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = MemoryServer("main")
        bus = server.bus("one", faults=Scripted(core={1: None, 2: 4.0}))
        subscription = await server.bus("two").subscribe("heartbeat.*")
        for i in range(3):
            await bus.publish("heartbeat.a", b"%d" % i)
        assert (await subscription.next()).payload == b"1"
        assert loop.time() == 4.0
        assert (await subscription.next()).payload == b"2"

    run_virtual(main())


def test_a_killed_process_neither_speaks_nor_hears() -> None:
    async def main() -> None:
        server = MemoryServer("main")
        victim, witness = server.bus("victim", faults=Scripted({2: AppendFate(delay=1.0)})), server.bus("witness")
        subject = server.subjects.fact("requests", "accepted")
        subscription = await victim.subscribe("news")
        reader = await victim.ledger.read()
        await victim.ledger.append(subject, b"1")
        in_flight = victim.ledger.send(subject, b"2")
        waiting = [
            asyncio.ensure_future(coroutine)
            for coroutine in (
                subscription.next(),
                victim.request("news", b"", timeout=1.0),
                victim.ledger.get(1),
            )
        ]
        server.kill(victim)
        await witness.publish("news", b"")
        waiting += [asyncio.ensure_future(victim.ledger.append(subject, b"3")), asyncio.ensure_future(victim.close())]
        await victim.publish("news", b"from the dead")
        await asyncio.sleep(100)
        assert not in_flight.done() and not any(task.done() for task in waiting)
        assert (await witness.ledger.usage()).messages == 1
        assert server.ledger._watchers == {} and server._interests == {}
        for task in waiting:
            task.cancel()
        del reader

    run_virtual(main())


def test_an_observer_kills_at_a_message() -> None:
    async def main() -> None:
        server = MemoryServer("main")
        victim, witness = server.bus("victim"), server.bus("witness")
        reader = await witness.ledger.read()
        subject = server.subjects.fact("requests", "accepted")

        def observe(log: str, record: Record) -> None:
            assert log == "ledger"
            if record.sequence == 3:
                server.kill(victim)

        server.observe(observe)
        sent = [victim.ledger.send(subject, b"%d" % i) for i in range(5)]
        await asyncio.sleep(10)
        # The third is stored, and nobody learns of it but who reads; the fourth never arrived.
        assert [record.sequence for record in await reader.batch()] == [1, 2, 3]
        assert not any(future.done() for future in sent)

    run_virtual(main())


def test_an_outage_heals() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = MemoryServer("main")
        one, two = server.bus("one"), server.bus("two")
        subject = server.subjects.fact("requests", "accepted")
        server.outage(3.0, one)
        assert not one.connected and two.connected
        reading = asyncio.ensure_future(one.ledger.read())
        with pytest.raises(NoAnswer, match="no connection"):
            await one.ledger.append(subject, b"")
        with pytest.raises(NoAnswer):
            await one.ledger.usage()
        await two.ledger.append(subject, b"")
        assert [record.sequence for record in await (await reading).batch()] == [1]
        assert loop.time() >= 3.0 and one.connections == 2
        server.outage(1.0)
        assert not one.connected and not two.connected

    run_virtual(main())


def test_a_truncated_log_has_changed_only_for_those_who_read_on() -> None:
    async def main() -> None:
        server = MemoryServer("main")
        bus = server.bus("one")
        subject = server.subjects.fact("requests", "accepted")
        for i in range(4):
            await bus.ledger.append(subject, b"%d" % i)
        far, near = await bus.ledger.read(), await bus.ledger.read(start=3)
        await far.batch()
        await asyncio.sleep(0)
        fresh = await bus.ledger.read(start=2)
        server.ledger.truncate(3)
        with pytest.raises(BusError, match="read up to 4"):
            await far.batch()
        assert (await bus.ledger.append(subject, b"new")).sequence == 4
        assert [record.payload for record in await fresh.batch()] == [b"1", b"2", b"new"]
        del near

    run_virtual(main())


def test_time_is_the_loops() -> None:
    async def main() -> None:
        server = MemoryServer("main")
        bus, ahead = server.bus("one"), server.bus("two", clock_offset_ns=5_000_000_000)
        await asyncio.sleep(86_400)
        assert bus.wall() == EPOCH_NS + 86_400_000_000_000
        assert ahead.wall() - bus.wall() == 5_000_000_000
        await bus.ledger.append(server.subjects.fact("requests", "accepted"), b"")
        record = await bus.ledger.get(1)
        assert record is not None and record.timestamp == bus.wall()

    run_virtual(main())


def noisy_run(seed: int) -> str:
    """A digest of a run with every fault there is."""
    random = Random(seed)

    class Noise(NoFaults):
        def append(self, log: str, subject: str, message_id: str) -> AppendFate:
            return AppendFate(
                delay=random.choice([0.0, 0.0, 0.01, 0.5]),
                stored=random.random() > 0.05,
                acknowledged=random.random() > 0.05,
                acknowledgement_delay=random.choice([0.0, 0.02]),
                repeated=random.random() < 0.05,
            )

        def deliver(self, log: str, record: Record) -> float:
            return random.choice([0.0, 0.001, 0.3])

        def core(self, subject: str) -> float | None:
            return random.choice([0.0, 0.1, None])

    async def main() -> str:
        server = MemoryServer("main")
        digest = hashlib.sha256()
        subject = server.subjects.fact("requests", "accepted")
        buses = [server.bus(f"p{i}", faults=Noise()) for i in range(3)]

        async def write(number: int) -> None:
            for i in range(60):
                while True:
                    try:
                        await buses[number].ledger.append(subject, b"%d.%d" % (number, i), message_id=f"{number}.{i}")
                        break
                    except NoAnswer:
                        continue
                await buses[number].publish("news", b"%d" % i)

        async def read(number: int) -> None:
            reader = await buses[number].ledger.read()
            while True:
                for record in await reader.batch():
                    digest.update(repr((number, asyncio.get_running_loop().time(), record)).encode())

        async def listen() -> None:
            subscription = await buses[0].subscribe("news")
            while True:
                digest.update((await subscription.next()).payload)

        background = [asyncio.ensure_future(read(i)) for i in range(3)] + [asyncio.ensure_future(listen())]
        for at in (1.0, 2.5, 4.0):
            asyncio.get_running_loop().call_later(at, server.outage, 0.5, random.choice(buses))
        await asyncio.gather(*(write(i) for i in range(3)))
        await asyncio.sleep(10)
        for task in background:
            task.cancel()
        seen = {record.payload for record in server.ledger.since(1)}
        assert len(seen) == 180
        return digest.hexdigest()

    result: str = run_virtual(main())
    return result


def test_the_same_run_twice_in_processes_with_other_hashes() -> None:
    digests = set()
    for seed in ("0", "1", "2"):
        program = "import test_memory; print(test_memory.noisy_run(7))"
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "support")])
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        digests.add(result.stdout.strip())
    assert len(digests) == 1 and len(digests.pop()) == 64
    assert noisy_run(7) != noisy_run(8)
