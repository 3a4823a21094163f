"""Whether a control could start now: from the ledger's beginning, or from a whole snapshot that leads up to it."""

from __future__ import annotations

import hashlib

import msgspec

from bus.contract import Record
from bus.memory_stream import MemoryStream
from bus.snapshots import Manifest, anchor_of
from bus.subjects import Subjects

_NUMBER_BYTES = 4


def can_start(ledger: MemoryStream, snapshots: MemoryStream, subjects: Subjects) -> bool:
    """Looks at what the streams hold, by no connection of anybody."""
    if ledger.first_sequence == 1:
        return True
    chunks: dict[str, list[Record]] = {}
    for record in snapshots.since(1):
        chunks.setdefault(record.subject, []).append(record)
    for record in reversed(chunks.get(subjects.snapshot_manifest, [])):
        try:
            manifest = msgspec.json.decode(record.payload, type=Manifest)
        except msgspec.DecodeError:
            continue
        anchor = ledger.get(manifest.position)
        if anchor is None or anchor_of(anchor) != manifest.anchor:
            continue
        if _digest(chunks.get(subjects.snapshot_chunk(manifest.name), [])) == manifest.digest:
            return True
    return False


def _digest(chunks: list[Record]) -> str:
    """What comes first of each number, as readers take it."""
    pieces: dict[int, bytes] = {}
    for record in chunks:
        number = int.from_bytes(record.payload[:_NUMBER_BYTES], "little")
        pieces.setdefault(number, record.payload[_NUMBER_BYTES:])
    return hashlib.blake2b(b"".join(pieces[number] for number in sorted(pieces)), digest_size=32).hexdigest()
