"""Moving a running sequence: the destination follows the source's pages, catches up, and is handed the rest.

    described ▸ slot kept ▸ followed ▸ rounds ▸ caught up ▸ heir named, hand-over ordered ▸ released ▸ resumed

`attempt` is always that of the one who is spoken of: the source runs attempt k, its heir is to run a later one.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from bus.messages.envelope import Count, Digest, Message, Name, Positive, Text
from bus.messages.requests import Choice, Generation, ReplyTo, Span

Place = Annotated[str, Meta(max_length=200)]
"""A server (`s2`), a worker (`gpu/s2/0`), or empty for anywhere else."""

# ---- from outside ---------------------------------------------------------------------------------------------


class MigrateRequested(Message, frozen=True, tag="migrate.requested"):
    """operator: move one request, or all that run of a model or on a server, to a server or worker."""

    request: Place = ""
    model: Place = ""
    server: Place = ""
    to: Place = ""


# ---- between actors -------------------------------------------------------------------------------------------


class DescribeMove(Message, frozen=True, tag="move.describe"):
    """migration > requests: which running sequences are meant? `worker` may be a server's name, too."""

    request: Place = ""
    model: Place = ""
    worker: Place = ""
    to: Place = ""
    why: Place = ""


class MoveWanted(Message, frozen=True, tag="move.wanted"):
    """placement > migration: move what runs on this worker (of this model), or one request, away, to `to` if given."""

    request: Place = ""
    model: Place = ""
    worker: Place = ""
    to: Place = ""
    why: Place = ""


class ContextsWanted(Message, frozen=True, tag="contexts.wanted"):
    """placement > gpu: how much context would have to be computed again for each sequence that runs on you?"""


class SequenceContext(msgspec.Struct, frozen=True):
    """`tokens`: of prompt and answer together, as last reported."""

    request: Name
    attempt: Positive
    tokens: Count


class ContextsTold(Message, frozen=True, tag="contexts.told"):
    """gpu > placement: that much."""

    worker: Name
    sequences: tuple[SequenceContext, ...] = ()


class MoveDescribed(Message, frozen=True, tag="move.described"):
    """requests > migration: this sequence runs there, and its attempts from `heir` on are free."""

    request: Name
    attempt: Positive
    heir: Positive
    model: Name
    worker: Name
    accepted: Positive
    position: Count = 0
    history: tuple[Span, ...] = ()
    generation: Generation | None = None
    choice: Choice | None = None
    to: Place = ""
    why: Place = ""


class MoveOver(Message, frozen=True, tag="move.over"):
    """requests > migration: the source's attempt is over. `moved`: the heir goes on."""

    request: Name
    attempt: Positive
    moved: bool = False
    reason: Text = ""


class WantSlot(Message, frozen=True, tag="slot.want"):
    """migration > placement: keep a slot for this sequence elsewhere than on `source`; start the model if need be."""

    request: Name
    attempt: Positive
    model: Name
    source: Name
    to: Place = ""


class SlotKept(Message, frozen=True, tag="slot.kept"):
    """placement > migration: the slot is kept, and its instance runs."""

    request: Name
    attempt: Positive
    worker: Name


class SlotDenied(Message, frozen=True, tag="slot.denied"):
    """placement > migration: there is none, or what was to have it failed."""

    request: Name
    attempt: Positive
    reason: Text


class SlotTaken(Message, frozen=True, tag="slot.taken"):
    """requests > placement: the heir goes on, in the slot that was kept for it.

    `tokens`: prompt and answer up to there, which it has computed anew; 0 where that is not known, and before rule
    version 3.
    """

    request: Name
    attempt: Positive
    tokens: Count = 0


class Following(Message, frozen=True, tag="heir.introduced"):
    """migration > source's gpu > heir's gpu: follow this sequence.

    The source adds its `epoch`, and behind which of its pages (`after`, a TOKENS sequence) those of the sequence
    stand.
    """

    request: Name
    attempt: Positive
    heir: Name
    source: Name
    source_attempt: Positive
    model: Name
    accepted: Positive
    position: Count = 0
    history: tuple[Span, ...] = ()
    generation: Generation | None = None
    choice: Choice | None = None
    epoch: Count = 0
    after: Count = 0


class HeirReady(Message, frozen=True, tag="heir.ready"):
    """heir's gpu > migration: it has caught up to `position`, after so many rounds."""

    request: Name
    attempt: Positive
    rounds: Positive
    position: Count


