"""Snapshots of a cell, kept in a stream of their own: chunks first, then a manifest that says they are whole.

    longshore.<cell>.snapshot.chunk.<id>    number of the chunk (4 bytes, little endian), then its bytes
    longshore.<cell>.snapshot.manifest      JSON: what it is a snapshot of, which chunks, and their digest

A snapshot without its manifest does not exist; one whose chunks do not give the manifest's digest is torn, and an
older one is taken. So an old one is given up only when enough newer ones have been read back and found whole: of a
ledger whose beginning is gone they are all there is to start from. Any number of processes may write at once: each
snapshot has an id of its own. What a snapshot means is not known here: it is bytes at a ledger position, and the digest
of the ledger's record there tells whether it belongs to the ledger that one has.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence

import msgspec

from bus.contract import Appended, Bus, BusError, Log, LogChanged, NoAnswer, Record
from bus.subjects import Subjects

FORMAT = 1
"""Version of manifest and chunks; of another one nothing is read."""
CHUNK_BYTES = 512 * 1024
CHUNKS_UNDER_WAY = 8
PAUSE_SECONDS = 0.002
"""Between two chunks: hashing and sending one is this process's time, and it has others to serve."""
KEPT = 3
"""Whole snapshots that are kept; the oldest is dropped when another one is whole."""
READ_SECONDS = 5.0
"""How long the next piece may take to come."""
BYTES_LIMIT = 8 << 30
CHUNKS_LIMIT = BYTES_LIMIT // CHUNK_BYTES
_NUMBER_BYTES = 4


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One whole snapshot. `anchor` is the digest of the ledger's record at `position`, `first` and `last` are the
    sequences of its chunks in the stream, `written_at` nanoseconds since the epoch.
    """

    format: int
    cell: str
    position: int
    anchor: str
    rules: int
    name: str
    bytes: int
    chunks: int
    first: int
    last: int
    digest: str
    written_at: int = 0
    facts: int = 0


class Torn(BusError):
    """A snapshot cannot be read: pieces are missing or altered. Take an older one."""


_manifest = msgspec.json.Decoder(Manifest)


def anchor_of(record: Record) -> str:
    """What tells one ledger's record from another's at the same sequence."""
    digest = hashlib.blake2b(f"{record.sequence} {record.timestamp} {record.subject} ".encode(), digest_size=16)
    digest.update(record.payload)
    return digest.hexdigest()


def _pieces(parts: Sequence[bytes]) -> Iterator[bytes]:
    """All bytes of the parts as chunks, at least one."""
    waiting = bytearray()
    for part in parts:
        view = memoryview(part)
        while view:
            room = CHUNK_BYTES - len(waiting)
            waiting += view[:room]
            view = view[room:]
            if len(waiting) == CHUNK_BYTES:
                yield bytes(waiting)
                waiting = bytearray()
    if waiting or not any(map(len, parts)):
        yield bytes(waiting)


class SnapshotStore:
    """Writes and reads the snapshots of one cell on `Bus.snapshots`."""

    def __init__(self, log: Log, subjects: Subjects) -> None:
        self._log = log
        self._subjects = subjects
        self._whole: dict[str, bool] = {}

    async def write(
        self, parts: Sequence[bytes], *, position: int, anchor: str, rules: int, facts: int, writer: str, at: int
    ) -> Manifest:
        """Store one snapshot and drop what is too old. Raises `Torn` where it does not come back as it was written, and
        `BusError` otherwise: whether one was added is not known then.

        Its bytes are the parts, one behind the other. Never more than a chunk of them is worked on without a break.
        `writer` and `position` make its id: a writer does not write the same position twice.
        """
        name = f"{position}-{writer}"
        subject = self._subjects.snapshot_chunk(name)
        digest = hashlib.blake2b(digest_size=32)
        sequences: list[int] = []
        sent: list[asyncio.Future[Appended]] = []

        async def answered() -> None:
            for answer in await asyncio.gather(*sent, return_exceptions=True):
                if isinstance(answer, BaseException):
                    raise answer
                sequences.append(answer.sequence)
            sent.clear()

        number = 0
        for number, piece in enumerate(_pieces(parts)):
            digest.update(piece)
            payload = number.to_bytes(_NUMBER_BYTES, "little") + piece
            sent.append(self._log.send(subject, payload, message_id=f"{subject}.{number}", publisher=writer))
            await asyncio.sleep(PAUSE_SECONDS)
            if len(sent) == CHUNKS_UNDER_WAY:
                await answered()
        await answered()
        manifest = Manifest(
            format=FORMAT,
            cell=self._subjects.cell,
            position=position,
            anchor=anchor,
            rules=rules,
            name=name,
            bytes=sum(map(len, parts)),
            chunks=number + 1,
            first=min(sequences),
            last=max(sequences),
            digest=digest.hexdigest(),
            written_at=at,
            facts=facts,
        )
        await self._log.append(
            self._subjects.snapshot_manifest,
            msgspec.json.encode(manifest),
            message_id=f"manifest.{name}",
            publisher=writer,
        )
        if manifest not in await self._drop_old() or not await self._is_whole(manifest):
            raise Torn(f"snapshot {name} does not come back as it was written")
        return manifest

    async def _drop_old(self) -> list[Manifest]:
        """Give up everything before the `KEPT` newest whole snapshots; all that were there. Raises `BusError`."""
        manifests = await self.manifests()
        names = {manifest.name for manifest in manifests}
        self._whole = {name: whole for name, whole in self._whole.items() if name in names}
        kept: list[int] = []
        whole = 0
        for manifest in manifests:
            kept.append(manifest.first)
            whole += await self._is_whole(manifest)
            if whole == KEPT:
                await self._log.drop(min(kept))
                break
        return manifests

    async def _is_whole(self, manifest: Manifest) -> bool:
        """Whether it can be read; each is read once."""
        known = self._whole.get(manifest.name)
        if known is None:
            try:
                await self._read_pieces(manifest, lambda piece: None, PAUSE_SECONDS)
                known = True
            except Torn:
                known = False
            self._whole[manifest.name] = known
        return known

    async def manifests(self) -> list[Manifest]:
        """All snapshots of a format that is known here, the one with the latest position first. Raises `BusError`."""
        found: dict[str, Manifest] = {}
        for record in await self._manifest_records():
            try:
                manifest = _manifest.decode(record.payload)
            except (msgspec.DecodeError, ValueError, RecursionError):
                continue
            if manifest.format == FORMAT and manifest.cell == self._subjects.cell:
                found[manifest.name] = manifest
        return sorted(found.values(), key=lambda one: (one.position, one.last), reverse=True)

    async def _manifest_records(self) -> list[Record]:
        while True:
            last = await self._log.last(self._subjects.snapshot_manifest)
            if last is None:
                return []
            try:
                records: list[Record] = []
                await self._read(self._subjects.snapshot_manifest, 1, last.sequence, records.append)
                return records
            except Torn:  # somebody dropped old ones in between: there are newer ones
                continue

    async def read(self, manifest: Manifest) -> bytes:
        """Its bytes. Raises `Torn`, and `BusError` where nobody answers."""
        pieces: list[bytes] = []
        await self._read_pieces(manifest, pieces.append)
        return b"".join(pieces)

    async def _read_pieces(self, manifest: Manifest, take: Callable[[bytes], object], pause: float = 0.0) -> None:
        """Give `take` its bytes in order, piece by piece; only when this returns they are known to be whole."""
        if not (0 < manifest.chunks <= CHUNKS_LIMIT and 0 <= manifest.bytes <= BYTES_LIMIT):
            raise Torn(f"snapshot {manifest.name} has a manifest that cannot be: {manifest.chunks} chunks")
        subject = self._subjects.snapshot_chunk(manifest.name)
        last = await self._log.get(manifest.last)
        if last is None or last.subject != subject:
            raise Torn(f"snapshot {manifest.name} has lost its last chunk")
        early: dict[int, bytes] = {}
        number = size = 0
        digest = hashlib.blake2b(digest_size=32)

        def put(record: Record) -> None:
            nonlocal number, size
            at = int.from_bytes(record.payload[:_NUMBER_BYTES], "little")
            if number <= at < manifest.chunks:
                early.setdefault(at, record.payload[_NUMBER_BYTES:])
            while number in early:
                piece = early.pop(number)
                number, size = number + 1, size + len(piece)
                digest.update(piece)
                take(piece)

        await self._read(subject, manifest.first, manifest.last, put, pause)
        if number < manifest.chunks or size != manifest.bytes or digest.hexdigest() != manifest.digest:
            raise Torn(f"snapshot {manifest.name} has {size} bytes that are not the {manifest.bytes} written")

    async def _read(
        self, subject: str, first: int, last: int, take: Callable[[Record], None], pause: float = 0.0
    ) -> None:
        """Give `take` all records of a subject up to a sequence that is known to be on it, with a break after each."""
        reader = await self._log.read([subject], start=first)
        at = 0
        try:
            while at < last:
                for record in await asyncio.wait_for(reader.batch(), READ_SECONDS):
                    at = record.sequence
                    if at <= last:
                        take(record)
                    if pause:
                        await asyncio.sleep(pause)
        except LogChanged:
            raise Torn(f"records of {subject} up to {last} were dropped while they were read") from None
        except TimeoutError:
            raise NoAnswer(f"the records of {subject} up to {last} did not come in time") from None
        finally:
            await reader.close()


async def agrees(ledger: Log, manifest: Manifest) -> bool:
    """Whether a snapshot belongs to this ledger: it holds at its position what stood there. Raises `BusError`."""
    record = await ledger.get(manifest.position)
    return record is not None and anchor_of(record) == manifest.anchor


async def whole_snapshots(bus: Bus, subjects: Subjects, first: int) -> list[tuple[Manifest, bytes]]:
    """Snapshots from which this ledger, which begins at `first`, can be gone on, the newest first.

    Raises `BusError`.
    """
    store = SnapshotStore(bus.snapshots, subjects)
    found = []
    for manifest in await store.manifests():
        if manifest.position + 1 < first or not await agrees(bus.ledger, manifest):
            continue
        try:
            found.append((manifest, await store.read(manifest)))
        except Torn:
            continue
    return found


async def oldest_start(bus: Bus, subjects: Subjects, first: int) -> tuple[Manifest, bytes] | None:
    """The oldest of them: what most of the ledger can be replayed from. None where there is none."""
    return next(iter((await whole_snapshots(bus, subjects, first))[::-1]), None)
