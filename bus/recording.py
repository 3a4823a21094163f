"""A recording: both streams of a cell in one file that needs nothing else to be read.

    bytes 0-8        magic "LONGREC" and the format version, one byte each
    8-4096           header: length, MessagePack map, digest, zeros (written last, so that it says what the file holds)
    from 4096        blocks: digest (16 bytes), length (4), MessagePack array of records
                     [sequence, timestamp, subject, payload, publisher], all of one stream, in its order;
                     in version 2 first the snapshot that the ledger goes on from, in pieces: records of "snapshot"
    behind them      trailer: MessagePack array of blocks [stream, offset, length, records, first sequence]
    last 36 bytes    digest of the trailer (16), its offset (8), its length (4), "LONGEND" and the version

All numbers are little endian, all digests BLAKE2b. A file is written beside its name and takes it when it is whole, so
what bears the name is complete; what happened to it since is found when it is read, and named in one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, TypeVar

import msgspec

from bus.contract import Bus, Log, Record, Usage
from bus.errors import UserError
from bus.snapshots import oldest_start
from bus.subjects import Subjects

VERSION = 2
"""2 holds the snapshot that it starts from. What begins at the ledger's beginning needs none, and is written as 1."""
MAGIC = b"LONGREC"
END_MAGIC = b"LONGEND"
MAGIC_BYTES = len(MAGIC) + 1
DIGEST_BYTES = 16
HEADER_BYTES = 4096
BLOCK_RECORDS = 2048
BLOCK_BYTES = 1024 * 1024
_HEADER_ROOM = HEADER_BYTES - MAGIC_BYTES - 4 - DIGEST_BYTES
_FRAME = struct.Struct("<16sI")
_FOOTER = struct.Struct("<16sQI8s")

T = TypeVar("T")
Stream = Literal["ledger", "tokens"]
Held = Literal["ledger", "tokens", "snapshot"]
Progress = Callable[[str, int, int], None]
"""Called with the stream, how far it is read, and its last sequence."""


class RecordingError(UserError):
    """The file cannot be written or read; the message says which, what is wrong, and what to do."""


class Bounds(msgspec.Struct, frozen=True):
    """What a recording holds of one stream; all 0 where it holds nothing."""

    records: int = 0
    first: int = 0
    last: int = 0


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """`recorded_at` in nanoseconds since the epoch. `rules`: version in force from a ledger sequence on.

    `snapshot`: the ledger position of the state that it holds, 0 where it holds none.
    """

    cell: str
    recorded_at: int
    ledger: Bounds
    tokens: Bounds
    rules: tuple[tuple[int, int], ...] = ((0, 1),)
    snapshot: int = 0


class _Block(msgspec.Struct, frozen=True, array_like=True):
    stream: Held
    offset: int
    length: int
    records: int
    first: int


class _RulesBody(msgspec.Struct):
    version: int


class _RulesFact(msgspec.Struct):
    body: _RulesBody


_encode = msgspec.msgpack.Encoder().encode
_records = msgspec.msgpack.Decoder(list[Record])
_header = msgspec.msgpack.Decoder(Header)
_trailer = msgspec.msgpack.Decoder(list[_Block])


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


# ---- writing ------------------------------------------------------------------------------------------------


