"""The snapshot store, in memory and on a real server: what is written is read; torn, altered, foreign is not."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from bus_worlds import World

from bus.contract import Bus
from bus.snapshots import CHUNK_BYTES, KEPT, Manifest, SnapshotStore, Torn

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
