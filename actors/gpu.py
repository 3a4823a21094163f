"""The deciding half of one GPU worker: which models its device holds, which sequences it runs.

    instance:  waiting (lease, room) ──▶ attaching ──▶ running ──▶ detaching ──▶ gone
    sequence:  run ──▶ held ──finished, refused, failed──▶ gone
                         └─ epoch closed ──▶ sealing ──sealed──▶ gone

Rules
* An epoch that closes takes everything with it: instances are gone, leases go back, and the sequences it held go on
  elsewhere only after its token subject is sealed, because only then is it certain which positions are durable.
* A model is attached after its lease is granted (it lies in DRAM) and after what had to make room is detached.
  A lease that is refused before that is asked for again afterwards: what is detached makes room in DRAM, too.
* A sequence that is followed (`standbys`) belongs to another worker until it is resumed: nothing of it is in this
  epoch's pages, so it needs no seal.
* A reader whom the driver did not get to before its epoch closed is sent back to the requests.
"""

from __future__ import annotations

from typing import Literal, cast

import msgspec

from actors.actor import Actor, Unexpected
from actors.gpu_state import GpuState, HeldSequence, Instance, Sealing, Standby
from bus.messages import (
    AbandonStart,
    AddReader,
    AttachFailed,
    AttachModel,
    CancelSequence,
    CancelTaken,
    CaughtUp,
    ContextsTold,
    ContextsWanted,
    DetachModel,
    DriverLost,
    DropHeir,
    DropSequence,
    Following,
    FollowSequence,
    GoOn,
    HandedOver,
    HandOver,
    HandOverSequence,
    HandOverTaken,
    HeirLost,
    HeirReady,
    InstanceFailed,
    InstanceReady,
    InstanceStopped,
    LeaseGranted,
    LeaseModel,
    LeaseRefused,
    LeaseReturned,
    ModelAttached,
    ModelDetached,
    ProgressReported,
    ReaderAdded,
    ReplyTo,
    ResumeSequence,
    RoundFinished,
    RunSequence,
    SealedSequence,
    SealTokens,
    SequenceContext,
    SequenceDropped,
    SequenceEnded,
    SequenceFailed,
    SequenceFinished,
    SequenceRefused,
    SequenceRejected,
    SequenceReleased,
    SequencesSealed,
    ShowFrom,
    Span,
    StartInstance,
    StartSequence,
    StopInstance,
    StopSequence,
    To,
    WorkerGone,
    WorkerReady,
    WorkerStarted,
)

Reason = Literal["", "stop", "length", "cancelled", "deadline"]


