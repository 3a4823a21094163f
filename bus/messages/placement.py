"""Models, servers, workers and instances: what placement knows and what it orders."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bus.messages.envelope import Count, Message, Name, Positive, Text

Tier = Literal["remote", "ssd", "dram"]
"""Where a server has a model nearest: in DRAM, on its SSD, or only elsewhere, from where it can be fetched."""

Source = Annotated[str, Meta(max_length=2000)]
"""Where a packed checkpoint can be fetched: an absolute directory or an http(s) address; empty for nowhere known."""


class ModelCard(msgspec.Struct, frozen=True, omit_defaults=True):
    """What deciding needs to know of a packed checkpoint.

    `weight_bytes` and `kv_bytes_per_token` in bytes, `context` in tokens (prompt and answer), `digest` names the
    very bytes. An `encoder` has no language-model head: it makes embeddings and no text.
    """

    model: Name
    digest: Annotated[str, Meta(max_length=128)]
    weight_bytes: Positive
    context: Positive
    kv_bytes_per_token: Positive
    vocabulary: Positive
    architecture: Annotated[str, Meta(max_length=128)] = ""
    chat: bool = False
    kind: Literal["decoder", "encoder"] = "decoder"


class HeldModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that a store found on its server, and the tier it lies in. `source`: where it can be had again."""

    card: ModelCard
    tier: Tier = "ssd"
    source: Source = ""


# ---- facts ------------------------------------------------------------------------------------------------


class ModelAdded(Message, frozen=True, tag="model.added"):
    """An operator has packed a model under this name; the stores are asked to look for it, here or at `source`."""

    model: Name
    source: Source = ""


class ModelRemoved(Message, frozen=True, tag="model.removed"):
    """An operator wants the model gone: no new requests, instances stop when idle, then the stores drop it."""

    model: Name


class PlacementConfigured(Message, frozen=True, tag="placement.configured"):
    """`queue_limit` bounds the requests that wait for a slot, over all models."""

    queue_limit: Positive = 1000


class DrainRequested(Message, frozen=True, tag="drain.requested"):
    """An operator wants nothing to run on this server any more; `undo`: it is in service again.

    `deadline_ms`: how long what runs there may take to move; the rest is left to recovery. `leave`: then its process
    ends.
    """

    server: Name
    deadline_ms: Count = 30_000
    leave: bool = False
    undo: bool = False


class ModelWanted(Message, frozen=True, tag="model.wanted"):
    """An operator wants this model in DRAM before requests come: on this server, or where it is there soonest.

    `sequence` is filled in by the cell.
    """

    model: Name
    server: Annotated[str, Meta(max_length=200)] = ""
    sequence: int = 0


# ---- between actors ---------------------------------------------------------------------------------------


class ServerReady(Message, frozen=True, tag="server.ready"):
    """store > placement: this server is up, with this DRAM budget in bytes, and holds these models.

    `ssd_bytes`: the budget of its disk, 0 for none; `address`: where others fetch its packed models, empty for nowhere.
    """

    server: Name
    dram_bytes: Count
    models: tuple[HeldModel, ...]
    ssd_bytes: Count = 0
    address: Source = ""


class ServerGone(Message, frozen=True, tag="server.gone"):
    """store > placement: the storage driver of this server is lost."""

    server: Name


class ServerDrained(Message, frozen=True, tag="server.drained"):
    """placement > node: nothing runs on this server any more, or its time is over and `left` sequences do.

    `leave`: the process of the server is to end. `reason`: why it was not drained.
    """

    server: Name
    left: Count = 0
    leave: bool = False
    reason: Text = ""


class ModelHeld(Message, frozen=True, tag="model.held"):
    """store > placement: the nearest tier in which this server holds the model now.

    `duration_ns`: of a finished load, 0 where none was needed; `loaded_from`: the tier that it read, and `source`:
    where the model can be had again.
    """

    server: Name
    card: ModelCard
    tier: Tier
    duration_ns: Count = 0
    loaded_from: Tier = "ssd"
    source: Source = ""


class ModelGone(Message, frozen=True, tag="model.gone"):
    """store > placement: this server no longer holds the model at all."""

    server: Name
    model: Name


class ModelReplaced(Message, frozen=True, tag="model.replaced"):
    """store > placement: a newer version lies here; it is served once no instance here holds the old one any more."""

    server: Name
    model: Name


class LookForModel(Message, frozen=True, tag="model.look"):
    """placement > store: see whether the model lies on your server, or can be fetched from `source`."""

    model: Name
    source: Source = ""


class DropModel(Message, frozen=True, tag="model.drop"):
    """placement > store: delete the model as soon as no lease is left."""

    model: Name


class WarmModel(Message, frozen=True, tag="model.warm"):
    """placement > store: bring the model to DRAM, for nobody yet; what else see `LeaseModel`.

    `asked`: the fact that wants it; `tier`: from where it comes; `ready_ns`: until it is there, as estimated, the
    soonest of `weighed` servers.
    """

    model: Name
    asked: Count
    tier: Tier
    ready_ns: Count
    weighed: Positive = 1
    sources: tuple[Source, ...] = ()
    card: ModelCard | None = None
    keep: tuple[str, ...] = ()


class ModelWarmed(Message, frozen=True, tag="model.warmed"):
    """What became of the wish `asked`: the model lies in DRAM there, or `reason` says why it does not."""

    model: Name
    asked: Count
    server: Annotated[str, Meta(max_length=200)] = ""
    reason: Text = ""


class WorkerReady(Message, frozen=True, tag="worker.ready"):
    """gpu > placement: this worker is up and empty. `memory_bytes`: of its device; `max_slots`: per instance."""

    worker: Name
    server: Name
    memory_bytes: Positive
    max_slots: Positive


