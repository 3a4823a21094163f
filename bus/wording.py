"""The words for every kind of message: one entry each, said by somebody to somebody.

`sentence` in `bus.sentences` uses this table; a test sees to it that no kind is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bus import messages as m
from bus.phrases import (
    at_attempt,
    at_priority,
    disk,
    durable_span,
    duration,
    from_position,
    how_many,
    names,
    or_another,
    plural,
    positions,
    reader,
    readers,
    short,
    size,
    tier_name,
    what_is_asked,
    what_moves,
    where_from,
    which_choice,
    why,
)

M = TypeVar("M", bound=m.Message)
Words = Callable[[Any, str, str], str]

WORDS: dict[type[m.Message], Words] = {}
"""By type: (message, who says it, to whom) -> sentence. Of a fact, the second is the actor it is for."""


def _say(kind: type[M], words: Callable[[M, str, str], str]) -> None:
    WORDS[kind] = words


# ---- longer sentences ---------------------------------------------------------------------------------------


def _evicts(models: Sequence[str]) -> str:
    return f"; evicts {names(models)}, idle longest" if models else ""


def _ended(m_: m.RequestEnded) -> str:
    what = {"finished": f"finished ({m_.end})" if m_.end else "finished", "deadline": "went past its deadline"}
    text = f"request {short(m_.request)} {what.get(m_.outcome, 'was ' + m_.outcome)}"
    if m_.outcome == "failed":
        text = f"request {short(m_.request)} failed"
    text += f" after {plural(m_.positions, 'token')}"
    text += f" in {duration(m_.elapsed_ns)}" if m_.elapsed_ns else ""
    text += f", {m_.attempts} attempts" if m_.attempts > 1 else ""
    return text + why(m_.reason)


def _decided(m_: m.PlacementDecided) -> str:
    best = next((c for c in m_.candidates if c.worker == m_.worker), None)
    text = f"placement starts {m_.model} on {m_.worker}"
    if best is not None:
        text += f" from {tier_name(best.tier)} in about"
        text += f" {duration(best.queue_ns + best.load_ns + best.free_ns + best.attach_ns)}"
        text += f" (loads were off by {duration(best.error_ns)})" if best.error_ns else ""
    text += f" for request {short(m_.request)} (weighed {plural(m_.weighed, 'worker')}"
    text += f", {m_.waiting} waiting" if m_.waiting > 1 else ""
    return text + (_evicts(best.evict) if best is not None else "") + ")"


def _exchanged(m_: m.PlacementExchanged) -> str:
    starts = {move.to: True for move in m_.moves if move.starts}
    text = f"placement moves {plural(len(m_.moves), 'sequence')} of {names(list({p.model: True for p in m_.moves}))}"
    text += f" from {m_.worker} to {names(list({move.to: True for move in m_.moves}))}"
    text += f", where {'it starts' if len(starts) == 1 else 'they start'} for that" if starts else ""
    text += f", so that {m_.model} runs on {m_.worker} in about {duration(m_.migrate_ns)}"
    text += f" for request {short(m_.request)}"
    others = [f"{duration(m_.drain_ns)} if what runs there ended by itself"] if m_.drain_ns else []
    others += [f"{duration(m_.start_ns)} on the best free place"] if m_.start_ns else []
    text += f", instead of {', '.join(others)}" if others else why(m_.reason)
    return text + (f"; {names(m_.stops)} stops, too" if m_.stops else "")


# ---- requests -----------------------------------------------------------------------------------------------

_say(
    m.RequestAccepted,
    lambda e, s, r: (
        f"request {short(e.request)} for {e.model} accepted from {e.client} "
        f"({what_is_asked(e.generation)}, {how_many(e.generation.n)}at most {plural(e.generation.max_tokens, 'token')}"
        f"{at_priority(e.priority)})"
    ),
)
_say(m.CancelRequested, lambda e, s, r: f"request {short(e.request)} is to be cancelled")
_say(m.ReaderAttached, lambda e, s, r: f"{reader(e.reply)} wants to read request {short(e.request)}")
_say(
    m.RequestsConfigured,
    lambda e, s, r: (
        f"results are kept {duration(e.retention_ms * 1_000_000)} after the end, "
        f"and a request may outlive {plural(e.deaths_limit, 'death')} of its worker"
    ),
)
_say(
    m.PlaceRequest,
    lambda e, s, r: (
        f"request {short(e.request)}{which_choice(e.choice)} wants a slot of {e.model}"
        f"{at_attempt(e.attempt)}{at_priority(e.priority)}"
    ),
)
_say(
    m.RequestPlaced,
    lambda e, s, r: (
        f"request {short(e.request)} gets a slot on {e.worker}, "
        + ("where its model runs" if e.tier == "running" else f"started from {tier_name(e.tier)}")
        + (f", after {duration(e.waited_ns)}" if e.waited_ns else "")
    ),
)
_say(
    m.PlacementRefused,
    lambda e, s, r: (
        f"request {short(e.request)} gets no place ({e.code}){why(e.reason)}"
        + (f"; come again in {duration(e.retry_ms * 1_000_000)}" if e.retry_ms else "")
    ),
)
_say(m.SlotReleased, lambda e, s, r: f"request {short(e.request)} needs no slot of {e.model} any more")
_say(
    m.RunSequence,
    lambda e, s, r: (
        f"{r} is to run request {short(e.request)} on {e.model}{from_position(e.position)}{at_attempt(e.attempt)} "
        f"for {readers(e.replies)}"
    ),
)
_say(m.StopSequence, lambda e, s, r: f"{r} is to end request {short(e.request)}: {e.reason}")
_say(m.ShowFrom, lambda e, s, r: f"{r} is to show request {short(e.request)} to {reader(e.reply)} as well")
_say(
    m.SequenceEnded,
    lambda e, s, r: (
        f"request {short(e.request)} "
        + (f"ended on {s} ({e.reason})" if e.reason else f"was cut off when {s} was sealed")
        + durable_span(e.span)
    ),
)
_say(
    m.SequenceRejected,
    lambda e, s, r: (
        f"{s} does not go on with request {short(e.request)}{why(e.reason)}{durable_span(e.span)}{or_another(e.retry)}"
    ),
)
_say(m.ShowPositions, lambda e, s, r: f"what is durable of request {short(e.request)} is shown to {readers(e.replies)}")
_say(m.RequestEnded, lambda e, s, r: _ended(e))
_say(
    m.RequestQuarantined,
    lambda e, s, r: (
        f"request {short(e.request)} for {e.model} is a dead letter after {plural(len(e.deaths), 'attempt')}"
        + why(e.reason)
    ),
)
_say(
    m.ChoicesEnded,
    lambda e, s, r: f"all answers of request {short(e.request)} have ended, which {readers(e.replies)} is told",
)
_say(m.ReaderRefused, lambda e, s, r: f"{reader(e.reply)} cannot read request {short(e.request)}{why(e.reason)}")

# ---- moves ----------------------------------------------------------------------------------------------------

_say(
    m.MigrateRequested,
    lambda e, s, r: f"an operator wants {what_moves(e.request, e.model, e.server)} moved to {e.to or 'somewhere else'}",
)
_say(
    m.MoveWanted, lambda e, s, r: f"{what_moves(e.request, e.model, e.worker)} is to move to {e.to or 'anywhere else'}"
)
_say(m.ContextsWanted, lambda e, s, r: "how much context has each sequence that runs there?")
_say(
    m.ContextsTold,
    lambda e, s, r: (
        f"{plural(len(e.sequences), 'sequence')} on {e.worker}, "
        f"with {plural(sum(one.tokens for one in e.sequences), 'token')} of context"
    ),
)
_say(m.DescribeMove, lambda e, s, r: f"which requests are meant by {what_moves(e.request, e.model, e.worker)}?")
_say(
    m.MoveDescribed,
    lambda e, s, r: f"request {short(e.request)} of {e.model} runs on {e.worker} and may move" + why(e.why),
)
_say(m.WantSlot, lambda e, s, r: f"request {short(e.request)} wants a slot of {e.model} at {e.to or 'another worker'}")
_say(m.SlotKept, lambda e, s, r: f"a slot on {e.worker} is kept for request {short(e.request)}")
_say(m.SlotDenied, lambda e, s, r: f"no slot is kept for request {short(e.request)}{why(e.reason)}")
_say(m.SlotTaken, lambda e, s, r: f"request {short(e.request)} takes the slot that was kept for it")
_say(m.Following, lambda e, s, r: f"{e.heir} is to follow request {short(e.request)} on {e.source}")
_say(m.FollowSequence, lambda e, s, r: f"{r} is to follow request {short(e.request)} on {e.source} (epoch {e.epoch})")
_say(
    m.RoundFinished,
    lambda e, s, r: (
        f"{s} computed round {e.round} of request {short(e.request)}: positions {e.first} to {e.next}, "
        f"{e.left} more came meanwhile, {duration(e.duration_ns)}"
    ),
)
_say(
    m.CaughtUp,
    lambda e, s, r: f"{s} has caught up with request {short(e.request)} after {plural(e.rounds, 'round')}",
)
_say(m.HeirReady, lambda e, s, r: f"{s} is ready to go on with request {short(e.request)}")
_say(m.HeirLost, lambda e, s, r: f"nobody follows request {short(e.request)} any more{why(e.reason)}")
_say(m.NameHeir, lambda e, s, r: f"{e.worker} goes on with request {short(e.request)} when its source lets go")
_say(m.HandOver, lambda e, s, r: f"{r} is to hand request {short(e.request)} over")
_say(m.HandOverSequence, lambda e, s, r: f"{r} is to hand request {short(e.request)} over at the next step")
_say(
    m.HandOverTaken,
    lambda e, s, r: (
        f"{s} lets request {short(e.request)} go" if e.found else f"{s} holds no {short(e.request)} any more"
    ),
)
_say(m.SequenceReleased, lambda e, s, r: f"{s} has handed request {short(e.request)} over at position {e.next}")
_say(m.HandedOver, lambda e, s, r: f"request {short(e.request)} is handed over by {s}" + durable_span(e.span))
_say(m.GoOn, lambda e, s, r: f"{r} is to go on with request {short(e.request)}{from_position(e.position)}")
_say(m.ResumeSequence, lambda e, s, r: f"{r} is to decode request {short(e.request)}{from_position(e.position)}")
_say(
    m.MoveOver,
    lambda e, s, r: f"request {short(e.request)} " + ("goes on at its heir" if e.moved else "stays" + why(e.reason)),
)
_say(m.DropHeir, lambda e, s, r: f"{r} need not follow request {short(e.request)} any longer")
_say(m.DropSequence, lambda e, s, r: f"{r} is to forget request {short(e.request)}")
_say(m.SequenceDropped, lambda e, s, r: f"{s} has forgotten request {short(e.request)}")
_say(
    m.MoveStarted,
    lambda e, s, r: f"request {short(e.request)} is on its way from {e.source} to {e.destination}" + why(e.why),
)
_say(
    m.MoveEnded,
    lambda e, s, r: (
        f"request {short(e.request)} has moved from {e.source} to {e.destination} in {plural(e.rounds, 'round')}, "
        f"{duration(e.elapsed_ns)}"
        if e.moved
        else f"request {short(e.request)} was not moved{why(e.reason)}"
    ),
)

# ---- models, servers, instances -------------------------------------------------------------------------------

_say(m.ModelAdded, lambda e, s, r: f"model {e.model} was added" + where_from(e.source))
_say(
    m.DrainRequested,
    lambda e, s, r: (
        f"server {e.server} is to be in service again"
        if e.undo
        else f"an operator wants server {e.server} drained within {duration(e.deadline_ms * 1_000_000)}"
    ),
)
_say(
    m.ServerDrained,
    lambda e, s, r: (
        f"server {e.server} is not drained{why(e.reason)}"
        if e.reason
        else f"server {e.server} is drained"
        + (f" but for {plural(e.left, 'sequence')}" if e.left else "")
        + (", its process may end" if e.leave else "")
    ),
)
_say(m.ModelRemoved, lambda e, s, r: f"model {e.model} is to go")
_say(m.PlacementConfigured, lambda e, s, r: f"at most {plural(e.queue_limit, 'request')} may wait for a slot")
_say(
    m.ServerReady,
    lambda e, s, r: (
        f"server {e.server} is up with {size(e.dram_bytes)} of DRAM{disk(e.ssd_bytes)} and "
        f"{plural(len(e.models), 'model')}: {names([held.card.model for held in e.models])}"
    ),
)
_say(m.ServerGone, lambda e, s, r: f"server {e.server} is gone")
_say(
    m.ModelHeld,
    lambda e, s, r: (
        (
            f"{e.server} can fetch {e.card.model} ({size(e.card.weight_bytes)})"
            if e.tier == "remote"
            else f"{e.server} holds {e.card.model} ({size(e.card.weight_bytes)}) in {tier_name(e.tier)}"
        )
        + (f", loaded in {duration(e.duration_ns)} from {tier_name(e.loaded_from)}" if e.duration_ns else "")
    ),
)
_say(m.ModelGone, lambda e, s, r: f"{e.server} no longer holds {e.model}")
_say(m.ModelReplaced, lambda e, s, r: f"a newer {e.model} lies on {e.server}, to be served when the old one is idle")
_say(m.LookForModel, lambda e, s, r: f"{r} is to look for {e.model}" + where_from(e.source))
_say(m.DropModel, lambda e, s, r: f"{r} is to delete {e.model} once nobody uses it")
_say(
    m.ModelWanted,
    lambda e, s, r: f"an operator wants {e.model} in DRAM of {e.server or 'the server where it is there soonest'}",
)
_say(
    m.WarmModel,
    lambda e, s, r: (
        f"{r} is to bring {e.model} to DRAM from {tier_name(e.tier)} in about {duration(e.ready_ns)}"
        + (f", the soonest of {plural(e.weighed, 'server')}" if e.weighed > 1 else "")
    ),
)
_say(
    m.ModelWarmed,
    lambda e, s, r: (
        f"{e.model} was not brought to DRAM{why(e.reason)}" if e.reason else f"{e.model} lies in DRAM of {e.server}"
    ),
)
_say(
    m.WorkerReady,
    lambda e, s, r: (
        f"worker {e.worker} is up with {size(e.memory_bytes)} and up to {plural(e.max_slots, 'slot')} for each model"
    ),
)
_say(m.WorkerGone, lambda e, s, r: f"worker {e.worker} is gone")
_say(
    m.StartInstance,
    lambda e, s, r: (
        f"{r} is to start {e.model} with {plural(e.slots, 'slot')}"
        + (f", after stopping {names(e.evict)}" if e.evict else "")
    ),
)
_say(m.AbandonStart, lambda e, s, r: f"{r} is to give up the start of {e.model}: nobody waits for it any more")
_say(m.StopInstance, lambda e, s, r: f"{r} is to stop {e.model}, which is idle")
_say(
    m.InstanceReady,
    lambda e, s, r: (
        f"{e.model} runs on {e.worker} with {plural(e.slots, 'slot')}, from {tier_name(e.tier)}"
        + (f", attached in {duration(e.attach_ns)}" if e.attach_ns else "")
    ),
)
_say(m.InstanceFailed, lambda e, s, r: f"{e.model} does not start on {e.worker}{why(e.reason)}{or_another(e.retry)}")
_say(m.InstanceStopped, lambda e, s, r: f"{e.model} is stopped on {e.worker}, its memory is free")
_say(m.LeaseModel, lambda e, s, r: f"{e.worker} needs {e.model} in DRAM" + where_from(*e.sources[:1]))
_say(
    m.LeaseReturned,
    lambda e, s, r: f"{e.worker} needs {e.model} no longer" + (": nobody wants it" if e.abandoned else ""),
)
_say(
    m.LeaseGranted,
    lambda e, s, r: (
        f"{e.model} is larger than the budget of DRAM: {r} reads it from the SSD itself"
        if e.streamed
        else f"{e.model} lies in DRAM for {r}, from {tier_name(e.tier)}"
    ),
)
_say(m.LeaseRefused, lambda e, s, r: f"{e.model} does not get into DRAM for {r}{why(e.reason)}{or_another(e.retry)}")
_say(m.PlacementDecided, lambda e, s, r: _decided(e))
_say(
    m.PlacementSpread,
    lambda e, s, r: (
        f"placement moves {plural(len(e.requests), 'sequence')} of {e.model} from {e.worker}, shared with "
        f"{names(e.shared)}, to {e.to}, which idles{'; it starts there for that' if e.starts else ''}"
    ),
)
_say(m.PlacementExchanged, lambda e, s, r: _exchanged(e))
_say(
    m.InstanceDraining,
    lambda e, s, r: f"{e.model} takes nothing new on {e.worker}, to make room for {e.wanted_by}",
)

# ---- drivers: their life --------------------------------------------------------------------------------------

_say(
    m.StoreStarted,
    lambda e, s, r: (
        f"store of {e.server} started with {size(e.dram_bytes)} of DRAM{disk(e.ssd_bytes)}, found "
        f"{names([held.card.model for held in e.models])}"
    ),
)
_say(m.WorkerStarted, lambda e, s, r: f"worker {s} started on {e.device} with {size(e.memory_bytes)}")
_say(
    m.DriverLost, lambda e, s, r: f"{e.driver} {'leaves' if e.leaving else 'is lost'} (epoch {e.epoch}){why(e.reason)}"
)
_say(m.EpochClosed, lambda e, s, r: f"epoch {e.epoch} of {e.driver} is closed{why(e.reason)}")

# ---- drivers: stores ------------------------------------------------------------------------------------------

_say(m.LoadModel, lambda e, s, r: f"{r}: load {e.model} to DRAM" + where_from(*e.sources[:1]))
_say(
    m.ModelLoaded,
    lambda e, s, r: (
        f"{s} loaded {e.model}, {size(e.loaded_bytes)} in {duration(e.duration_ns)}"
        + (f" from {tier_name(e.tier)}" if e.tier != "ssd" else "")
    ),
)
_say(
    m.LoadFailed,
    lambda e, s, r: (
        f"{s} gave up the load of {e.model}{why(e.reason)}"
        if e.cancelled
        else f"{s} could not load {e.model}{why(e.reason)}" + ("; it is of no use there" if e.gone else "")
    ),
)
_say(m.CancelLoad, lambda e, s, r: f"{r}: give up the load of {e.model}{why(e.reason)}")
_say(
    m.LoadCancelTaken,
    lambda e, s, r: f"{s} was to give up the load of {e.model}" + ("" if e.found else ", which had ended"),
)
_say(
    m.EvictModel,
    lambda e, s, r: (
        f"{r}: delete what came of {e.model} before its fetch broke off{why(e.reason)}"
        if e.tier == "remote"
        else f"{r}: let {e.model} go from {tier_name(e.tier)}{why(e.reason)}"
    ),
)
_say(m.ModelEvicted, lambda e, s, r: f"{s} let {e.model} go")
_say(m.FindModel, lambda e, s, r: f"{r}: look whether {e.model} lies there" + where_from(e.source, " or at "))
_say(
    m.ModelFound,
    lambda e, s, r: f"{s} found {e.card.model}, {size(e.card.weight_bytes)}" + where_from(e.source, " at "),
)
_say(m.ModelMissing, lambda e, s, r: f"{s} has no {e.model}{why(e.reason)}")
_say(m.DeleteModel, lambda e, s, r: f"{r}: delete {e.model}")
_say(m.ModelDeleted, lambda e, s, r: f"{s} deleted {e.model}")

# ---- drivers: workers -----------------------------------------------------------------------------------------

_say(
    m.AttachModel,
    lambda e, s, r: (
        f"{r}: attach {e.model}{', read from the SSD,' if e.streamed else ''} with {plural(e.slots, 'slot')} "
        f"and {size(e.kv_bytes)} for their cache"
    ),
)
_say(
    m.ModelAttached,
    lambda e, s, r: f"{s} attached {e.model} with {plural(e.slots, 'slot')} in {duration(e.duration_ns)}",
)
_say(m.AttachFailed, lambda e, s, r: f"{s} could not attach {e.model}{why(e.reason)}{or_another(e.retry)}")
_say(m.DetachModel, lambda e, s, r: f"{r}: detach {e.model}")
_say(m.ModelDetached, lambda e, s, r: f"{s} detached {e.model}")
_say(
    m.StartSequence,
    lambda e, s, r: (
        f"{r}: decode request {short(e.request)} with {e.model}{from_position(e.position)}{at_attempt(e.attempt)} "
        f"for {readers(e.replies)}"
    ),
)
_say(m.CancelSequence, lambda e, s, r: f"{r}: end request {short(e.request)} ({e.reason})")
_say(
    m.CancelTaken,
    lambda e, s, r: f"{s} " + ("ends" if e.found else "no longer has") + f" request {short(e.request)}",
)
_say(m.AddReader, lambda e, s, r: f"{r}: show request {short(e.request)} to {reader(e.reply)} as well")
_say(
    m.ReaderAdded,
    lambda e, s, r: (
        f"{s} " + ("shows" if e.found else "no longer has") + f" request {short(e.request)} for {reader(e.reply)}"
    ),
)
_say(
    m.SequenceFinished,
    lambda e, s, r: (
        f"{s} finished request {short(e.request)} ({e.reason}): {positions(e.first, e.next)}"
        + (f", first token after {duration(e.prefill_ns)}" if e.prefill_ns else "")
        + (f", all in {duration(e.total_ns)}" if e.total_ns else "")
    ),
)
_say(
    m.SequenceRefused,
    lambda e, s, r: f"{s} does not take request {short(e.request)}{why(e.reason)}{or_another(e.retry)}",
)
_say(
    m.SequenceFailed,
    lambda e, s, r: f"{s} failed on request {short(e.request)}{why(e.reason)}; {positions(e.first, e.next)} stand",
)
_say(
    m.ProgressReported,
    lambda e, s, r: f"{s} is at " + names([f"position {one.next} of {short(one.request)}" for one in e.sequences]),
)
_say(m.SealTokens, lambda e, s, r: f"the tokens of {e.worker}, epoch {e.epoch}, are to be sealed")
_say(
    m.SequencesSealed,
    lambda e, s, r: (
        f"the tokens of {e.worker}, epoch {e.epoch}, are sealed: "
        + names([f"{positions(q.first, q.first + len(q.tokens))} of {short(q.request)}" for q in e.sequences])
        + (f" (part {e.part + 1} of {e.parts})" if e.parts > 1 else "")
    ),
)

# ---- the cell itself ------------------------------------------------------------------------------------------

_say(m.SetTimer, lambda e, s, r: f"{s} wants to be woken about {e.about}")
_say(m.TimerFired, lambda e, s, r: f"it is time for {r}: {e.about}")
_say(m.RulesActivated, lambda e, s, r: f"decisions follow rule version {e.version} from here on")
_say(
    m.DifferenceAccepted,
    lambda e, s, r: f"an operator accepts the recorded message {e.index} of fact {e.fact} as it is{why(e.note)}",
)
_say(m.StepSkipped, lambda e, s, r: f"fact {e.fact} was skipped, {e.actor} failed on it{why(e.reason)}")
