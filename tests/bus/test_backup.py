"""A cell in a file and back onto an empty server: nothing is lost, moved or dated anew; damage changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bus_worlds import read_up_to

from bus import backup as backup_module
from bus.backup import BackupError, Contents, read_contents, restore_backup, write_backup
from bus.contract import BusError
from bus.jetstream import JetStreamBus
from bus.jetstream_api import call, stream_info
from bus.server import EmbeddedServer
from bus.snapshots import SnapshotStore
from bus.stream_copy import streams_under

CELL = "kept"


@pytest.fixture
def empty_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "other") as server:
        yield server


@contextlib.asynccontextmanager
async def buses(server: EmbeddedServer, other: EmbeddedServer, cell: str) -> AsyncIterator[list[JetStreamBus]]:
    """Of a cell with something to lose, and of the same one where it is not there."""
    here, there = await JetStreamBus.connect(server.url, cell, create=True), await JetStreamBus.connect(other.url, cell)
    try:
        await fill(here)
        yield [here, there]
    finally:
        await here.close()
        await there.close()


async def fill(bus: JetStreamBus) -> None:
    names = bus.subjects
    for number in range(3000):
        bus.ledger.send(names.fact("requests", "accepted"), b"%d" % number * 100, publisher="p")
    for number in range(40):
        bus.tokens.send(names.tokens("gpu/s1/0", 7), b"page %d" % number)
    await SnapshotStore(bus.snapshots, names).write(
        [bytes(700_000)], position=5, anchor="a", rules=1, facts=5, writer="w", at=1
    )
    for number in range(1, 12):
        await bus.snapshots.append(names.snapshot_chunk("x"), b"%d" % number)
    await bus.snapshots.drop(4)
    await bus.request(names.submit("m"), b"submitted")
    await bus.ledger.append(names.fact("requests", "accepted"), b"last")


async def everything(bus: JetStreamBus) -> list[Any]:
    found: list[Any] = []
    for log in (bus.ledger, bus.tokens, bus.snapshots):
        usage = await log.usage()
        reader = await log.read(start=usage.first_sequence)
        found.append([record[:5] for record in await read_up_to(reader, usage.last_sequence)])
        await reader.close()
    found.append((await stream_info(bus.raw, bus.subjects.intake_stream))["state"]["last_seq"])
    return found


async def test_all_comes_back_as_it_was(
    tmp_path: Path, nats_server: EmbeddedServer, empty_server: EmbeddedServer
) -> None:
    async with buses(nats_server, empty_server, "kept") as (bus, other):
        file = tmp_path / "cell.lsbak"
        contents = await write_backup(file, bus)
        assert [part.name for part in contents.streams] == [
            f"{s}_{CELL}" for s in ("INTAKE", "SNAPSHOTS", "LEDGER", "PARTS", "TOKENS")
        ]
        assert read_contents(file) == contents
        before = await everything(bus)
        stranger = await JetStreamBus.connect(empty_server.url, "another")
        with pytest.raises(BackupError, match="--cell kept"):
            await restore_backup(file, stranger)
        assert await restore_backup(file, other) == contents
        assert await everything(other) == before
        config = (await stream_info(other.raw, "LEDGER_kept"))["config"]
        assert config["deny_delete"] and config["discard"] == "new"
        assert (await other.ledger.append(bus.subjects.fact("requests", "accepted"), b"on")).sequence == 3002
        with pytest.raises(BackupError, match="has streams of cell 'kept' already"):
            await restore_backup(file, other)
        with pytest.raises(BackupError, match="--force"):
            await write_backup(file, bus)
        with pytest.raises(BackupError, match="there is no cell 'another'"):
            await write_backup(tmp_path / "x", stranger)
        await stranger.close()
        assert not (tmp_path / "x").exists()


async def test_a_damaged_file_is_refused_before_anything_is_written(
    tmp_path: Path, nats_server: EmbeddedServer, empty_server: EmbeddedServer
) -> None:
    async with buses(nats_server, empty_server, "torn") as (bus, other):
        file = tmp_path / "cell.lsbak"
        contents = await write_backup(file, bus)
        whole = file.read_bytes()
        middle = contents.streams[2].offset + contents.streams[2].length // 2
        flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (9, middle, len(whole) - 200)]
        for damaged in (
            b"",
            whole[:5],
            whole[:-1],
            whole[: len(whole) // 2],
            whole + b"x",
            *flipped,
            whole[:7] + b"\x09",
        ):
            file.write_bytes(damaged)
            with pytest.raises(BackupError) as error:
                await restore_backup(file, other)
            assert str(file) in str(error.value)
            assert await streams_under(other.raw, "longshore.torn.") == []


async def test_a_restore_that_fails_leaves_nothing(
    tmp_path: Path, nats_server: EmbeddedServer, empty_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with buses(nats_server, empty_server, "half") as (bus, other):
        file = tmp_path / "cell.lsbak"
        await write_backup(file, bus)
        read = read_contents(file)

        def lying(path: Path) -> Contents:
            """The ledger's bytes are those of another stream: the server finds out, after two streams are there."""
            parts = list(read.streams)
            parts[2] = msgspec.structs.replace(parts[2], offset=parts[3].offset, length=parts[3].length)
            return Contents(read.cell, read.taken_at, tuple(parts))

        monkeypatch.setattr(backup_module, "read_contents", lying)
        with pytest.raises(BusError, match="LEDGER_half"):
            await restore_backup(file, other)
        assert await streams_under(other.raw, "longshore.half.") == []


async def test_streams_of_others_are_let_be(
    tmp_path: Path, nats_server: EmbeddedServer, empty_server: EmbeddedServer
) -> None:
    async with buses(nats_server, empty_server, "mine") as (bus, _):
        config = {"name": "MORE_mine", "subjects": ["longshore.mine.more.>"]}
        await call(bus.raw, "STREAM.CREATE.MORE_mine", config)
        contents = await write_backup(tmp_path / "a", bus)
        assert [part.name for part in contents.streams][-1] == "TOKENS_mine" and len(contents.streams) == 6
        assert "KV_other" not in [part.name for part in contents.streams]


async def test_it_goes_on_while_the_cell_does(
    tmp_path: Path, nats_server: EmbeddedServer, empty_server: EmbeddedServer
) -> None:
    async with buses(nats_server, empty_server, "busy") as (bus, other):
        stop = asyncio.Event()

        async def busy() -> None:
            number = 0
            while not stop.is_set():
                await bus.ledger.append(bus.subjects.fact("requests", "accepted"), b"while %d" % number)
                number += 1

        task = asyncio.ensure_future(busy())
        contents = await write_backup(tmp_path / "a", bus)
        stop.set()
        await task
        await restore_backup(tmp_path / "a", other)
        last = (await other.ledger.usage()).last_sequence
        assert 3001 <= last <= (await bus.ledger.usage()).last_sequence
        assert last == next(p for p in contents.streams if p.name == "LEDGER_busy").state["last_seq"]
        assert await other.ledger.get(last) == await bus.ledger.get(last)