class HeirLost(Message, frozen=True, tag="heir.lost"):
    """heir's gpu > migration, migration > requests: whoever followed does so no longer."""

    request: Name
    attempt: Positive
    reason: Text


class NameHeir(Message, frozen=True, tag="heir.named"):
    """migration > requests: when the source lets go, attempt `attempt` goes on there."""

    request: Name
    attempt: Positive
    worker: Name


class HandOver(Message, frozen=True, tag="handover.order"):
    """migration > source's gpu: stop at the next step."""

    request: Name
    attempt: Positive


class HandedOver(Message, frozen=True, tag="sequence.handed-over"):
    """source's gpu > requests: released; `span` is absent where no position of this attempt became durable."""

    request: Name
    attempt: Positive
    span: Span | None = None
    prompt_tokens: Count = 0


class GoOn(Message, frozen=True, tag="heir.go-on"):
    """requests > heir's gpu: decode from `position` on."""

    request: Name
    attempt: Positive
    position: Count = 0
    history: tuple[Span, ...] = ()
    replies: tuple[ReplyTo, ...] = ()


class DropHeir(Message, frozen=True, tag="heir.drop"):
    """migration > heir's gpu: what you follow is over."""

    request: Name
    attempt: Positive


# ---- effects and their answers ----------------------------------------------------------------------------------


class FollowSequence(Message, frozen=True, tag="sequence.follow"):
    """Effect: recompute the KV cache of a sequence that runs elsewhere, from its durable pages, and keep up with it.

    Prompt and earlier tokens stand at the cited sequences, the others on the token subject of `source` in `epoch`,
    behind TOKENS sequence `after`. Answer: sequence.caught-up, sequence.refused. Nothing is decoded and nothing shown.
    """

    request: Name
    attempt: Positive
    model: Name
    accepted: Positive
    source: Name
    epoch: Positive
    source_attempt: Positive
    after: Count = 0
    position: Count = 0
    history: tuple[Span, ...] = ()
    generation: Generation | None = None
    choice: Choice | None = None


class RoundFinished(Message, frozen=True, tag="round.finished"):
    """A round of catching up is computed: positions [first, next), with the prompt in the first; `left` came since."""

    request: Name
    attempt: Positive
    round: Positive
    first: Count
    next: Count
    left: Count = 0
    duration_ns: Count = 0


class CaughtUp(Message, frozen=True, tag="sequence.caught-up"):
    """The gap is small enough for the hand-over."""

    request: Name
    attempt: Positive
    rounds: Positive
    position: Count


class HandOverSequence(Message, frozen=True, tag="sequence.hand-over"):
    """Effect: stop this sequence at the next step, with a last page. Answer: hand-over.taken.

    The sequence itself ends through its own answer: sequence.released, or whatever came before.
    """

    request: Name
    attempt: Positive


class HandOverTaken(Message, frozen=True, tag="hand-over.taken"):
    """`found` false: the sequence had ended by then."""

    request: Name
    attempt: Positive
    found: bool


class SequenceReleased(Message, frozen=True, tag="sequence.released"):
    """The last page of this attempt is durable and ends it as handed over: it is never decoded here again."""

    request: Name
    attempt: Positive
    first: Count
    next: Count
    first_page: Count = 0
    last_page: Count = 0
    prompt_tokens: Count = 0
    tokens_digest: Digest = ""


class ResumeSequence(Message, frozen=True, tag="sequence.resume"):
    """Effect: the sequence that was followed is yours from `position` on. Answers as of sequence.start."""

    request: Name
    attempt: Positive
    position: Count = 0
    history: tuple[Span, ...] = ()
    replies: tuple[ReplyTo, ...] = ()


class DropSequence(Message, frozen=True, tag="sequence.drop"):
    """Effect: forget the sequence that was followed. Answer: sequence.dropped."""

    request: Name
    attempt: Positive


class SequenceDropped(Message, frozen=True, tag="sequence.dropped"):
    request: Name
    attempt: Positive


# ---- records ----------------------------------------------------------------------------------------------------


class MoveStarted(Message, frozen=True, tag="move.started"):
    """migration > record: this sequence is on its way from there to here, and why."""

    request: Name
    attempt: Positive
    source: Name
    destination: Name
    why: Place = ""


class MoveEnded(Message, frozen=True, tag="move.ended"):
    """migration > record: it has moved, or stays where it is for this reason."""

    request: Name
    attempt: Positive
    source: Name
    destination: Place = ""
    moved: bool = False
    rounds: Count = 0
    reason: Text = ""
    elapsed_ns: Count = 0
