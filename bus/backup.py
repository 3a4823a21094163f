"""A backup: all streams of a cell in one file, as the NATS server keeps them; sequences and times stay as they are.

    bytes 0-8       magic "LONGBAK" and the format version, one byte each
    from 8          the streams, one behind the other, each as the server's snapshot of it
    behind them     trailer: MessagePack map (cell, time, and of each stream: configuration, state, place)
    last 84 bytes   digest of everything before the trailer (32), digest of the trailer (32), its offset (8), its length
                    (4), "LONGEBK" and the version

All numbers are little endian, all digests BLAKE2b. A file takes its name when it is whole, and nothing is restored
before all of it was read and found whole.

The cell may go on meanwhile. The order makes the parts fit: submissions before the ledger (what was accepted in between
is a repeat), snapshots before the ledger (none lies beyond its end), tokens after it (whatever its facts say of tokens
is there).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from bus.contract import BusError
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.snapshots import SnapshotStore
from bus.stream_copy import StreamCopy, StreamHead, delete_stream, restore_stream, streams_under
from bus.subjects import Subjects

VERSION = 1
MAGIC = b"LONGBAK" + bytes([VERSION])
END_MAGIC = b"LONGEBK" + bytes([VERSION])
PIECE_BYTES = 256 * 1024
TRAILER_LIMIT = 16 * 1024 * 1024
ATTEMPTS = 3
_FOOTER = struct.Struct("<32s32sQI8s")

Progress = Callable[[str, int], None]
"""Called with the stream and how many bytes of it are done."""


class BackupError(UserError):
    """The file cannot be written, read or restored; the message says which, what is wrong, and what to do."""


class StreamPart(msgspec.Struct, frozen=True):
    """One stream in a backup. `config` and `state` are what the server said of it."""

    name: str
    offset: int
    length: int
    config: dict[str, Any]
    state: dict[str, Any]

    @property
    def messages(self) -> int:
        return int(self.state.get("messages", 0))


class Contents(msgspec.Struct, frozen=True):
    """What a backup holds. `taken_at` in nanoseconds since the epoch."""

    cell: str
    taken_at: int
    streams: tuple[StreamPart, ...]


_contents = msgspec.msgpack.Decoder(Contents)


async def write_backup(
    path: Path | str, bus: JetStreamBus, *, force: bool = False, progress: Progress | None = None
) -> Contents:
    """Copy all streams of the bus's cell into one file. Raises `BackupError` and `BusError`; then there is none."""
    path = Path(path)
    if path.is_dir():
        raise BackupError(f"{path} is a directory: name a file")
    if path.exists() and not force:
        raise BackupError(f"{path} exists: name another file, or overwrite it with --force")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        for attempt in range(ATTEMPTS):
            with temporary.open("wb") as file:
                contents = await _write(file, bus, progress)
            if _fits(contents, bus.subjects, await _positions(bus)):
                break
            if attempt == ATTEMPTS - 1:
                raise BackupError(
                    f"the beginning of the ledger of cell {bus.subjects.cell!r} moved on while it was copied: try again"
                )
        temporary.replace(path)
    except OSError as error:
        raise BackupError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return contents


async def _positions(bus: JetStreamBus) -> list[int]:
    return [one.position for one in await SnapshotStore(bus.snapshots, bus.subjects).manifests()]


def _fits(contents: Contents, subjects: Subjects, positions: list[int]) -> bool:
    """Whether a control can start from these streams: from the ledger's beginning, or from a snapshot before it."""
    ledger = next((part for part in contents.streams if part.name == subjects.ledger_stream), None)
    first = int(ledger.state.get("first_seq", 1)) if ledger is not None else 1
    return first <= 1 or any(position + 1 >= first for position in positions)


async def _write(file: IO[bytes], bus: JetStreamBus, progress: Progress | None) -> Contents:
    whole = hashlib.blake2b(MAGIC, digest_size=32)
    file.write(MAGIC)
    parts = []
    for stream in await _streams(bus):
        copy = StreamCopy(bus.raw, stream)
        offset = length = 0
        try:
            head = await copy.head()
            offset = file.tell()
            async for chunk in copy.chunks():
                whole.update(chunk)
                file.write(chunk)
                length += len(chunk)
                if progress is not None:
                    progress(stream, length)
        finally:
            await copy.close()
        parts.append(StreamPart(stream, offset, length, head.config, head.state))
    contents = Contents(bus.subjects.cell, bus.wall(), tuple(parts))
    trailer = msgspec.msgpack.encode(contents)
    at = file.tell()
    file.write(trailer)
    digest = hashlib.blake2b(trailer, digest_size=32).digest()
    file.write(_FOOTER.pack(whole.digest(), digest, at, len(trailer), END_MAGIC))
    file.flush()
    os.fsync(file.fileno())
    return contents