class RecordingWriter:
    """Writes one recording; use it as a context manager. The name is taken when the block ends without an exception."""

    def __init__(self, path: Path | str, cell: str, recorded_at: int, *, force: bool = False) -> None:
        self.path = Path(path)
        self.cell = cell
        self.recorded_at = recorded_at
        if self.path.is_dir():
            raise RecordingError(f"{self.path} is a directory: name a file")
        if self.path.exists() and not force:
            raise RecordingError(f"{self.path} exists: name another file, or overwrite it with --force")
        self._bounds: dict[Stream, Bounds] = {"ledger": Bounds(), "tokens": Bounds()}
        self._rules: list[tuple[int, int]] = [(0, 1)]
        self._waiting: dict[Stream, list[Record]] = {"ledger": [], "tokens": []}
        self._waiting_bytes = 0
        self._snapshot = 0
        self._blocks: list[_Block] = []
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self._file: IO[bytes] = self._temporary.open("wb")
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be written: {error.strerror}") from None
        self._file.write(bytes(HEADER_BYTES))

    def add(self, stream: Stream, record: Record) -> None:
        """Sequences of each stream must rise."""
        bounds = self._bounds[stream]
        if record.sequence <= bounds.last:
            raise ValueError(f"{stream}: sequence {record.sequence} after {bounds.last}")
        self._bounds[stream] = Bounds(bounds.records + 1, bounds.first or record.sequence, record.sequence)
        if stream == "ledger" and record.subject.endswith(".rules.activated"):
            with contextlib.suppress(msgspec.DecodeError):
                fact = msgspec.json.decode(record.payload, type=_RulesFact)
                self._rules.append((record.sequence, fact.body.version))
        waiting = self._waiting[stream]
        waiting.append(record)
        self._waiting_bytes += len(record.payload)
        if len(waiting) >= BLOCK_RECORDS or self._waiting_bytes >= BLOCK_BYTES:
            self._flush()

    def start_from(self, position: int, body: bytes) -> None:
        """The state from which the ledger goes on, as it is stored (`bus.snapshots`). Before any record."""
        assert not self._blocks and position > 0
        self._snapshot = position
        for number, start in enumerate(range(0, max(1, len(body)), BLOCK_BYTES), 1):
            self._write("snapshot", [Record(number, 0, "", body[start : start + BLOCK_BYTES])])

    def _flush(self) -> None:
        for stream, records in self._waiting.items():
            if records:
                self._write(stream, records)
                self._waiting[stream] = []
        self._waiting_bytes = 0

    def _write(self, stream: Held, records: list[Record]) -> None:
        data = _encode([record[:5] for record in records])
        self._blocks.append(_Block(stream, self._file.tell(), len(data), len(records), records[0].sequence))
        self._file.write(_FRAME.pack(_digest(data), len(data)))
        self._file.write(data)

    def finish(self) -> Header:
        """Write what is left, make it durable, and take the name."""
        self._flush()
        trailer = _encode(self._blocks)
        offset = self._file.tell()
        self._file.write(trailer)
        version = bytes([VERSION if self._snapshot else 1])
        self._file.write(_FOOTER.pack(_digest(trailer), offset, len(trailer), END_MAGIC + version))
        rules = tuple(self._rules[:1] + self._rules[1:][-64:])
        header = Header(
            self.cell, self.recorded_at, self._bounds["ledger"], self._bounds["tokens"], rules, self._snapshot
        )
        data = _encode(header)
        assert len(data) <= _HEADER_ROOM
        self._file.seek(0)
        self._file.write(MAGIC + version + len(data).to_bytes(4, "little") + data + _digest(data))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        return header

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
            return
        try:
            self.finish()
        except OSError as reason:
            self.abandon()
            raise RecordingError(f"{self.path} cannot be written: {reason.strerror}") from None
        except BaseException:
            self.abandon()
            raise


async def write_recording(
    path: Path | str, bus: Bus, *, cell: str, progress: Progress | None = None, force: bool = False
) -> Header:
    """Record both streams up to where they end now; of a ledger whose beginning was dropped, from a snapshot on.

    The ledger's end is taken first: whatever its facts say of tokens was durable before, so the recording holds it.
    """
    writer = RecordingWriter(path, cell, bus.wall(), force=force)
    try:
        with writer:
            ends: list[tuple[Stream, Log, Usage]] = [("ledger", bus.ledger, await bus.ledger.usage())]
            ends.append(("tokens", bus.tokens, await bus.tokens.usage()))
            if ends[0][2].messages and ends[0][2].first_sequence > 1:
                start = await oldest_start(bus, Subjects(cell), ends[0][2].first_sequence)
                if start is not None:
                    writer.start_from(start[0].position, start[1])
            for stream, log, usage in ends:
                await _copy(writer, stream, log, usage, progress)
    except OSError as error:
        raise RecordingError(f"{path} cannot be written: {error.strerror}") from None
    return Recording.open(path).header


async def copy_into(writer: RecordingWriter, bus: Bus, last: int) -> None:
    """The ledger up to a sequence, and all tokens that are there then."""
    usage = await bus.ledger.usage()
    await _copy(writer, "ledger", bus.ledger, replace(usage, last_sequence=min(last, usage.last_sequence)), None)
    await _copy(writer, "tokens", bus.tokens, await bus.tokens.usage(), None)


async def _copy(writer: RecordingWriter, stream: Stream, log: Log, usage: Usage, progress: Progress | None) -> None:
    if usage.messages == 0:
        return
    reader = await log.read(start=max(1, usage.first_sequence))
    try:
        position = 0
        while position < usage.last_sequence:
            for record in await reader.batch(BLOCK_RECORDS):
                position = record.sequence
                if position > usage.last_sequence:
                    break
                writer.add(stream, record)
                if record.pending == 0:
                    position = usage.last_sequence  # nothing is left, whatever was deleted behind it
            if progress is not None:
                progress(stream, min(position, usage.last_sequence), usage.last_sequence)
    finally:
        await reader.close()


# ---- reading ------------------------------------------------------------------------------------------------