class Gpu(Actor):
    """See the head of this file. Its name is that of its driver: `gpu/<server>/<index>`."""

    State = GpuState
    state: GpuState

    # ---- the life of the driver -------------------------------------------------------------------------------

    def on_WorkerStarted(self, message: WorkerStarted, now: int) -> list[To]:
        if self.name != f"gpu/{message.server}/{message.index}":
            raise Unexpected(f"{self.name} is not worker {message.index} of server {message.server}")
        said = self._close()
        self.state.server, self.state.epoch, self.state.started = message.server, message.sequence, message
        ready = WorkerReady(self.name, message.server, message.memory_bytes, message.max_slots)
        return [*said, To("placement", ready)]

    def on_DriverLost(self, message: DriverLost, now: int) -> list[To]:
        """Also of a later epoch: one whose `started` could not be taken."""
        left = message.leaving and self.rules >= 3
        return self._close(left=left) if message.epoch >= self.state.epoch else []

    def _close(self, *, left: bool = False) -> list[To]:
        if not self.state.epoch:
            return []
        said: list[To] = []
        held_back = [r for r in self.state.readers if _key(r.request, r.attempt) not in self.state.sequences]
        if self.state.sequences:
            after = min(held.after for held in self.state.sequences.values())
            seal = SealTokens(self.name, self.state.epoch, tuple(self.state.sequences), after)
            self.state.sealing[self.state.epoch] = Sealing(self.state.sequences, {}, left)
            self.state.sequences = {}
            said.append(To("sealer", seal))
        said.append(To("placement", WorkerGone(self.name)))
        for standby in self.state.standbys.values():
            if not standby.dropping:
                lost = HeirLost(standby.request, standby.attempt, f"{self.name} was lost")
                said.append(To("migration", lost))
        self.state.standbys = {}
        for model in self.state.instances:
            said.append(To(self._store, LeaseReturned(self.name, model)))
        for reader in held_back:
            said.append(To("requests", ReaderAdded(reader.request, reader.attempt, False, reader.reply)))
        self.state.instances, self.state.readers = {}, []
        self.state.epoch, self.state.started = 0, None
        return said

    def on_SequencesSealed(self, message: SequencesSealed, now: int) -> list[To]:
        sealing = self.state.sealing.get(message.epoch)
        if sealing is None or message.part in sealing.parts:
            return []
        sealing.parts[message.part] = True
        said = []
        for sealed in message.sequences:
            held = sealing.sequences.pop(_key(sealed.request, sealed.attempt), None)
            if held is not None:
                said.append(To("requests", self._sealed(message, sealed, sealing.left)))
        if len(sealing.parts) == message.parts:
            for held in sealing.sequences.values():
                said.append(To("requests", SequenceEnded(held.request, held.attempt, "", left=sealing.left)))
            del self.state.sealing[message.epoch]
        return said

    def _sealed(self, message: SequencesSealed, sealed: SealedSequence, left: bool) -> SequenceEnded:
        """With a span wherever a page ended it, be it empty: that says that no worker shows the end."""
        span = None
        if sealed.tokens or sealed.end:
            span = Span(
                worker=self.name,
                epoch=message.epoch,
                attempt=sealed.attempt,
                first=sealed.first,
                next=sealed.first + len(sealed.tokens),
                first_page=sealed.first_page,
                last_page=sealed.last_page,
                sealed=message.sequence,
            )
        reason = cast(Reason, sealed.end) if sealed.end != "handed-over" else ""
        return SequenceEnded(
            sealed.request, sealed.attempt, reason, span, sealed.prompt_tokens, left=left and not reason
        )

    # ---- instances --------------------------------------------------------------------------------------------

    def on_StartInstance(self, message: StartInstance, now: int) -> list[To]:
        if not self.state.epoch or message.model in self.state.instances:
            reason = "the worker is not up" if not self.state.epoch else "the model is on this worker already"
            return [To("placement", InstanceFailed(self.name, message.model, reason, retry=True))]
        said = []
        for model in message.evict:
            said += self._detach(model)
        instance = self.state.instances[message.model] = Instance(
            slots=message.slots,
            kv_bytes=message.kv_bytes,
            context=message.context,
            card=message.card,
            sources=message.sources,
            urgent=message.urgent,
            keep=message.keep,
            evicting=list(message.evict),
        )
        return [*said, self._lease(message.model, instance)]

    def on_AbandonStart(self, message: AbandonStart, now: int) -> list[To]:
        instance = self.state.instances.get(message.model)
        if instance is None or instance.status != "waiting":
            return []
        del self.state.instances[message.model]
        return [
            To(self._store, LeaseReturned(self.name, message.model, abandoned=True)),
            To("placement", InstanceStopped(self.name, message.model)),
        ]

    def _lease(self, model: str, instance: Instance) -> To:
        one = instance
        return To(self._store, LeaseModel(self.name, model, one.sources, one.urgent, one.card, one.keep))

    def on_StopInstance(self, message: StopInstance, now: int) -> list[To]:
        return self._detach(message.model)

    def _detach(self, model: str) -> list[To]:
        instance = self.state.instances.get(model)
        if instance is None or instance.status != "running":
            raise Unexpected(f"{self.name} cannot stop {model}: it does not run here")
        followed = any(one.model == model and not one.dropping for one in self.state.standbys.values())
        if followed or any(held.model == model for held in self.state.sequences.values()):
            raise Unexpected(f"{self.name} cannot stop {model}: sequences run on it")
        instance.status = "detaching"
        return [To(self._driver, DetachModel(model))]

    def on_ModelDetached(self, message: ModelDetached, now: int) -> list[To]:
        del self.state.instances[message.model]
        said = [
            To(self._store, LeaseReturned(self.name, message.model)),
            To("placement", InstanceStopped(self.name, message.model)),
        ]
        for model, instance in self.state.instances.items():
            if message.model not in instance.evicting:
                continue
            instance.evicting.remove(message.model)
            if not instance.evicting and not instance.asked:
                instance.asked = True
                said.append(self._lease(model, instance))
            said += self._attach(model, instance)
        return said

    def on_LeaseGranted(self, message: LeaseGranted, now: int) -> list[To]:
        instance = self.state.instances.get(message.model)
        if instance is None or instance.status != "waiting":
            return [To(self._store, LeaseReturned(self.name, message.model))]
        instance.leased, instance.digest, instance.tier = True, message.digest, message.tier
        instance.streamed = message.streamed
        return self._attach(message.model, instance)

    def on_LeaseRefused(self, message: LeaseRefused, now: int) -> list[To]:
        instance = self.state.instances.get(message.model)
        if instance is None or instance.status != "waiting":
            return []
        if message.retry and instance.evicting:
            instance.asked = False
            return []
        del self.state.instances[message.model]
        return [To("placement", InstanceFailed(self.name, message.model, message.reason, message.retry))]

    def _attach(self, model: str, instance: Instance) -> list[To]:
        if instance.status != "waiting" or not instance.leased or instance.evicting:
            return []
        instance.status = "attaching"
        attach = AttachModel(
            model, instance.digest, instance.slots, instance.kv_bytes, instance.context, instance.streamed
        )
        return [To(self._driver, attach)]

    def on_ModelAttached(self, message: ModelAttached, now: int) -> list[To]:
        instance = self.state.instances[message.model]
        instance.status, instance.slots = "running", message.slots
        ready = InstanceReady(self.name, message.model, message.slots, instance.tier, message.duration_ns)
        return [To("placement", ready)]

    def on_AttachFailed(self, message: AttachFailed, now: int) -> list[To]:
        del self.state.instances[message.model]
        return [
            To(self._store, LeaseReturned(self.name, message.model)),
            To("placement", InstanceFailed(self.name, message.model, message.reason, message.retry)),
        ]

    # ---- sequences --------------------------------------------------------------------------------------------

    def on_RunSequence(self, message: RunSequence, now: int) -> list[To]:
        instance = self.state.instances.get(message.model)
        if instance is None or instance.status != "running":
            reason = f"{message.model} does not run on {self.name}"
            return [To("requests", SequenceRejected(message.request, message.attempt, reason, retry=True))]
        held = HeldSequence(
            message.request,
            message.attempt,
            message.model,
            message.position,
            self.state.last_page,
            several=message.choice is not None,
        )
        self.state.sequences[_key(message.request, message.attempt)] = held
        start = StartSequence(
            request=message.request,
            attempt=message.attempt,
            model=message.model,
            accepted=message.accepted,
            position=message.position,
            history=message.history,
            replies=message.replies,
            generation=message.generation,
            choice=message.choice,
        )
        return [To(self._driver, start)]

    def on_StopSequence(self, message: StopSequence, now: int) -> list[To]:
        if _key(message.request, message.attempt) not in self.state.sequences:
            return []
        return [To(self._driver, CancelSequence(message.request, message.attempt, message.reason))]

    def on_ShowFrom(self, message: ShowFrom, now: int) -> list[To]:
        if _key(message.request, message.attempt) not in self.state.sequences:
            return []
        reader = AddReader(message.request, message.attempt, message.reply)
        self.state.readers.append(reader)
        return [To(self._driver, reader)]

    def on_SequenceFinished(self, message: SequenceFinished, now: int) -> list[To]:
        held = self._drop(message.request, message.attempt)
        self.state.last_page = max(self.state.last_page, message.last_page)
        span = self._span(message.attempt, message.first, message.next, message.first_page, message.last_page)
        ended = SequenceEnded(
            message.request,
            message.attempt,
            cast(Reason, message.reason),
            span,
            message.prompt_tokens,
            self._missed(message.request, message.attempt) if held.several else (),
        )
        return [To("requests", ended)]

    def _missed(self, request: str, attempt: int) -> tuple[ReplyTo, ...]:
        """Readers of this sequence whom the driver has not answered for: it ended before it got to them."""
        missed = [one for one in self.state.readers if (one.request, one.attempt) == (request, attempt)]
        for one in missed:
            self.state.readers.remove(one)
        return tuple(one.reply for one in missed)

    def on_SequenceRefused(self, message: SequenceRefused, now: int) -> list[To]:
        standby = self.state.standbys.get(_key(message.request, message.attempt))
        if standby is not None:
            if standby.dropping:  # its own answer says when it is gone
                return []
            del self.state.standbys[_key(message.request, message.attempt)]
            return [To("migration", HeirLost(message.request, message.attempt, message.reason))]
        self._drop(message.request, message.attempt)
        return [To("requests", SequenceRejected(message.request, message.attempt, message.reason, retry=message.retry))]

    def on_SequenceFailed(self, message: SequenceFailed, now: int) -> list[To]:
        self._drop(message.request, message.attempt)
        span = self._span(message.attempt, message.first, message.next, message.first_page, message.last_page)
        rejected = SequenceRejected(
            message.request, message.attempt, message.reason, code="engine_error", retry=True, span=span
        )
        return [To("requests", rejected)]

    def on_CancelTaken(self, message: CancelTaken, now: int) -> list[To]:
        return []

    def on_ReaderAdded(self, message: ReaderAdded, now: int) -> list[To]:
        reader = AddReader(message.request, message.attempt, message.reply)
        if reader not in self.state.readers:
            return []  # told with the end already
        self.state.readers.remove(reader)
        return [] if message.found else [To("requests", message)]

    def on_ProgressReported(self, message: ProgressReported, now: int) -> list[To]:
        for progress in message.sequences:
            held = self.state.sequences.get(_key(progress.request, progress.attempt))
            if held is not None:
                held.next = max(held.next, progress.next)
                held.prompt_tokens = progress.prompt_tokens or held.prompt_tokens
        return []

    def on_ContextsWanted(self, message: ContextsWanted, now: int) -> list[To]:
        told = (SequenceContext(h.request, h.attempt, h.prompt_tokens + h.next) for h in self.state.sequences.values())
        return [To("placement", ContextsTold(self.name, tuple(told)))]

    # ---- sequences that move ------------------------------------------------------------------------------------

    def on_Following(self, message: Following, now: int) -> list[To]:
        """As the source: say where to follow. As the heir: follow."""
        if message.source == self.name and not message.epoch:
            held = self.state.sequences.get(_key(message.request, message.source_attempt))
            if held is None:
                reason = f"{self.name} does not run it any more"
                return [To("migration", HeirLost(message.request, message.attempt, reason))]
            return [To(message.heir, msgspec.structs.replace(message, epoch=self.state.epoch, after=held.after))]
        instance = self.state.instances.get(message.model)
        if instance is None or instance.status != "running":
            reason = f"{message.model} does not run on {self.name}"
            return [To("migration", HeirLost(message.request, message.attempt, reason))]
        standby = Standby(message.request, message.attempt, message.model, several=message.choice is not None)
        self.state.standbys[_key(message.request, message.attempt)] = standby
        follow = FollowSequence(
            request=message.request,
            attempt=message.attempt,
            model=message.model,
            accepted=message.accepted,
            source=message.source,
            epoch=message.epoch,
            source_attempt=message.source_attempt,
            after=message.after,
            position=message.position,
            history=message.history,
            generation=message.generation,
            choice=message.choice,
        )
        return [To(self._driver, follow)]

    def on_RoundFinished(self, message: RoundFinished, now: int) -> list[To]:
        return []

    def on_CaughtUp(self, message: CaughtUp, now: int) -> list[To]:
        standby = self.state.standbys.get(_key(message.request, message.attempt))
        if standby is None or standby.dropping:
            return []
        return [To("migration", HeirReady(message.request, message.attempt, message.rounds, message.position))]

    def on_DropHeir(self, message: DropHeir, now: int) -> list[To]:
        standby = self.state.standbys.get(_key(message.request, message.attempt))
        if standby is None or standby.dropping:
            return []
        standby.dropping = True
        return [To(self._driver, DropSequence(message.request, message.attempt))]

    def on_SequenceDropped(self, message: SequenceDropped, now: int) -> list[To]:
        self.state.standbys.pop(_key(message.request, message.attempt), None)
        return []

    def on_HandOver(self, message: HandOver, now: int) -> list[To]:
        if _key(message.request, message.attempt) not in self.state.sequences:
            return []
        return [To(self._driver, HandOverSequence(message.request, message.attempt))]

    def on_HandOverTaken(self, message: HandOverTaken, now: int) -> list[To]:
        return []

    def on_SequenceReleased(self, message: SequenceReleased, now: int) -> list[To]:
        self._drop(message.request, message.attempt)
        self.state.last_page = max(self.state.last_page, message.last_page)
        span = self._span(message.attempt, message.first, message.next, message.first_page, message.last_page)
        return [To("requests", HandedOver(message.request, message.attempt, span, message.prompt_tokens))]

    def on_GoOn(self, message: GoOn, now: int) -> list[To]:
        key = _key(message.request, message.attempt)
        standby = self.state.standbys.pop(key, None)
        if standby is None or standby.dropping:
            reason = f"{self.name} did not follow it"
            return [To("requests", SequenceRejected(message.request, message.attempt, reason, retry=True))]
        held = HeldSequence(message.request, message.attempt, standby.model, message.position, self.state.last_page)
        held.several = standby.several
        self.state.sequences[key] = held
        resume = ResumeSequence(message.request, message.attempt, message.position, message.history, message.replies)
        return [To(self._driver, resume)]

    # ---- what they have in common -----------------------------------------------------------------------------

    @property
    def _store(self) -> str:
        return f"store/{self.state.server}"

    @property
    def _driver(self) -> str:
        return f"driver/{self.name}"

    def _drop(self, request: str, attempt: int) -> HeldSequence:
        held = self.state.sequences.pop(_key(request, attempt), None)
        if held is None:
            raise Unexpected(f"{self.name} holds no attempt {attempt} of request {request}")
        return held

    def _span(self, attempt: int, first: int, following: int, first_page: int, last_page: int) -> Span | None:
        if following <= first:
            return None
        return Span(self.name, self.state.epoch, attempt, first, following, first_page, last_page)


def _key(request: str, attempt: int) -> str:
    return f"{request}/{attempt}"