async def _streams(bus: JetStreamBus) -> list[str]:
    """All streams of the cell, in the order in which they are to be copied. Raises `BackupError` where it has none."""
    names = bus.subjects
    found = await streams_under(bus.raw, f"{names.prefix}.")
    if names.ledger_stream not in found:
        raise BackupError(f"there is no cell {names.cell!r} at {bus.raw.url}: name another one with --cell")
    first = [name for name in (names.intake_stream, names.snapshots_stream, names.ledger_stream) if name in found]
    return first + [name for name in found if name not in first]


# ---- reading ------------------------------------------------------------------------------------------------


def read_contents(path: Path | str) -> Contents:
    """What a backup holds, after all of it was read. Raises `BackupError` for any damage."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise BackupError(f"{path} cannot be read: {error.strerror}") from None


def _read(path: Path, file: IO[bytes]) -> Contents:
    magic = file.read(len(MAGIC))
    if not magic.startswith(MAGIC[:-1]):
        raise BackupError(f"{path} is not a backup: make one with `longshore backup FILE`")
    if magic != MAGIC:
        raise BackupError(
            f"{path} has backup format {magic[-1]}, this program reads {VERSION}: use the release that wrote it"
        )
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _FOOTER.size))
    footer = file.read(_FOOTER.size)
    if size < len(MAGIC) + _FOOTER.size or not footer.endswith(END_MAGIC):
        raise _damaged(path, "its end is missing")
    whole, digest, offset, length, _ = _FOOTER.unpack(footer)
    if offset + length != size - _FOOTER.size or length > TRAILER_LIMIT:
        raise _damaged(path, f"it has {size} bytes, but {offset + length + _FOOTER.size} were written")
    file.seek(offset)
    trailer = file.read(length)
    if hashlib.blake2b(trailer, digest_size=32).digest() != digest:
        raise _damaged(path, "the checksum of its trailer does not match")
    try:
        contents = _contents.decode(trailer)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its trailer cannot be decoded ({error})") from None
    found = hashlib.blake2b(digest_size=32)
    for piece in _pieces(file, 0, offset):
        found.update(piece)
    if found.digest() != whole:
        raise _damaged(path, "the checksum of its streams does not match")
    at = len(MAGIC)
    for part in contents.streams:
        if part.offset != at or part.length < 0 or part.config.get("name") != part.name:
            raise _damaged(path, f"the place of {part.name} in it cannot be")
        at += part.length
    if at != offset:
        raise _damaged(path, "there is more in it than its streams")
    return contents


def _pieces(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end:
        piece = file.read(min(PIECE_BYTES, end - start))
        if not piece:
            return
        start += len(piece)
        yield piece


def _damaged(path: Path, what: str) -> BackupError:
    return BackupError(f"{path} is damaged: {what}; nothing was restored: take another copy of it")


# ---- restoring ----------------------------------------------------------------------------------------------


async def restore_backup(
    path: Path | str, bus: JetStreamBus, *, replicas: int = 0, progress: Progress | None = None
) -> Contents:
    """Make all streams of a backup, under the cell of the bus, which must have none and bear the backup's name.

    `replicas` over 0 takes the place of what the streams had. Raises `BackupError`, `BusError`; nothing is left then.
    """
    path = Path(path)
    contents = read_contents(path)
    names = bus.subjects
    if contents.cell != names.cell:
        raise BackupError(f"{path} holds cell {contents.cell!r}: restore it with --cell {contents.cell}")
    for part in contents.streams:
        subjects = part.config.get("subjects") or []
        if not subjects or not all(str(subject).startswith(f"{names.prefix}.") for subject in subjects):
            raise BackupError(f"{path} holds stream {part.name}, which does not belong to cell {names.cell!r}")
    there = await streams_under(bus.raw, f"{names.prefix}.")
    if there:
        raise BackupError(
            f"the NATS server at {bus.raw.url} has streams of cell {names.cell!r} already ({', '.join(there)}): "
            "stop the cell's processes and delete them, or restore onto another server"
        )
    made: list[str] = []
    try:
        for part in contents.streams:
            config = part.config | ({"num_replicas": replicas} if replicas else {})
            chunks = _chunks(path, part, progress)
            state = await restore_stream(bus.raw, StreamHead(config, part.state), chunks)
            made.append(part.name)
            _check(part, state)
    except BaseException as error:
        for stream in made:
            await delete_stream(bus.raw, stream)
        if isinstance(error, OSError):
            raise BackupError(f"{path} cannot be read: {error.strerror}") from None
        raise
    return contents


def _chunks(path: Path, part: StreamPart, progress: Progress | None) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        for piece in _pieces(file, part.offset, part.offset + part.length):
            yield piece
            done += len(piece)
            if progress is not None:
                progress(part.name, done)


def _check(part: StreamPart, state: dict[str, Any]) -> None:
    """What has expired since the backup is gone, from the beginning on; nothing else may be."""
    missing = state["messages"] != part.messages and not part.config.get("max_age")
    if missing or state["last_seq"] != part.state["last_seq"]:
        raise BusError(
            f"{part.name} came back with {state['messages']} messages up to {state['last_seq']} instead of "
            f"{part.messages} up to {part.state['last_seq']}"
        )