class Recording:
    """A recording opened for reading. Header and trailer are checked on opening, each block when it is read.

    Iterating may be repeated and interleaved. Every damage raises `RecordingError`.
    """

    def __init__(self, path: Path, header: Header, blocks: list[_Block]) -> None:
        self.path = path
        self.header = header
        self._blocks = blocks

    @classmethod
    def open(cls, path: Path | str) -> Recording:
        path = Path(path)
        try:
            with path.open("rb") as file:
                header = _read_header(path, file)
                blocks = _read_trailer(path, file, 2 if header.snapshot else 1)
        except OSError as error:
            raise RecordingError(f"{path} cannot be read: {error.strerror}") from None
        for stream, bounds in (("ledger", header.ledger), ("tokens", header.tokens)):
            held = sum(block.records for block in blocks if block.stream == stream)
            if held != bounds.records:
                raise _damaged(path, f"its trailer counts {held} records of {stream}, its header {bounds.records}")
        return cls(path, header, blocks)

    def snapshot(self) -> bytes:
        """The stored state that its ledger goes on from, at `header.snapshot`; empty where that is 0."""
        pieces = [record.payload for records in self._batches("snapshot", 0) for record in records]
        return b"".join(pieces)

    def ledger(self, start: int = 0) -> Iterator[Record]:
        """Facts and what was said, in stream order, from sequence `start` on."""
        return self._iterate("ledger", start)

    def tokens(self, start: int = 0) -> Iterator[Record]:
        """Pages and seals, in stream order, from sequence `start` on."""
        return self._iterate("tokens", start)

    def verify(self) -> int:
        """Read and check every block; returns how many records they hold, pieces of a snapshot included."""
        return sum(len(records) for stream in ("snapshot", "ledger", "tokens") for records in self._batches(stream, 0))

    def _iterate(self, stream: str, start: int) -> Iterator[Record]:
        for records in self._batches(stream, start):
            if records[0].sequence < start:
                yield from (record for record in records if record.sequence >= start)
            else:
                yield from records

    def _batches(self, stream: str, start: int) -> Iterator[list[Record]]:
        blocks = [block for block in self._blocks if block.stream == stream]
        begin = max((i for i, block in enumerate(blocks) if block.first <= start), default=0)
        last = 0
        try:
            with self.path.open("rb") as file:
                for block in blocks[begin:]:
                    records = self._read(file, block)
                    if records[0].sequence <= last:
                        raise _damaged(self.path, f"{stream} sequence {records[0].sequence} follows {last}")
                    last = records[-1].sequence
                    yield records
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be read: {error.strerror}") from None

    def _read(self, file: IO[bytes], block: _Block) -> list[Record]:
        where = f"the block of {block.stream} from sequence {block.first} on"
        file.seek(block.offset)
        frame = file.read(_FRAME.size)
        data = file.read(block.length)
        if len(frame) < _FRAME.size or len(data) < block.length:
            raise _damaged(self.path, f"it ends within {where}")
        if frame != _FRAME.pack(_digest(data), block.length):
            raise _damaged(self.path, f"the checksum of {where} does not match")
        records = _decode(self.path, _records, data, where)
        if len(records) != block.records or not records or records[0].sequence != block.first:
            raise _damaged(self.path, f"{where} holds other records than the trailer says")
        return records


def _damaged(path: Path, what: str) -> RecordingError:
    return RecordingError(f"{path} is damaged: {what}; record it again, or take another copy")


def _decode(path: Path, decoder: msgspec.msgpack.Decoder[T], data: bytes, where: str) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"{where} cannot be decoded ({error})") from None


def _read_header(path: Path, file: IO[bytes]) -> Header:
    head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC):
        raise RecordingError(f"{path} is not a recording: make one with `longshore record FILE`")
    version = head[len(MAGIC)] if len(head) >= MAGIC_BYTES else 0
    if not 1 <= version <= VERSION:
        raise RecordingError(
            f"{path} has recording format {version}, this program reads up to {VERSION}: use the release that wrote it"
        )
    start = MAGIC_BYTES + 4
    length = int.from_bytes(head[MAGIC_BYTES:start], "little")
    if len(head) < HEADER_BYTES:
        raise _damaged(path, "it ends within its header")
    data = head[start : start + length]
    if length > _HEADER_ROOM or head[start + length : start + length + DIGEST_BYTES] != _digest(data):
        raise _damaged(path, "the checksum of its header does not match")
    return _decode(path, _header, data, "its header")


def _read_trailer(path: Path, file: IO[bytes], version: int) -> list[_Block]:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _FOOTER.size))
    footer = file.read(_FOOTER.size)
    if size < HEADER_BYTES + _FOOTER.size or footer[-MAGIC_BYTES:] != END_MAGIC + bytes([version]):
        raise _damaged(path, "its end is missing")
    digest, offset, length, _ = _FOOTER.unpack(footer)
    if offset + length != size - _FOOTER.size:
        raise _damaged(path, f"it has {size} bytes, but {offset + length + _FOOTER.size} were written")
    file.seek(offset)
    data = file.read(length)
    if _digest(data) != digest:
        raise _damaged(path, "the checksum of its trailer does not match")
    return _decode(path, _trailer, data, "its trailer")
