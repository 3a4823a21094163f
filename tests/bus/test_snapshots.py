"""The snapshot store, in memory and on a real server: what is written is read; torn, altered, foreign is not."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from bus_worlds import World

from bus.contract import Bus, Record
from bus.memory import MemoryServer
from bus.snapshots import CHUNK_BYTES, KEPT, Manifest, SnapshotStore, Torn
from bus.subjects import Subjects

MANY_BYTES = random.Random(7).randbytes(5 * CHUNK_BYTES - 17)


async def write(bus: Bus, world: World, position: int, body: bytes, writer: str = "w") -> Manifest:
    store = SnapshotStore(bus.snapshots, world.subjects)
    return await store.write(
        [body[:7], b"", body[7:]], position=position, anchor="a", rules=1, facts=position, writer=writer, at=5
    )


async def test_many_megabytes_come_back_and_old_ones_are_dropped(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        store = SnapshotStore(bus.snapshots, world.subjects)
        assert await store.manifests() == []
        written = [await write(bus, world, position, MANY_BYTES[position:]) for position in (10, 20, 30, 40, 50)]
        found = await store.manifests()
        assert [manifest.position for manifest in found] == [50, 40, 30] and len(found) == KEPT
        assert found == written[:1:-1]
        for manifest in found:
            assert await store.read(manifest) == MANY_BYTES[manifest.position :]
        usage = await bus.snapshots.usage()
        assert usage.first_sequence == found[-1].first and usage.messages == 3 * 6
        with pytest.raises(Torn):
            await store.read(written[0])


async def test_an_old_one_is_given_up_only_when_enough_newer_ones_are_whole(world: World) -> None:
    """A disk may lose a part of what was acknowledged: with torn ones alone nobody could start."""
    async with world.running():
        bus = await world.bus()
        store = SnapshotStore(bus.snapshots, world.subjects)
        old = await write(bus, world, 1, b"whole")
        for position in range(2, 8):
            chunk = await bus.snapshots.append(world.subjects.snapshot_chunk(f"{position}-w"), b"\0\0\0\0torn")
            at = chunk.sequence
            torn = msgspec.structs.replace(old, position=position, name=f"{position}-w", first=at, last=at)
            await bus.snapshots.append(world.subjects.snapshot_manifest, msgspec.json.encode(torn))
        later = [await write(bus, world, position, b"new") for position in (8, 9)]
        assert await store.read(old) == b"whole", "of the three newest that are whole it is one"
        later.append(await write(bus, world, 10, b"new"))
        assert [one.position for one in await store.manifests()] == [10, 9, 8]
        assert (await bus.snapshots.usage()).first_sequence == later[0].first


async def test_one_that_the_disk_loses_a_part_of_is_not_said_to_be_stored() -> None:
    for lost in ("chunk", "manifest"):
        server = MemoryServer("c")

        def lose(log: str, record: Record, lost: str = lost, server: MemoryServer = server) -> None:
            if lost in record.subject:
                server.snapshots.alter(record.sequence, record.payload[:-1])

        server.observe(lose)
        store = SnapshotStore(server.bus("w").snapshots, Subjects("c"))
        with pytest.raises(Torn, match="does not come back"):
            await store.write([b"state"], position=1, anchor="a", rules=1, facts=1, writer="w", at=5)


async def test_two_writers_at_once_and_an_empty_one(world: World) -> None:
    async with world.running():
        bus, other = await world.bus(), await world.bus()
        await asyncio.gather(write(bus, world, 8, MANY_BYTES, "a"), write(other, world, 8, MANY_BYTES[::-1], "b"))
        await write(bus, world, 9, b"")
        store = SnapshotStore(other.snapshots, world.subjects)
        bodies = {manifest.name: await store.read(manifest) for manifest in await store.manifests()}
        assert bodies == {"9-w": b"", "8-a": MANY_BYTES, "8-b": MANY_BYTES[::-1]}


async def test_what_is_torn_altered_or_unknown_is_said_to_be_so(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        store = SnapshotStore(bus.snapshots, world.subjects)
        whole = await write(bus, world, 1, b"whole")
        torn = await write(bus, world, 2, MANY_BYTES)
        lies = [
            msgspec.structs.replace(torn, first=torn.first + 1),
            msgspec.structs.replace(torn, last=torn.last + 100),
            msgspec.structs.replace(torn, last=torn.last + 1),
            msgspec.structs.replace(torn, bytes=7),
            msgspec.structs.replace(torn, chunks=10**9),
            msgspec.structs.replace(torn, digest="0" * 64),
        ]
        for lie in lies:
            with pytest.raises(Torn):
                await store.read(lie)
        future = msgspec.structs.replace(torn, format=2, name="future", position=99)
        foreign = msgspec.structs.replace(torn, cell="another", name="foreign", position=98)
        for payload in (b"{", b"[]", b"\xff", msgspec.json.encode(future), msgspec.json.encode(foreign)):
            await bus.snapshots.append(world.subjects.snapshot_manifest, payload)
        assert await store.manifests() == [torn, whole]
        assert await store.read(whole) == b"whole"


async def test_dropping_keeps_sequences(world: World) -> None:
    async with world.running():
        bus = await world.bus()
        subject = world.subjects.snapshot_chunk("x")
        for number in range(1, 11):
            await bus.snapshots.append(subject, b"%d" % number)
        for before in (4, 7, 7, 2):
            await bus.snapshots.drop(before)
        usage = await bus.snapshots.usage()
        assert (usage.messages, usage.first_sequence, usage.last_sequence) == (4, 7, 10)
        assert await bus.snapshots.get(6) is None
        assert (await bus.snapshots.append(subject, b"11")).sequence == 11
        await bus.snapshots.drop(12)
        usage = await bus.snapshots.usage()
        assert (usage.messages, usage.last_sequence) == (0, 11)
        assert (await bus.snapshots.append(subject, b"12")).sequence == 12
