"""Requests, their readers, and how they end."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bus.messages.envelope import Count, Digest, Message, Name, Positive, Subject, Text
from bus.part_limits import PARTS_LIMIT

PROMPT_LIMIT_BYTES = 400_000
TOKENS_LIMIT = 1_000_000
INPUTS_LIMIT = 256
SMALL_CHARACTERS = 1024

PRIORITY_LIMIT = 100
CHOICES_LIMIT = 16

Encoding = Literal["json", "msgpack"]
Priority = Annotated[int, Meta(ge=-PRIORITY_LIMIT, le=PRIORITY_LIMIT)]
Input = str | tuple[int, ...]
"""What one vector is made of: a text, or token ids."""
VectorForm = Literal["", "float", "base64"]
"""How the one answer of an embedding shows vectors; empty for chunks."""
Outcome = Literal["finished", "failed", "cancelled", "deadline", "quarantined"]


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: Annotated[str, Meta(max_length=PROMPT_LIMIT_BYTES)]


class PromptParts(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A prompt that lies in parts beside the ledger (`bus.parts`).

    `digest` is the SHA-256 of all parts together: the prompt's text in UTF-8, or the JSON of its messages or tokens.
    """

    upload: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    count: Annotated[int, Meta(ge=1, le=PARTS_LIMIT)]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    form: Literal["prompt", "messages", "tokens"] = "prompt"


class Generation(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to compute: exactly one of prompt, messages, tokens and parts, and how to sample; or the vectors of
    `inputs`, of which `max_tokens` is the number then.

    `temperature` -1 and `top_p` -1 and `top_k` -1 mean: as the model's generation_config says. `stop_tokens` end the
    answer beside the model's own; neither they nor `stop` do before `min_tokens`. `logit_bias`: (token id, what is
    added to its logit), by rising id. `logprobs` -1: none; else with so many alternatives.
    `n`: so many answers (choices), of which each is computed from the seed plus its number.
    """

    max_tokens: Positive
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    tokens: tuple[int, ...] | None = None
    temperature: float = -1.0
    top_p: float = -1.0
    top_k: int = -1
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1
    n: int = 1
    inputs: tuple[Input, ...] | None = None
    parts: PromptParts | None = None


def is_small(generation: Generation) -> bool:
    """Whether what to compute is so small that messages may carry it instead of citing it."""
    size = len(generation.prompt or "") + 4 * len(generation.tokens or ()) + sum(len(s) for s in generation.stop)
    size += 4 * len(generation.stop_tokens) + 16 * len(generation.logit_bias)
    for message in generation.messages or ():
        size += len(message.content) + 32
    for item in generation.inputs or ():
        size += (len(item) if isinstance(item, str) else 4 * len(item)) + 8
    return size <= SMALL_CHARACTERS


class Choice(msgspec.Struct, frozen=True):
    """Which answer this is of a request that asks for several: number `index`, from 0, `of` so many.

    Inside the cell each is a request of its own; the first has the id of the `family`, which is what clients name.
    """

    family: Name
    index: Annotated[int, Meta(ge=0, lt=CHOICES_LIMIT)]
    of: Annotated[int, Meta(ge=2, le=CHOICES_LIMIT)]


class ReplyTo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where chunks are shown: a subject, the first position wanted, the encoding, one reply or a stream.

    `form`: the one reply is the answer of an embedding.
    """

    subject: Subject
    start: Count = 0
    encoding: Encoding = "json"
    single: bool = False
    form: VectorForm = ""


def request_id(client: str, key: str) -> str:
    """The identity of a request: the first 32 hexadecimal digits of SHA-256 over client, a zero byte, and key."""
    return hashlib.sha256(client.encode() + b"\0" + key.encode()).hexdigest()[:32]


def choice_id(request: str, client: str, key: str, index: int) -> str:
    """The id inside the cell of one answer of `request`, which has this client and key; no key has a zero byte."""
    return request_id(client, f"{key}\0{index}") if index else request


# ---- facts ------------------------------------------------------------------------------------------------


