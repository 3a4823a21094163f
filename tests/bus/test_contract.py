"""The contract of `bus.contract`, once, against every implementation.

What the memory one forgives the real one must forgive, and the other way round; a simulated failure is worth something
only as long as this holds.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from bus_worlds import World, read_up_to, until

from bus.contract import Appended, BusError, LogChanged, LogFull, NoAnswer, NoResponders, WrongLastSequence

# appending and reading


async def test_appends_of_one_caller_keep_their_order(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        futures = [bus.ledger.send(subject, b"%d" % i, publisher="boot-1") for i in range(3000)]
        answers = await asyncio.gather(*futures)
        assert [a.sequence for a in answers] == list(range(1, 3001))
        assert not any(a.duplicate for a in answers)
        records = await read_up_to(await bus.ledger.read(), 3000)
        assert [r.sequence for r in records] == list(range(1, 3001))
        assert [r.payload for r in records] == [b"%d" % i for i in range(3000)]
        assert {r.subject for r in records} == {subject}
        assert {r.publisher for r in records} == {"boot-1"}
        assert [r.timestamp for r in records] == sorted(r.timestamp for r in records)
        assert abs(records[0].timestamp - bus.wall()) < 60e9
        assert [r.pending for r in records] == list(range(2999, -1, -1))


async def test_a_reader_sees_what_comes_later(world: World) -> None:
    async with world.running():
        writer, other = await world.bus(), await world.bus()
        reader = await other.ledger.read()
        subject = world.subjects.fact("requests", "accepted")
        for i in range(20):
            await writer.ledger.append(subject, b"%d" % i)
            (record,) = await reader.batch()
            assert (record.sequence, record.payload, record.pending) == (i + 1, b"%d" % i, 0)


async def test_batches_are_bounded(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        await asyncio.gather(*(bus.ledger.send(subject, b"") for _ in range(100)))
        reader = await bus.ledger.read()
        seen = []
        while len(seen) < 100:
            batch = await reader.batch(7)
            assert 1 <= len(batch) <= 7
            seen += [r.sequence for r in batch]
        assert seen == list(range(1, 101))


async def test_filters_and_start(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        names = world.subjects
        subjects = [
            names.fact("requests", "accepted"),
            names.said("requests", "placement", "wanted"),
            names.said("placement", "gpu/s1/0", "model.load"),
            names.said("placement", "gpu/s1/1", "model.load"),
            names.fact("gpu/s1/0", "sequence.finished"),
        ]
        for i in range(50):
            await bus.ledger.append(subjects[i % 5], b"%d" % i)

        async def seen(filters: list[str], start: int, last: int) -> list[int]:
            reader = await bus.ledger.read(filters, start=start)
            records = await read_up_to(reader, last)
            await reader.close()
            assert records[-1].pending == 0
            return [r.sequence for r in records]

        def expected(residues: set[int], start: int) -> list[int]:
            return [n for n in range(start, 51) if (n - 1) % 5 in residues]

        assert await seen([names.facts()], 1, 50) == expected({0, 4}, 1)
        assert await seen([names.said_to("gpu/s1/0")], 1, 48) == expected({2}, 1)
        assert await seen([names.said_to("gpu/s1/0"), names.facts_of("gpu/s1/0")], 11, 50) == expected({2, 4}, 11)
        assert await seen([], 49, 50) == [49, 50]
        assert await seen([subjects[1]], 5, 47) == expected({1}, 5)


async def test_a_start_beyond_the_end_waits_for_it(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        await bus.ledger.append(subject, b"1")
        reader = await bus.ledger.read(start=4)
        for i in range(2, 6):
            await bus.ledger.append(subject, b"%d" % i)
        records = await read_up_to(reader, 5)
        assert [r.sequence for r in records] == [4, 5]


async def test_cancelled_batches_lose_nothing(world: World) -> None:
    async with world.running():
        writer, other = await world.bus(), await world.bus()
        reader = await other.ledger.read()
        subject = world.subjects.fact("requests", "accepted")
        appends = [writer.ledger.send(subject, b"") for _ in range(500)]
        seen: list[int] = []
        while len(seen) < 500:
            task = asyncio.ensure_future(reader.batch(3))
            for _ in range(len(seen) % 4):
                await asyncio.sleep(0)
            if len(seen) % 2 or not task.cancel():
                seen += [r.sequence for r in await task]
            else:
                with contextlib.suppress(asyncio.CancelledError):
                    seen += [r.sequence for r in await task]
                # Whatever that one would have got, the next one gets.
                seen += [r.sequence for r in await reader.batch(3)]
        await asyncio.gather(*appends)
        assert seen == list(range(1, 501))


# message ids and expected sequences


async def test_a_repeated_message_id_is_stored_once(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        assert await bus.ledger.append(subject, b"a", message_id="fact.x.1") == Appended(1, False)
        assert await bus.ledger.append(subject, b"b", message_id="fact.x.2") == Appended(2, False)
        assert await bus.ledger.append(subject, b"a", message_id="fact.x.1") == Appended(1, True)
        other = world.subjects.fact("placement", "accepted")
        assert await bus.ledger.append(other, b"c", message_id="fact.x.2") == Appended(2, True)
        assert (await bus.ledger.usage()).messages == 2


async def test_expected_last_sequence(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.tokens("gpu/s1/0", 1)
        with pytest.raises(WrongLastSequence):
            await bus.tokens.append(subject, b"page", expected_last=3)
        assert (await bus.tokens.append(subject, b"page", expected_last=0)).sequence == 1
        with pytest.raises(WrongLastSequence):
            await bus.tokens.append(subject, b"page", expected_last=0)
        await bus.tokens.append(world.subjects.tokens("gpu/s1/1", 1), b"other", expected_last=0)
        assert (await bus.tokens.append(subject, b"page", expected_last=1)).sequence == 3
        with pytest.raises(WrongLastSequence):
            await bus.tokens.append(subject, b"page", expected_last=1)
        # A repetition under the same message id is refused as well: it is for the caller to look what stands there.
        assert (await bus.tokens.append(subject, b"page", expected_last=3, message_id="page.1")).sequence == 4
        with pytest.raises(WrongLastSequence):
            await bus.tokens.append(subject, b"page", expected_last=3, message_id="page.1")
        assert (await bus.tokens.usage()).messages == 4


async def test_a_sealed_subject_stays_sealed_for_its_old_writer(world: World) -> None:
    async with world.running():
        zombie, control = await world.bus(), await world.bus()
        subject = world.subjects.tokens("gpu/s1/0", 7)
        last = (await zombie.tokens.append(subject, b"page", expected_last=0)).sequence
        await control.tokens.append(subject, b"SEAL")
        for _ in range(3):
            with pytest.raises(WrongLastSequence):
                await zombie.tokens.append(subject, b"late page", expected_last=last)
        newest = await control.tokens.last(subject)
        assert newest is not None and newest.payload == b"SEAL"


# failures


async def test_a_lost_acknowledgement_is_no_answer_and_the_record_is_stored(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(ack_timeout=0.3), await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        await bus.ledger.append(subject, b"0", message_id="a.0")
        await world.deafen(bus)
        futures = [bus.ledger.send(subject, b"%d" % i, message_id=f"a.{i}") for i in range(1, 4)]
        for future in futures:
            with pytest.raises(NoAnswer):
                await future
        records = await read_up_to(await other.ledger.read(), 4)
        assert [r.payload for r in records] == [b"0", b"1", b"2", b"3"]
        await world.heal(bus)
        assert await bus.ledger.append(subject, b"2", message_id="a.2") == Appended(3, True)
        assert await bus.ledger.append(subject, b"4", message_id="a.4") == Appended(5, False)


async def test_appends_without_a_connection_get_no_answer_soon(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        assert bus.connected and bus.connections == 1
        await world.cut(bus)
        assert not bus.connected
        started = asyncio.get_running_loop().time()
        futures = [bus.ledger.send(subject, b"lost") for _ in range(3)]
        for future in futures:
            with pytest.raises(NoAnswer):
                await future
        assert 0.1 < asyncio.get_running_loop().time() - started < 3
        await world.heal(bus)
        assert bus.connected and bus.connections == 2
        assert (await bus.ledger.append(subject, b"stored")).sequence == 1


async def test_a_lost_connection_fails_what_is_in_flight_at_once(world: World) -> None:
    async with world.running():
        bus = await world.bus(ack_timeout=30)
        subject = world.subjects.fact("requests", "accepted")
        await bus.ledger.append(subject, b"")
        await world.deafen(bus)
        future = bus.ledger.send(subject, b"")
        await world.cut(bus)
        with pytest.raises(NoAnswer):
            async with asyncio.timeout(5):
                await future


async def test_reconnects_leave_no_hole_and_no_repeat(world: World) -> None:
    async with world.running():
        writer, bus = await world.bus(), await world.bus()
        reader = await bus.ledger.read([world.subjects.facts()], start=1)
        subject = world.subjects.fact("requests", "accepted")
        total = 3000
        writing = asyncio.gather(*(writer.ledger.send(subject, b"%d" % i) for i in range(total)))
        seen: list[int] = []
        for goal in (1, 700, 1500, 2500):
            while len(seen) < goal:
                seen += [r.sequence for r in await reader.batch(100)]
            before = bus.connections
            await world.cut(bus)
            await world.heal(bus)
            assert bus.connections == before + 1
        await writing
        while len(seen) < total:
            seen += [r.sequence for r in await reader.batch()]
        await writer.ledger.append(subject, b"end")
        assert seen == list(range(1, total + 1))
        assert [r.payload for r in await reader.batch()] == [b"end"]


async def test_a_ledger_that_ends_before_the_reader_has_changed(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        for i in range(5):
            await bus.ledger.append(subject, b"%d" % i)
        reader = await bus.ledger.read()
        await read_up_to(reader, 5)
        await world.cut(bus)
        await world.recreate_ledger()
        await other.ledger.append(subject, b"new")
        await world.heal(bus)
        with pytest.raises(LogChanged, match="read up to 5"):
            await reader.batch()


async def test_a_ledger_with_something_else_at_the_readers_position_has_changed(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        for i in range(3):
            await bus.ledger.append(subject, b"%d" % i)
        taken = await bus.ledger.read()
        await read_up_to(taken, 3)
        untouched = await bus.ledger.read(start=4)
        await world.cut(bus)
        await world.recreate_ledger()
        for i in range(8):
            await other.ledger.append(subject, b"%d" % i)
        await world.heal(bus)
        with pytest.raises(LogChanged, match="something else at 3"):
            await taken.batch()
        # One that had only started behind 3 stands on that record all the same.
        with pytest.raises(LogChanged, match="something else at 3"):
            await untouched.batch()


async def test_a_full_ledger_refuses_and_keeps_what_it_has(world: World) -> None:
    limit = 64 * 1024
    async with world.running(ledger_limit_bytes=limit):
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        stored = 0
        with pytest.raises(LogFull, match="full"):
            for _ in range(100):
                await bus.ledger.append(subject, b"x" * 1000)
                stored += 1
        usage = await bus.ledger.usage()
        assert usage.messages == usage.last_sequence == stored
        assert usage.limit_bytes == limit
        # 22 bytes of record, the subject, the payload, 8 bytes of checksum.
        assert usage.stored_bytes == stored * (22 + len(subject) + 1000 + 8)
        assert limit - 2000 < usage.stored_bytes <= limit
        assert len(await read_up_to(await bus.ledger.read(), stored)) == stored


async def test_too_large_a_message_is_refused(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.fact("requests", "accepted")
        with pytest.raises(BusError, match="1048577 bytes"):
            await bus.ledger.append(subject, b"x" * (1024 * 1024 + 1))
        with pytest.raises(BusError, match="over the server's limit"):
            await bus.ledger.append(subject, b"x" * (1024 * 1024), publisher="headers count")
        with pytest.raises(BusError, match="over the server's limit"):
            await bus.publish("somewhere", b"x" * (1024 * 1024 + 1))
        assert (await bus.ledger.append(subject, b"x" * (1024 * 1024))).sequence == 1


# single records


async def test_get_last_and_usage(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        one, two = world.subjects.fact("requests", "accepted"), world.subjects.fact("placement", "accepted")
        assert await bus.ledger.get(1) is None
        assert await bus.ledger.last(one) is None
        usage = await bus.ledger.usage()
        assert (usage.messages, usage.stored_bytes, usage.last_sequence) == (0, 0, 0)
        await bus.ledger.append(one, b"a", publisher="boot")
        await bus.ledger.append(two, b"b")
        await bus.ledger.append(one, b"")
        (first, *_) = await read_up_to(await bus.ledger.read(), 3)
        got = await bus.ledger.get(1)
        assert got is not None and got.pending == -1
        assert got[:5] == first[:5] == (1, first.timestamp, one, b"a", "boot")
        newest = await bus.ledger.last(one)
        assert newest is not None and (newest.sequence, newest.payload) == (3, b"")
        assert await bus.ledger.last(one + ".deeper") is None
        assert await bus.ledger.get(4) is None
        assert await bus.ledger.get(0) is None
        usage = await bus.ledger.usage()
        assert (usage.messages, usage.first_sequence, usage.last_sequence) == (3, 1, 3)


# core messages


async def test_core_messages(world: World) -> None:
    async with world.running():
        one, two = await world.bus(), await world.bus()
        everything = await one.subscribe("news.>")
        exact = await two.subscribe("news.*.now")
        await two.publish("news.a.now", b"1", reply="back", headers={"X-Kind": " spaced "})
        await two.publish("news.a.later", b"2")
        await two.publish("other", b"3")
        await two.publish("news.b.now", b"4")
        async with asyncio.timeout(5):
            first = await everything.next()
            assert (first.subject, first.payload, first.reply) == ("news.a.now", b"1", "back")
            assert first.headers == {"X-Kind": "spaced"}
            second = await everything.next()
            assert (second.subject, second.payload, second.reply, second.headers) == ("news.a.later", b"2", "", {})
            assert (await everything.next()).payload == b"4"
            assert [(await exact.next()).payload for _ in range(2)] == [b"1", b"4"]
        await everything.close()
        with pytest.raises(BusError):
            await everything.next()


async def test_requests(world: World) -> None:
    async with world.running():
        client, service = await world.bus(), await world.bus()
        with pytest.raises(NoResponders):
            await client.request("echo", b"")
        subscription = await service.subscribe("echo")

        async def answer() -> None:
            while True:
                asked = await subscription.next()
                if asked.payload != b"silence":
                    await service.publish(asked.reply, asked.payload[::-1], headers={"X-Answer": "yes"})

        answering = asyncio.create_task(answer())
        answers = await asyncio.gather(*(client.request("echo", b"%03d" % i) for i in range(50)))
        assert [a.payload for a in answers] == [(b"%03d" % i)[::-1] for i in range(50)]
        assert answers[0].headers == {"X-Answer": "yes"}
        with pytest.raises(NoAnswer):
            await client.request("echo", b"silence", timeout=0.1)
        answering.cancel()


async def test_a_queue_group_takes_each_message_once(world: World) -> None:
    async with world.running():
        client, one, two = await world.bus(), await world.bus(), await world.bus()
        members = [await one.subscribe("work", queue="crew"), await two.subscribe("work", queue="crew")]
        witness = await client.subscribe("work")
        got: list[list[bytes]] = [[], []]

        async def take(i: int) -> None:
            while True:
                got[i].append((await members[i].next()).payload)

        tasks = [asyncio.create_task(take(i)) for i in range(2)]
        for i in range(100):
            await client.publish("work", b"%d" % i)
        assert [(await witness.next()).payload for _ in range(100)] == [b"%d" % i for i in range(100)]
        await until(lambda: len(got[0]) + len(got[1]) >= 100)
        assert sorted(got[0] + got[1], key=int) == [b"%d" % i for i in range(100)]
        assert got[0] and got[1]
        for task in tasks:
            task.cancel()


async def test_a_drained_subscription_gives_what_it_was_handed_and_leaves_the_rest_to_others(world: World) -> None:
    async with world.running():
        client, one, two = await world.bus(), await world.bus(), await world.bus()
        leaving = await one.subscribe("work", queue="crew")
        staying = await two.subscribe("work", queue="crew")
        sent = 0
        drained = asyncio.ensure_future(leaving.drain())
        while not drained.done():
            await client.publish("work", b"%d" % sent)
            sent += 1
            await asyncio.sleep(0)
        for _ in range(10):
            await client.publish("work", b"%d" % sent)
            sent += 1
        got = []
        with pytest.raises(BusError):
            while True:
                got.append((await leaving.next()).payload)
        while len(got) < sent:
            async with asyncio.timeout(10):
                got.append((await staying.next()).payload)
        assert sorted(got, key=int) == [b"%d" % number for number in range(sent)]


async def test_a_subject_of_the_ledger_answers_with_its_acknowledgement(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        answer = await bus.request(world.subjects.fact("requests", "accepted"), b"by request")
        assert b'"seq"' in answer.payload
        stored = await bus.ledger.get(1)
        assert stored is not None and stored.payload == b"by request"


async def test_subscriptions_survive_an_outage_and_messages_in_it_do_not(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        subscription = await bus.subscribe("news")
        await other.publish("news", b"before")
        assert (await subscription.next()).payload == b"before"
        await world.cut(bus)
        await other.publish("news", b"during")
        await bus.publish("news", b"own, during")
        with pytest.raises(NoAnswer):
            await bus.request("news", b"", timeout=0.2)
        assert (await other.ledger.usage()).messages == 0  # the server has seen what `other` said before
        await world.heal(bus)
        await other.publish("news", b"after")
        async with asyncio.timeout(5):
            assert (await subscription.next()).payload == b"after"


async def test_closing_ends_what_waits(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        heard = await other.subscribe("last.words")
        reader = await bus.ledger.read()
        subscription = await bus.subscribe("news")
        waiting = [asyncio.ensure_future(reader.batch()), asyncio.ensure_future(subscription.next())]
        await asyncio.sleep(0)
        await bus.publish("last.words", b"bye")
        await bus.close()
        for task in waiting:
            with pytest.raises(BusError):
                async with asyncio.timeout(5):
                    await task
        assert not bus.connected
        assert (await heard.next()).payload == b"bye"


async def test_an_inbox_is_bounded_and_survives_an_outage(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        few, small = await bus.open_inbox(limit=3, limit_bytes=1000), await bus.open_inbox(limit=3, limit_bytes=10)
        for i in range(5):
            await other.publish(few.subject, b"%d" % i, headers={"Content-Type": "text"})
        for size in (50, 5, 5):  # one always finds room
            await other.publish(small.subject, b"x" * size)
        await until(lambda: few.dropped == 2 and small.dropped == 2)
        assert (few.unread, small.unread) == (3, 1)
        seen = [await few.next() for _ in range(3)]
        assert [delivery.payload for delivery in seen] == [b"0", b"1", b"2"]
        assert {(delivery.subject, delivery.headers["Content-Type"]) for delivery in seen} == {(few.subject, "text")}
        await world.cut(bus)
        await world.heal(bus)
        await few.close()
        await other.publish(few.subject, b"late")
        await other.publish(few.subject.rpartition(".")[0] + ".no-number", b"from a stranger")
        assert len((await small.next()).payload) == 50
        await other.publish(small.subject, b"last", reply="somewhere")
        async with asyncio.timeout(5):
            last = await small.next()
        assert (last.payload, last.reply, few.unread) == (b"last", "somewhere", 0)
        await bus.close()
        with pytest.raises(BusError, match="closed"):
            await small.next()


async def test_inboxes_are_unique(world: World) -> None:
    async with world.running():
        one, two = await world.bus(), await world.bus()
        names = [bus.new_inbox() for bus in (one, two) for _ in range(50)]
        assert len(dict.fromkeys(names)) == 100
        assert all(name.startswith("_INBOX.") for name in names)


# a beginning that is given up


async def test_who_has_read_all_goes_on_when_the_beginning_is_given_up(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        names = world.subjects
        subject, wanted = names.fact("requests", "accepted"), names.fact("placement", "accepted")
        await bus.ledger.append(wanted, b"wanted")
        whole, filtered = await other.ledger.read(), await other.ledger.read([wanted])
        for number in range(2, 31):
            await bus.ledger.append(subject, b"%d" % number)
        await read_up_to(whole, 30)
        assert (await filtered.batch())[0].pending == 0
        await world.heard(other)
        await world.cut(other)
        await bus.ledger.drop(21)
        assert await bus.ledger.get(20) is None
        await world.heal(other)
        await bus.ledger.append(wanted, b"later")
        assert [record.sequence for record in await read_up_to(filtered, 31)] == [31]
        assert [record.sequence for record in await read_up_to(whole, 31)] == [31]
        assert [record.sequence for record in await read_up_to(await bus.ledger.read(), 31)] == list(range(21, 32))


async def test_who_has_not_read_what_is_given_up_is_told_so(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        names = world.subjects
        subject, wanted = names.fact("requests", "accepted"), names.fact("placement", "accepted")
        await bus.ledger.append(wanted, b"wanted")
        whole, filtered = await other.ledger.read(), await other.ledger.read([wanted])
        await read_up_to(whole, 1)
        await read_up_to(filtered, 1)
        await world.cut(other)
        await bus.ledger.append(wanted, b"missed")
        await asyncio.sleep(0.01)
        for number in range(3, 11):
            await bus.ledger.append(subject, b"%d" % number)
        await bus.ledger.drop(8)
        await world.heal(other)
        for reader in (whole, filtered):
            with pytest.raises(LogChanged, match="up to 7 was given up"):
                await read_up_to(reader, 10)
