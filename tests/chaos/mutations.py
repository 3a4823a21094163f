"""What is taken out of the shells, one thing at a time, to see whether the simulated world notices."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import msgspec

from actors import control, driver_core, replica, token_writer, worker_driver, worker_following, worker_prompts
from actors.cell import Cell, Step
from actors.rules import KNOWN_RULES
from bus.contract import Appended, Bus, Record
from bus.memory_stream import MemoryStream
from bus.messages import FactEnvelope, SealTokens, SequencesSealed, encode, kind_of
from bus.ordering import FactOrder, TakenFact, _read_body, _taken
from bus.snapshots import KEPT, Manifest, SnapshotStore
from bus.subjects import FactSubject, Subjects
from models.stub import StubEngine

Mutation = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def torn_snapshots_count() -> Iterator[None]:
    """The oldest snapshot is dropped for three newer ones, whole or not."""

    async def drop_old(self: SnapshotStore) -> list[Manifest]:
        found = await self.manifests()
        if len(found) >= KEPT:
            await self._log.drop(min(manifest.first for manifest in found[:KEPT]))
        return found

    async def is_whole(self: SnapshotStore, manifest: Manifest) -> bool:
        return True

    with (
        mock.patch.object(SnapshotStore, "_drop_old", drop_old),
        mock.patch.object(SnapshotStore, "_is_whole", is_whole),
    ):
        yield


def seal_does_nothing() -> contextlib.AbstractContextManager[Any]:
    """Recovery states an empty sealing at once: no seal stands on the subject, no page is read."""

    async def seal(bus: Bus, subjects: Subjects, order: SealTokens, me: str) -> None:
        sealed = SequencesSealed(order.worker, order.epoch, ())
        payload = encode(FactEnvelope("sealer", msgspec.Raw(encode(sealed))))
        await bus.ledger.append(subjects.fact(order.worker, kind_of(sealed)), payload, publisher=me)

    return mock.patch.object(control, "seal", seal)


def facts_are_not_held_back() -> contextlib.AbstractContextManager[Any]:
    """A driver's facts are taken as they come, whatever is missing before them."""

    def within(self: FactOrder, record: Record, subject: FactSubject, envelope: FactEnvelope) -> list[TakenFact]:
        current = self.state.drivers.get(subject.actor)
        if current is None or current.epoch != envelope.epoch or envelope.count < current.next:
            return []
        current.next = envelope.count + 1
        message, error = _read_body(envelope, subject.kind)
        return [_taken(record, subject.actor, envelope, message, error, current.epoch)]

    return mock.patch.object(FactOrder, "_within", within)


@contextlib.contextmanager
def epochs_are_ignored() -> Iterator[None]:
    """A driver takes effects of any epoch and boot, and its own epoch never ends."""
    original = driver_core.DriverCore._read_said

    def read_said(self: driver_core.DriverCore, record: Record, subject: Any) -> None:
        decode = driver_core.decode_said

        def ours(payload: bytes) -> Any:
            envelope = decode(payload)
            return msgspec.structs.replace(envelope, epoch=self.epoch, boot=self.boot) if envelope.epoch else envelope

        with mock.patch.object(driver_core, "decode_said", ours):
            original(self, record, subject)

    def read_fact(self: driver_core.DriverCore, record: Record, subject: FactSubject) -> None:
        envelope = driver_core.decode_fact(record.payload)
        if subject.kind in driver_core._STARTED_KINDS and envelope.boot == self.boot and not self.epoch:
            self.epoch = record.sequence

    core = driver_core.DriverCore
    with mock.patch.object(core, "_read_said", read_said), mock.patch.object(core, "_read_fact", read_fact):
        yield


def nobody_rescues() -> contextlib.AbstractContextManager[Any]:
    """What the leading replica did not publish stays missing."""
    return mock.patch.object(replica.Replica, "rescue", lambda self, at, last_sequence: None)


def writers_are_not_fenced() -> contextlib.AbstractContextManager[Any]:
    """A page is stored whatever stands on its subject by then."""
    original = MemoryStream.append

    def append(self: MemoryStream, subject: str, payload: bytes, **how: Any) -> Appended:
        if payload.startswith(b'{"page":'):
            how["expected_last"] = None
        return original(self, subject, payload, **how)

    return mock.patch.object(MemoryStream, "append", append)


@contextlib.contextmanager
def pages_are_not_awaited() -> Iterator[None]:
    """A worker shows its positions while their page is still on its way."""
    original = token_writer.TokenWriter.append

    async def append(self: token_writer.TokenWriter, payload: bytes) -> int:
        asyncio.get_running_loop().create_task(original(self, payload))
        return self.last + 1

    with mock.patch.object(token_writer.TokenWriter, "append", append):
        yield


def earlier_vectors_are_forgotten() -> contextlib.AbstractContextManager[Any]:
    """A worker that goes on with an embedding shows zeros for the inputs before it."""
    original = worker_prompts.Prompts.earlier

    async def earlier(self: worker_prompts.Prompts, start: Any, **wanted: bool) -> worker_prompts.Earlier:
        found = await original(self, start, **wanted)
        return found._replace(vectors=tuple(bytes(len(vector)) for vector in found.vectors))

    return mock.patch.object(worker_prompts.Prompts, "earlier", earlier)


def old_programs_go_on() -> contextlib.AbstractContextManager[Any]:
    """A control that does not know the rules in force decides by those that it knows."""
    original = Cell.take

    def take(self: Cell, record: Record) -> list[Step]:
        known, self.known_rules = self.known_rules, KNOWN_RULES
        try:
            return original(self, record)
        finally:
            self.known_rules = known
            if self.rules not in known:
                self.rules = known[-1]
                for actor in self.actors.values():
                    actor.rules = self.rules

    return mock.patch.object(Cell, "take", take)


def heirs_do_not_wait() -> contextlib.AbstractContextManager[Any]:
    """A destination decodes as soon as its cache is computed, while the source goes on."""
    admit = StubEngine.admit

    def impatient(self: StubEngine, start: Any) -> None:
        admit(self, dataclasses.replace(start, held=False))

    return mock.patch.object(StubEngine, "admit", impatient)


def heirs_forget_what_they_read() -> contextlib.AbstractContextManager[Any]:
    """A destination goes on from the position that it is told, with the last token that it read twice."""
    take = worker_following.FollowedSequence.take

    def forgetful(self: worker_following.FollowedSequence, part: Any) -> None:
        take(self, part)
        if len(self.tokens) > 1:
            self.tokens[-1] = self.tokens[-2]

    return mock.patch.object(worker_following.FollowedSequence, "take", forgetful)


def sources_are_released_at_once() -> contextlib.AbstractContextManager[Any]:
    """A source says that it has let go as it is told to, not once its last page is stored."""
    hand_over = worker_driver._Work._hand_over

    def hasty(self: worker_driver._Work, number: int, message: Any) -> None:
        hand_over(self, number, message)
        sequence = self._held.get(f"{message.request}/{message.attempt}")
        if sequence is not None and sequence.running:
            self._epoch.state(sequence.released(), answers=sequence.number)

    return mock.patch.object(worker_driver._Work, "_hand_over", hasty)
