"""Effects that drivers obey, facts that they state, and the life of their epochs."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from bus.messages.envelope import Count, Digest, Message, Name, Positive, Text
from bus.messages.migration import (
    CaughtUp,
    DropSequence,
    FollowSequence,
    HandOverSequence,
    HandOverTaken,
    ResumeSequence,
    SequenceDropped,
    SequenceReleased,
)
from bus.messages.placement import HeldModel, ModelCard, Source, Tier
from bus.messages.requests import Choice, Generation, ReplyTo, Span

Process = Annotated[int, Meta(ge=0)]

# ---- the life of a driver -----------------------------------------------------------------------------------


class StoreStarted(Message, frozen=True, tag="store.started"):
    """A storage driver says what it found. `dram_bytes` is its budget. `sequence` is filled in by the cell.

    `ssd_bytes`: the budget of its disk, 0 for none. `address`: the http base address under which other servers fetch
    its packed models (`<address>/<escaped model>` is one of them), empty for none. `dram_tier`: what its DRAM is, in
    words.
    """

    server: Name
    dram_bytes: Count
    models: tuple[HeldModel, ...] = ()
    process: Process = 0
    sequence: int = 0
    ssd_bytes: Count = 0
    address: Source = ""
    dram_tier: Annotated[str, Meta(max_length=200)] = ""


class WorkerStarted(Message, frozen=True, tag="worker.started"):
    """A worker driver starts empty. `memory_bytes`: what its device grants. `sequence` is filled in by the cell."""

    server: Name
    index: Count
    memory_bytes: Positive
    max_slots: Positive
    device: Annotated[str, Meta(max_length=64)] = "cpu"
    process: Process = 0
    sequence: int = 0


class DriverLost(Message, frozen=True, tag="driver.lost"):
    """watch: the driver's epoch is over (silence, a hole in its facts, a broken chain). Stated once per epoch.

    `leaving`: the driver itself says so, because its process was told to end.
    """

    driver: Name
    epoch: Positive
    reason: Text
    leaving: bool = False


class EpochClosed(Message, frozen=True, tag="epoch.closed"):
    """cell > driver: stop what you do and start a new epoch."""

    driver: Name
    epoch: Positive
    reason: Text


# ---- store ----------------------------------------------------------------------------------------------------


class LoadModel(Message, frozen=True, tag="model.load"):
    """Effect: bring the packed checkpoint to DRAM, verified. Answer: model.loaded, load.failed.

    Where it does not lie on the disk it is fetched from the first of `sources` that has it, to the disk and to DRAM on
    the way. `urgent`: loads that are not wait for those that are. `streamed`: it is larger than the budget of DRAM and
    comes to the disk alone.
    """

    model: Name
    digest: Annotated[str, Meta(max_length=128)]
    sources: tuple[Source, ...] = ()
    urgent: bool = True
    streamed: bool = False


class ModelLoaded(Message, frozen=True, tag="model.loaded"):
    """`tier`: from where its bytes came; `source`: where it can be had again, where that was remote."""

    model: Name
    loaded_bytes: Count
    duration_ns: Count
    tier: Tier = "ssd"
    source: Source = ""


class LoadFailed(Message, frozen=True, tag="load.failed"):
    """`gone`: the checkpoint is not (or no longer) usable on this server; `cancelled`: the load was, in time."""

    model: Name
    reason: Text
    gone: bool = False
    cancelled: bool = False


class CancelLoad(Message, frozen=True, tag="load.cancel"):
    """Effect: give up the load of this model. Answer: load.cancel-taken; the load itself ends by its own answer."""

    model: Name
    reason: Text


class LoadCancelTaken(Message, frozen=True, tag="load.cancel-taken"):
    """`found`: a load of it was under way or waited; its answer may still be that it was loaded."""

    model: Name
    found: bool


class EvictModel(Message, frozen=True, tag="model.evict"):
    """Effect: let the model go from DRAM, or (`tier` "ssd") from the disk, too; with "remote" what a fetch of it that
    broke off has left. `reason` says why this one.

    Answer: model.evicted.
    """

    model: Name
    reason: Text
    tier: Tier = "dram"


class ModelEvicted(Message, frozen=True, tag="model.evicted"):
    model: Name


class FindModel(Message, frozen=True, tag="model.find"):
    """Effect: look whether the model lies on this server, or at `source`. Answer: model.found, model.missing."""

    model: Name
    source: Source = ""


class ModelFound(Message, frozen=True, tag="model.found"):
    """`tier` "remote": it does not lie here, but `source` has it."""

    card: ModelCard
    tier: Tier = "ssd"
    source: Source = ""


class ModelMissing(Message, frozen=True, tag="model.missing"):
    model: Name
    reason: Text


class DeleteModel(Message, frozen=True, tag="model.delete"):
    """Effect: delete the packed checkpoint of this digest from this server. Answer: model.deleted, model.missing.

    Missing also means that other weights lie there by now: those are not meant.
    """

    model: Name
    digest: Annotated[str, Meta(max_length=128)] = ""


class ModelDeleted(Message, frozen=True, tag="model.deleted"):
    model: Name


# ---- worker ---------------------------------------------------------------------------------------------------


class AttachModel(Message, frozen=True, tag="model.attach"):
    """Effect: make the model, which lies in DRAM, computable. Answer: model.attached, attach.failed.

    `streamed`: it does not lie there, and is to be read from the SSD into the worker's own memory, past the page cache.
    """

    model: Name
    digest: Annotated[str, Meta(max_length=128)]
    slots: Positive
    kv_bytes: Positive
    context: Positive
    streamed: bool = False


class ModelAttached(Message, frozen=True, tag="model.attached"):
    model: Name
    slots: Positive
    duration_ns: Count


class AttachFailed(Message, frozen=True, tag="attach.failed"):
    """`retry`: another worker may do better (memory), otherwise the checkpoint itself is at fault."""

    model: Name
    reason: Text
    retry: bool = False


class DetachModel(Message, frozen=True, tag="model.detach"):
    """Effect: free the instance and its KV memory. Answer: model.detached."""

    model: Name


class ModelDetached(Message, frozen=True, tag="model.detached"):
    model: Name


class StartSequence(Message, frozen=True, tag="sequence.start"):
    """Effect: decode this request from `position` on; prompt and earlier tokens stand at the cited sequences.

    `generation`: the prompt itself where it is small. `choice`: the seed is larger by its index, readers are shown the
    family's id, and the worker ends nobody's stream.

    Answer: sequence.finished, sequence.refused, sequence.failed, sequence.released, each after the last page is
    acknowledged.
    """

    request: Name
    attempt: Positive
    model: Name
    accepted: Positive
    position: Count = 0
    history: tuple[Span, ...] = ()
    replies: tuple[ReplyTo, ...] = ()
    generation: Generation | None = None
    choice: Choice | None = None


class CancelSequence(Message, frozen=True, tag="sequence.cancel"):
    """Effect: end it at the next step. Answer: cancel.taken; the sequence itself ends through its own answer."""

    request: Name
    attempt: Positive
    reason: Annotated[str, Meta(pattern="^(cancelled|deadline)$")]


class CancelTaken(Message, frozen=True, tag="cancel.taken"):
    request: Name
    attempt: Positive
    found: bool


class AddReader(Message, frozen=True, tag="reader.add"):
    """Effect: show the sequence to one more reader, from its start position. Answer: reader.added.

    `found` false: the sequence had ended by then, and its end reaches this reader by another way.
    """

    request: Name
    attempt: Positive
    reply: ReplyTo


class ReaderAdded(Message, frozen=True, tag="reader.added"):
    request: Name
    attempt: Positive
    found: bool
    reply: ReplyTo


class SequenceFinished(Message, frozen=True, tag="sequence.finished"):
    """The end is durable. `first_page` and `last_page` are TOKENS sequences, 0 where no page was needed.

    `next`: the position after the last; `tokens_digest`: over all tokens of the answer; times from the effect's
    arrival: `prefill_ns` to the first token of this attempt, `total_ns` to the end.
    """

    request: Name
    attempt: Positive
    reason: Annotated[str, Meta(pattern="^(stop|length|cancelled|deadline)$")]
    first: Count
    next: Count
    first_page: Count = 0
    last_page: Count = 0
    prompt_tokens: Count = 0
    tokens_digest: Digest = ""
    prefill_ns: Count = 0
    total_ns: Count = 0


class SequenceRefused(Message, frozen=True, tag="sequence.refused"):
    """Not begun. `retry`: another worker may take it; otherwise the request itself is at fault."""

    request: Name
    attempt: Positive
    reason: Text
    retry: bool = False


class SequenceFailed(Message, frozen=True, tag="sequence.failed"):
    """Begun, and broken off by an error of this worker; durable positions stand."""

    request: Name
    attempt: Positive
    reason: Text
    first: Count = 0
    next: Count = 0
    first_page: Count = 0
    last_page: Count = 0


class SequenceProgress(msgspec.Struct, frozen=True, omit_defaults=True):
    """`next`: the first position that is not durable yet; `prompt_tokens`: those of its prompt, 0 where not said."""

    request: Name
    attempt: Positive
    next: Count
    tokens_digest: Digest
    prompt_tokens: Count = 0


class ProgressReported(Message, frozen=True, tag="progress.reported"):
    """At most once a second: durable positions of the running sequences (at most 256 of them)."""

    sequences: tuple[SequenceProgress, ...]


# ---- recovery -----------------------------------------------------------------------------------------------


class SealTokens(Message, frozen=True, tag="tokens.seal"):
    """gpu > sealer: append a SEAL to the token subject of this closed epoch, read up to it, state what it holds.

    Only of these `sequences` ("request/attempt"), whose pages stand behind TOKENS sequence `after`.
    """

    worker: Name
    epoch: Positive
    sequences: tuple[str, ...]
    after: Count = 0


class SealedSequence(msgspec.Struct, frozen=True, omit_defaults=True):
    """Durable tokens of one attempt, from position `first`; `end` where a page ended it."""

    request: Name
    attempt: Positive
    first: Count
    tokens: tuple[int, ...]
    first_page: Count
    last_page: Count
    end: Annotated[str, Meta(pattern="^(|stop|length|cancelled|deadline|handed-over)$")] = ""
    prompt_tokens: Count = 0


class SequencesSealed(Message, frozen=True, tag="sequences.sealed"):
    """The token subject of an epoch is closed for ever and held these sequences; `part` of `parts`, from 0.

    `sequence` is filled in by the cell: where this fact stands, which is how others cite the tokens.
    """

    worker: Name
    epoch: Positive
    sequences: tuple[SealedSequence, ...]
    part: Count = 0
    parts: Positive = 1
    sequence: int = 0


ANSWERS: dict[type[Message], tuple[type[Message], ...]] = {
    LoadModel: (ModelLoaded, LoadFailed),
    CancelLoad: (LoadCancelTaken,),
    EvictModel: (ModelEvicted,),
    FindModel: (ModelFound, ModelMissing),
    DeleteModel: (ModelDeleted, ModelMissing),
    AttachModel: (ModelAttached, AttachFailed),
    DetachModel: (ModelDetached,),
    StartSequence: (SequenceFinished, SequenceRefused, SequenceFailed, SequenceReleased),
    ResumeSequence: (SequenceFinished, SequenceRefused, SequenceFailed, SequenceReleased),
    FollowSequence: (CaughtUp, SequenceRefused),
    HandOverSequence: (HandOverTaken,),
    DropSequence: (SequenceDropped,),
    CancelSequence: (CancelTaken,),
    AddReader: (ReaderAdded,),
}
"""Which facts answer an effect: exactly one of them, exactly once."""