class RequestAccepted(Message, frozen=True, tag="request.accepted"):
    """Intake has accepted a request. A repeated one attaches its reader to the request that exists.

    `deadline_ms` counts from acceptance, 0 for none. `priority`: larger goes first; placement does not look at it yet.
    `sequence` is filled in by the cell: where this fact stands.
    """

    request: Name
    client: Annotated[str, Meta(max_length=200)]
    key: Annotated[str, Meta(max_length=200)]
    model: Name
    generation: Generation
    reply: ReplyTo | None = None
    deadline_ms: Count = 0
    sequence: int = 0
    priority: Priority = 0


class CancelRequested(Message, frozen=True, tag="cancel.requested"):
    request: Name


class ReaderAttached(Message, frozen=True, tag="reader.attached"):
    """A reader wants to see a request from `reply.start` on."""

    request: Name
    reply: ReplyTo


class RequestsConfigured(Message, frozen=True, tag="requests.configured"):
    """`retention_ms`: how long an ended request is known; `deaths_limit`: workers that may die under one request.

    `dead_letters`: whether a request that is quarantined is said with its history, too (request.quarantined).
    """

    retention_ms: Positive = 3_600_000
    deaths_limit: Positive = 3
    dead_letters: bool = False


# ---- between actors ---------------------------------------------------------------------------------------


class PlaceRequest(Message, frozen=True, tag="request.place"):
    """requests > placement: this request wants a slot of a running instance of the model.

    `accepted` orders the queue: a request that lost its worker goes before those that came after it. The answers of one
    request ask one after the other, in one step; they get into the queue together or not at all. `deadline`: by the
    ledger's clock in nanoseconds, 0 for none or where nobody asks for it yet. `tokens`: about so many are to be
    computed before the next one, prompt and answer so far; from rule version 3 on.
    """

    request: Name
    attempt: Positive
    model: Name
    accepted: Positive
    priority: Priority = 0
    choice: Choice | None = None
    deadline: Count = 0
    tokens: Count = 0


class RequestPlaced(Message, frozen=True, tag="request.placed"):
    """placement > requests: a slot on this worker is reserved. `tier`: where the start came from."""

    request: Name
    attempt: Positive
    worker: Name
    tier: Literal["running", "dram", "ssd", "remote"] = "running"
    waited_ns: Count = 0


class PlacementRefused(Message, frozen=True, tag="placement.refused"):
    """placement > requests: it cannot run at all, or the queue is full (`retry_ms`: when to come again)."""

    request: Name
    attempt: Positive
    code: Literal["queue_full", "too_large", "unknown_model", "start_failed"]
    reason: Text
    retry_ms: Count = 0


class SlotReleased(Message, frozen=True, tag="slot.released"):
    """requests > placement: the request no longer wants or holds a slot.

    `tokens`: positions that became durable in it; from rule version 3 on.
    """

    request: Name
    attempt: Positive
    model: Name
    tokens: Count = 0


class Span(msgspec.Struct, frozen=True, omit_defaults=True):
    """Durable positions [first, next) of one attempt: on whose token subject, between which pages.

    `sealed` is the ledger sequence of the fact that states these tokens, 0 where the worker itself ended them.
    """

    worker: Name
    epoch: Positive
    attempt: Positive
    first: Count
    next: Count
    first_page: Count
    last_page: Count
    sealed: Count = 0