class WorkerGone(Message, frozen=True, tag="worker.gone"):
    """gpu > placement: its epoch is closed; whatever ran there does so no longer."""

    worker: Name


class StartInstance(Message, frozen=True, tag="instance.start"):
    """placement > gpu: make room by stopping the idle models of `evict`, then start `model`.

    `sources`: from where the store may fetch it, in order of preference; `urgent`: somebody waits for it; `card`: what
    it is, for a store that has never heard of it; `keep`: models of that server that requests wait for, too.
    """

    model: Name
    slots: Positive
    kv_bytes: Positive
    context: Positive
    evict: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    urgent: bool = True
    card: ModelCard | None = None
    keep: tuple[str, ...] = ()


class AbandonStart(Message, frozen=True, tag="instance.abandon"):
    """placement > gpu: nobody waits for this start any more; what has not come as far as the device is given up."""

    model: Name


class StopInstance(Message, frozen=True, tag="instance.stop"):
    """placement > gpu: stop this idle instance."""

    model: Name


class InstanceReady(Message, frozen=True, tag="instance.ready"):
    """gpu > placement: running, with this many slots. `tier`: where its weights came from; `attach_ns`: device part."""

    worker: Name
    model: Name
    slots: Positive
    tier: Tier
    attach_ns: Count = 0


class InstanceFailed(Message, frozen=True, tag="instance.failed"):
    """gpu > placement: did not start. `retry`: the same may work elsewhere or later."""

    worker: Name
    model: Name
    reason: Text
    retry: bool = False


class InstanceStopped(Message, frozen=True, tag="instance.stopped"):
    """gpu > placement: its memory is free again."""

    worker: Name
    model: Name


class LeaseModel(Message, frozen=True, tag="lease.take"):
    """gpu > store: bring the model to DRAM and keep it there for this worker; see `StartInstance`."""

    worker: Name
    model: Name
    sources: tuple[Source, ...] = ()
    urgent: bool = True
    card: ModelCard | None = None
    keep: tuple[str, ...] = ()


class LeaseReturned(Message, frozen=True, tag="lease.returned"):
    """gpu > store: this worker no longer uses the model. `abandoned`: nobody wants it, so that a load under way may be
    broken off."""

    worker: Name
    model: Name
    abandoned: bool = False


class LeaseGranted(Message, frozen=True, tag="lease.granted"):
    """store > gpu: the model lies in DRAM. `tier`: from where it came.

    `streamed`: it is larger than the budget of DRAM; its files stay on the SSD, and the worker reads them itself.
    """

    model: Name
    digest: Annotated[str, Meta(max_length=128)]
    tier: Tier
    streamed: bool = False


class LeaseRefused(Message, frozen=True, tag="lease.refused"):
    """store > gpu: the model cannot be brought to DRAM. `retry`: it may later or elsewhere."""

    model: Name
    reason: Text
    retry: bool = False


# ---- records: what placement thought, for whoever asks why ---------------------------------------------------


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker that was weighed. Times in nanoseconds; the sum is what is compared.

    queue_ns: bytes queued on that server's loading path / bandwidth (PAPER, q); load_ns: bytes / bandwidth of the
    slowest stage (n/b); free_ns: to stop what is evicted; attach_ns: to attach from DRAM. busy: sequences that this
    device computes already, or will as soon as what starts there runs; from rule version 2 on. error_ns: by how much
    loads from that tier took longer or shorter than estimated there so far; from rule version 3 on.
    """

    worker: Name
    tier: Tier
    queue_ns: Count
    load_ns: Count
    free_ns: Count
    attach_ns: Count
    evict: tuple[str, ...] = ()
    busy: Count = 0
    error_ns: Count = 0


class PlacementDecided(Message, frozen=True, tag="placement.decided"):
    """placement > record: why this worker starts this model now. `candidates` are at most 8, the least first."""

    model: Name
    worker: Name
    request: Name
    waiting: Count
    candidates: tuple[Candidate, ...]
    weighed: Positive


class PlannedMove(msgspec.Struct, frozen=True, omit_defaults=True):
    """A running sequence that is to move, and where to. `tokens`: prompt and answer so far, estimated; `starts`: its
    model starts there for it; `resume_ns`: until it goes on there, with the start."""

    request: Name
    model: Name
    to: Name
    tokens: Count = 0
    starts: bool = False
    resume_ns: Count = 0


class PlacementExchanged(Message, frozen=True, tag="placement.exchanged"):
    """placement > record: what runs on this worker is to go on elsewhere, so that `model` starts there for `request`.

    Times in nanoseconds until `model` runs: migrate_ns with these moves, of which move_ns until the device is free;
    drain_ns if what runs there were waited for, start_ns on the best free place; 0 where there is no such thing or it
    is not known. `weighed`: workers on which that would have been possible.
    """

    model: Name
    worker: Name
    request: Name
    migrate_ns: Count
    move_ns: Count
    drain_ns: Count = 0
    start_ns: Count = 0
    moves: tuple[PlannedMove, ...] = ()
    stops: tuple[str, ...] = ()
    weighed: Positive = 1
    reason: Text = ""


class PlacementSpread(Message, frozen=True, tag="placement.spread"):
    """placement > record: nobody waits, these sequences share a device with other models, and `to` idles: they are to
    move there. `starts`: their model starts there for that; resume_ns: until they go on there, in nanoseconds."""

    model: Name
    worker: Name
    to: Name
    requests: tuple[Name, ...]
    shared: tuple[Name, ...] = ()
    starts: bool = False
    resume_ns: Count = 0


class InstanceDraining(Message, frozen=True, tag="instance.draining"):
    """placement > record: this instance takes no new sequence, so that an older request for another model gets room."""

    worker: Name
    model: Name
    wanted_by: Name
