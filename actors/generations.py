"""Generations: the ledger's beginning becomes a verified recording and is dropped, so that the ledger stays finite.

    two whole snapshots ─▶ recording of all up to the newer one ─▶ verified from its own start: every message, and both
    states ─▶ the state at the cut is kept beside it ─▶ drop what is before the cut

The cut is the older of the two snapshots, so that two starts are left, and never behind what somebody may still need:
the fact that accepted a request which has not ended, a sealed statement that such a request cites, and what is younger
than `keep_seconds`, by when every driver that lives has read it (one that does not is lost within seconds, and a reader
that missed something is told so).

Every step may be repeated, by anybody, at any time: files take their names when they are whole, the recording is
verified as it lies on the disk, and dropping again drops nothing. Only the last step changes the ledger.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from actors.cell import Cell
from actors.cell_snapshots import Start, decode_stored
from actors.readback import Readback
from actors.replay import collect_accepted
from actors.replaying import started_from
from actors.request_state import RequestsState
from actors.rules import UnknownRules
from bus.contract import Bus
from bus.errors import UserError
from bus.recording import Recording, RecordingWriter, copy_into
from bus.snapshots import Manifest, agrees, whole_snapshots
from bus.subjects import Subjects

KEEP_SECONDS = 60.0
_DIGEST_BYTES = 32

Say = Callable[[str], None]


class RotationRefused(UserError):
    """There is no generation to be made now; the message says why, and what to do."""

    exit_code = 1


class GenerationBroken(UserError):
    """A recording does not say what the ledger did: nothing was dropped."""

    exit_code = 3


class Generation(msgspec.Struct, frozen=True):
    """What became of the ledger's beginning: `first` to `last` are in the recording, `dropped` is gone up to there."""

    recording: str
    first: int
    last: int
    cut: int
    dropped: int
    verified: int
    bytes: int
    held_back_by: str = ""


class Kept(NamedTuple):
    """A state with the manifest that says where it belongs."""

    manifest: Manifest
    body: bytes