class RunSequence(Message, frozen=True, tag="sequence.run"):
    """requests > gpu: run attempt `attempt` from position `position`; earlier tokens stand in the `history`.

    A small `generation` comes along at the first attempt, which saves the worker a look into the ledger; a large one
    stands only in the fact at `accepted`.
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


class StopSequence(Message, frozen=True, tag="sequence.stop"):
    """requests > gpu: end it at the next step for this reason."""

    request: Name
    attempt: Positive
    reason: Literal["cancelled", "deadline"]


class ShowFrom(Message, frozen=True, tag="sequence.show"):
    """requests > gpu: one more reader of a running sequence."""

    request: Name
    attempt: Positive
    reply: ReplyTo


class SequenceEnded(Message, frozen=True, tag="sequence.ended"):
    """gpu > requests: the worker ended it (reason), or its epoch was sealed (reason empty unless a page said one).

    `span` is absent where no position of this attempt became durable. `missed`: readers whom the worker did not get to
    before it ended one of several answers; of other requests the worker says so itself (reader.added). `left`: its
    worker did not die, but was told to end.
    """

    request: Name
    attempt: Positive
    reason: Literal["", "stop", "length", "cancelled", "deadline"]
    span: Span | None = None
    prompt_tokens: Count = 0
    missed: tuple[ReplyTo, ...] = ()
    left: bool = False


class SequenceRejected(Message, frozen=True, tag="sequence.rejected"):
    """gpu > requests: the worker did not take it, or failed on it. `retry`: another worker may do better."""

    request: Name
    attempt: Positive
    reason: Text
    code: Annotated[str, Meta(max_length=64)] = "invalid_request"
    retry: bool = False
    span: Span | None = None


# ---- to the reader of control, which shows what no worker shows ---------------------------------------------


class ShowPositions(Message, frozen=True, tag="positions.show"):
    """requests > reader: show durable positions from `reply.start` on, read from these spans, again."""

    request: Name
    model: Name
    replies: tuple[ReplyTo, ...]
    spans: tuple[Span, ...]
    choice: Choice | None = None


class RequestEnded(Message, frozen=True, tag="request.ended"):
    """requests > reader: the request ended, once and for all.

    `shown` says that the worker's own last page carries the end to its readers; otherwise the reader of control
    shows it to `replies` at `positions`. `code` and `reason` explain an outcome other than finished.
    """

    request: Name
    model: Name
    outcome: Outcome
    positions: Count
    end: Literal["", "stop", "length"] = ""
    code: Annotated[str, Meta(max_length=64)] = ""
    reason: Text = ""
    retry_ms: Count = 0
    shown: bool = False
    replies: tuple[ReplyTo, ...] = ()
    spans: tuple[Span, ...] = ()
    prompt_tokens: Count = 0
    attempts: Count = 0
    elapsed_ns: Count = 0
    choice: Choice | None = None


class Death(msgspec.Struct, frozen=True, omit_defaults=True):
    """An attempt that ended without its request: `position` is the first that was not durable then.

    `epoch` of the worker, 0 where nothing of the attempt became durable.
    """

    worker: Name
    attempt: Positive
    position: Count = 0
    epoch: Count = 0
    reason: Text = ""


class RequestQuarantined(Message, frozen=True, tag="request.quarantined"):
    """requests > dead: this request is given up, with what happened under it. The fact at `accepted` has its body."""

    request: Name
    model: Name
    client: Annotated[str, Meta(max_length=200)]
    key: Annotated[str, Meta(max_length=200)]
    accepted: Count
    deaths: tuple[Death, ...]
    reason: Text = ""
    choice: Choice | None = None


class ChoicesEnded(Message, frozen=True, tag="choices.ended"):
    """requests > reader: every answer of a request that asks for several has ended; each end was said before.

    Only this ends the streams of `replies`. Who wants one single reply gets it from `choices`, which are there for them
    alone.
    """

    request: Name
    model: Name
    replies: tuple[ReplyTo, ...]
    choices: tuple[RequestEnded, ...] = ()


class ReaderRefused(Message, frozen=True, tag="reader.refused"):
    """requests > reader: no such request is known here (any more), or the key was used for another body."""

    request: Name
    reply: ReplyTo
    code: Literal["unknown_request", "key_reused"]
    reason: Text


def body_digest(generation: Generation, model: str) -> Digest:
    """Tells a repeated request from another one under the same key; what lies in parts is the same wherever it lies."""
    if generation.parts is not None:
        anywhere = msgspec.structs.replace(generation.parts, upload="", count=0)
        generation = msgspec.structs.replace(generation, parts=anywhere)
    data = msgspec.json.encode((model, generation))
    return hashlib.blake2b(data, digest_size=16).hexdigest()