async def rotate(
    bus: Bus, cell: str, folder: Path, *, keep_seconds: float = KEEP_SECONDS, least_percent: int = 0, say: Say
) -> Generation:
    """Make one generation; none where less than `least_percent` of the ledger would go.

    Raises `RotationRefused`, `GenerationBroken`, `RecordingError`, `Difference` and `BusError`. After any of them, and
    after a crash at any moment, the ledger is whole and the same call may be made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subjects = Subjects(cell)
    usage = await bus.ledger.usage()
    first = usage.first_sequence
    newest, cut = await two_snapshots(bus, subjects, first, keep_seconds)
    before, why = droppable_before(cell, newest, cut)
    share = (before - first) * 100 // max(1, usage.last_sequence - first + 1)
    if before <= first or share < least_percent:
        held = f"request {why} has not ended and was accepted at {before}" if why else "two snapshots are kept"
        raise RotationRefused(f"only {share} % of the ledger of {cell!r} could be dropped: {held}")
    start = await _begin(bus, subjects, folder, first) if first > 1 else None
    path = folder / f"{cell}-{first:012d}-{newest.manifest.position:012d}.lsrec"
    say(f"writing {path.name}")
    await _record(bus, cell, path, newest.manifest.position, start)
    say(f"verifying {path.name}")
    verified = await asyncio.to_thread(_verify, path, cell, cut, newest)
    _keep(folder, cell, cut)
    say(f"dropping the ledger before {before}")
    await bus.ledger.drop(before)
    left = await bus.ledger.usage()
    _forget(folder, cell, left.first_sequence)
    return Generation(
        recording=str(path),
        first=first,
        last=newest.manifest.position,
        cut=cut.manifest.position,
        dropped=left.first_sequence - 1,
        verified=verified,
        bytes=path.stat().st_size,
        held_back_by=why,
    )


async def two_snapshots(bus: Bus, subjects: Subjects, first: int, keep_seconds: float) -> tuple[Kept, Kept]:
    """The newest, and the next older one that is old enough."""
    found = [Kept(*one) for one in await whole_snapshots(bus, subjects, first)]
    distinct = [one for i, one in enumerate(found) if i == 0 or one.manifest.position != found[i - 1].manifest.position]
    limit = bus.wall() - int(keep_seconds * 1e9)
    for older in distinct[1:]:
        record = await bus.ledger.get(older.manifest.position)
        if record is not None and record.timestamp <= limit and older.manifest.position > first:
            return distinct[0], older
    raise RotationRefused(
        f"of the ledger of {subjects.cell!r} nothing can be dropped yet: that takes two snapshots behind its beginning "
        f"({first}), of which one is older than {keep_seconds:g} s; there are {len(distinct)} "
        "(`longshore ledger snapshot` has a control take one)"
    )


async def _record(bus: Bus, cell: str, path: Path, last: int, start: Kept | None) -> None:
    for left_over in path.parent.glob(f".{path.name}.*.part"):
        left_over.unlink(missing_ok=True)
    with RecordingWriter(path, cell, bus.wall(), force=True) as writer:
        if start is not None:
            writer.start_from(start.manifest.position, start.body)
        await copy_into(writer, bus, last)


def _verify(path: Path, cell: str, cut: Kept, newest: Kept) -> int:
    """Replay the file; how many messages are as they should be. Raises `GenerationBroken`, and `Difference`."""
    recording = Recording.open(path)
    recording.verify()
    begun = started_from(recording) if recording.header.snapshot else None
    if begun is None and recording.header.ledger.first > 1:
        raise RotationRefused(f"{path} begins at {recording.header.ledger.first} and holds no state to go on from")
    accepted = collect_accepted(recording.ledger()) | (begun.accepted if begun is not None else frozenset())
    readback = Readback(begun.cell if begun is not None else Cell(cell), accepted)
    began = readback.position
    states = {one.manifest.position: one for one in (cut, newest)}
    collecting = gc.isenabled()
    gc.disable()  # as in a replay: nothing here makes cycles
    try:
        for record in recording.ledger():
            if record.sequence > began:
                readback.take(record, 0.0)
            kept = states.get(record.sequence)
            if kept is not None and readback.cell.snapshot() != _state(cell, kept).cell.snapshot():
                raise GenerationBroken(
                    f"the snapshot at ledger sequence {record.sequence} is not the state that {path} leads to: "
                    "nothing was dropped; look at it with `longshore replay --verify`"
                )
    finally:
        if collecting:
            gc.enable()
    missing = [one.fact for one in readback.expected.values() if one.fact <= cut.manifest.position]
    if missing:
        raise GenerationBroken(f"{len(missing)} messages of facts up to {missing[-1]} are missing in {path}")
    return readback.verified


def _state(cell: str, kept: Kept) -> Start:
    try:
        return decode_stored(cell, kept.body, kept.manifest)
    except (ValueError, UnknownRules) as error:
        raise RotationRefused(f"the snapshot {kept.manifest.name} cannot be read by this release: {error}") from None


def droppable_before(cell: str, newest: Kept, cut: Kept) -> tuple[int, str]:
    """Up to where the ledger may be dropped (not included), and which request holds it back from the cut."""
    before, why = cut.manifest.position, ""
    actor = _state(cell, newest).cell.actors.get("requests")
    requests = cast(RequestsState, actor.state).requests if actor is not None else {}
    for name, request in requests.items():
        if request.status == "ended":
            continue
        for cited in (request.accepted, *(span.sealed for span in request.spans if span.sealed)):
            if cited < before:
                before, why = cited, name
    return before, why


# ---- the state that the next generation begins with ---------------------------------------------------------


def _kept_path(folder: Path, cell: str, position: int) -> Path:
    return folder / f"{cell}-{position:012d}.lssnap"


def _keep(folder: Path, cell: str, cut: Kept) -> None:
    """The state at the cut, for the next recording to begin with: the stream of snapshots keeps only the newest."""
    manifest = msgspec.json.encode(cut.manifest)
    data = len(manifest).to_bytes(4, "little") + manifest + cut.body
    path = _kept_path(folder, cell, cut.manifest.position)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest() + data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _forget(folder: Path, cell: str, first: int) -> None:
    """States from which the ledger cannot be gone on any more stand in the recordings that begin with them."""
    for path in folder.glob(f"{cell}-*.lssnap"):
        position = path.stem.rpartition("-")[2]
        if position.isdigit() and int(position) + 1 < first:
            path.unlink(missing_ok=True)


async def _begin(bus: Bus, subjects: Subjects, folder: Path, first: int) -> Kept:
    """What the ledger, which begins at `first`, goes on from: the state kept at the last cut, or the oldest one."""
    found: list[Kept] = []
    for path in sorted(folder.glob(f"{subjects.cell}-*.lssnap")):
        data = path.read_bytes()
        digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
            continue
        at = 4 + int.from_bytes(body[:4], "little")
        found.append(Kept(msgspec.json.decode(body[4:at], type=Manifest), body[at:]))
    for kept in sorted(found, key=lambda one: one.manifest.position):
        if kept.manifest.position + 1 >= first and await agrees(bus.ledger, kept.manifest):
            return kept
    stored = await whole_snapshots(bus, subjects, first)
    if not stored:
        raise RotationRefused(
            f"the ledger of {subjects.cell!r} begins at {first}, and neither {folder} nor its snapshots have a state "
            "that it goes on from"
        )
    return Kept(*stored[-1])
