"""Intake: what clients and operators say becomes facts, or one sentence that says why not.

It validates, appends, and answers: `accepted` after the acknowledgement, `unknown` where an append was sent and stayed
unanswered (the client repeats with the same key), `refused` where nothing was appended. What it knows of models and
requests it reads from the replica beside it; that is for quick refusals only, the cell decides.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import structlog

from actors.cell import Cell
from actors.intake_buffer import IntakeBuffer, no_leader
from actors.intake_views import models_view, status_view, usage_percent
from actors.placement_state import PlacementState
from actors.request_state import RequestsState, as_ended
from actors.results import REPLY_LIMIT_BYTES, ResultsReader, far
from actors.rules import WARM_RULES
from bus.api import (
    ParsedRequest,
    Refusal,
    encode_reply,
    encoding_of,
    parse_infer,
    parse_model,
    parse_request_id,
    parse_resume,
    parse_warm,
    reply_headers,
)
from bus.contract import Appended, Bus, BusError, Delivery, LogFull, NoAnswer, NotTaken, Subscription, Usage
from bus.embeddings import parse_embed
from bus.logs import about
from bus.messages import (
    CancelRequested,
    FactEnvelope,
    Input,
    Message,
    ModelAdded,
    ModelCard,
    ModelRemoved,
    ModelWanted,
    PromptParts,
    ReaderAttached,
    RequestAccepted,
    body_digest,
    encode,
    kind_of,
)
from bus.part_limits import PARTS_SECONDS
from bus.parts import missing
from bus.replies import Result, Status, accepted, unknown
from bus.subjects import Subjects, may_reply, unescape_model
from bus.tasks import Tasks

QUEUE_GROUP = "intake"
FULL_PERCENT = 80
"""New requests are refused from this share of the ledger's limit on; the rest is for what must be said."""
REPEATS_PERCENT = 90
"""From this share on, repeats and readers that come back are refused, too: each is a fact, and leads to more."""

SILENT_SECONDS = 5.0
"""A ledger that has not said for so long how full it is does not answer."""

PARTS_MARGIN_MS = 60_000
"""So long before its parts expire a request with a prompt in parts has ended."""

UNDERWAY_LIMIT = 2000
"""Messages handled at once. What comes beyond that is refused at once: nothing piles up while the bus is away."""

log = structlog.get_logger("longshore.intake")

Answer = Status | Result | dict[str, Any] | list[Any] | None


class Intake:
    """Answers clients and operators of one cell; one queue group over all controls.

    `position` is how far the replica beside it has read the ledger, facts and what was said.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        me: str,
        cell: Callable[[], Cell],
        live: Callable[[], bool],
        position: Callable[[], int],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._buffer = IntakeBuffer(bus.ledger, me)
        self._cell = cell
        self._live = live
        self._position = position
        self._results = ResultsReader(bus, subjects)
        self.wants_snapshot: Callable[[], None] = lambda: None
        self._percent = 0
        self._tokens_percent = 0
        self._streams: dict[str, Usage] = {}
        self._measured = float("-inf")
        self._parts_age_ns = PARTS_SECONDS * 1_000_000_000
        self.counts: dict[str, int] = {"requests": 0, "errors": 0}
        self._subscriptions: list[Subscription] = []
        self._leaving = False
        self._verbs: dict[str, Callable[[Delivery], Awaitable[Answer]]] = {
            "infer": self._infer,
            "embed": self._embed,
            "cancel": self._cancel,
            "resume": self._resume,
            "result": self._result,
            "admin": self._admin,
        }

    @property
    def verbs(self) -> list[str]:
        return list(self._verbs)

    async def serve(self, verb: str, tasks: Tasks) -> None:
        """Take messages of one verb until `leave`; each is handled in a task of its own."""
        subscription = await self._bus.subscribe(self._subjects.every(verb), queue=QUEUE_GROUP)
        self._subscriptions.append(subscription)
        try:
            while True:
                try:
                    delivery = await subscription.next()
                except BusError:
                    if self._leaving:
                        return
                    raise
                if delivery.reply and not may_reply(delivery.reply):
                    self.counts["errors"] += 1
                    log.warning("reply subject refused", subject=delivery.subject[:200], reply=delivery.reply[:200])
                    continue
                # What ends work, or only looks, has room when new work has none any more.
                limit = UNDERWAY_LIMIT if verb in ("infer", "resume") else 2 * UNDERWAY_LIMIT
                if tasks.brief >= limit:
                    busy = Refusal("queue_full", f"{limit} messages are being handled already", retry_ms=1000)
                    await self._reply(delivery, busy.status(), busy.headers())
                    continue
                tasks.spawn(self._handle(self._verbs[verb], delivery), f"intake {verb}")
        finally:
            await subscription.close()

    async def leave(self) -> None:
        """Have the server give its messages to others; what was handed to this process is handled still."""
        self._leaving = True
        await asyncio.gather(*(subscription.drain() for subscription in self._subscriptions))

    async def measure(self) -> None:
        """Look how full the streams are. Call it about once a second."""
        ledger, tokens = await self._bus.ledger.usage(), await self._bus.tokens.usage()
        self._streams = {"ledger": ledger, "tokens": tokens}
        self._percent, self._tokens_percent = usage_percent(ledger), usage_percent(tokens)
        self._measured = asyncio.get_running_loop().time()
        self._parts_age_ns = (await self._bus.parts.usage()).max_age_ns

    @property
    def filled_percent(self) -> int:
        """How much of the ledger's limit is taken, as measured last."""
        return self._percent

    def obstacles(self) -> list[str]:
        """Why new requests are not taken now, as far as the streams are the reason; one sentence each."""
        silent = asyncio.get_running_loop().time() - self._measured
        found = ["it is leaving: others answer"] if self._leaving else []
        if silent > SILENT_SECONDS:
            never = self._measured < 0
            found.append("the ledger has not answered yet" if never else f"the ledger is silent for {silent:.0f} s")
        for name, percent in (("ledger", self._percent), ("stream of tokens", self._tokens_percent)):
            if percent >= FULL_PERCENT:
                found.append(f"the {name} is filled to {percent} % of its limit: new requests are refused")
        return found

    async def _handle(self, verb: Callable[[Delivery], Awaitable[Answer]], delivery: Delivery) -> None:
        self.counts["requests"] += 1
        try:
            answer = await verb(delivery)
            if answer is not None:
                await self._reply(delivery, answer, {})
        except Refusal as refusal:
            self.counts["errors"] += 1
            await self._reply(delivery, refusal.status(), refusal.headers())
        except BusError:
            self.counts["errors"] += 1
        except Exception:
            # One message that nobody thought of must not end the control: it would end the next one as well.
            self.counts["errors"] += 1
            log.exception("a message was not understood", subject=delivery.subject[:200])

    async def _reply(self, delivery: Delivery, answer: Answer, headers: dict[str, str]) -> None:
        if not delivery.reply:
            return
        try:
            encoding = encoding_of(delivery.headers.get("Content-Type"))
        except Refusal:
            encoding = "json"
        payload = encode_reply(cast(Any, answer), encoding)
        if len(payload) > REPLY_LIMIT_BYTES:
            refusal = Refusal("too_large", f"the answer takes {len(payload)} bytes: read it as a stream with resume")
            payload, headers = encode_reply(refusal.status(), encoding), refusal.headers()
        try:
            await self._bus.publish(delivery.reply, payload, headers=(headers | reply_headers(encoding)) or None)
        except BusError:
            return

    # ---- requests ---------------------------------------------------------------------------------------------

    async def _infer(self, delivery: Delivery) -> Answer:
        parsed = self.parse(delivery.subject, delivery.payload, delivery.headers)
        if not delivery.reply:
            raise Refusal("bad_request", "infer needs a reply subject; use submit to read the result later")
        status = await self.accept(parsed, delivery.reply)
        # Whoever wants one single reply gets the answer as that reply, so `accepted` is not said.
        return status if parsed.stream or status.status != "accepted" else None

    async def _embed(self, delivery: Delivery) -> Answer:
        parsed = self.parse(delivery.subject, delivery.payload, delivery.headers, parser=parse_embed)
        if not delivery.reply:
            raise Refusal("bad_request", "embed needs a reply subject; use submit to read the result later")
        status = await self.accept(parsed, delivery.reply)
        return status if parsed.stream or status.status != "accepted" else None

    def parse(
        self,
        subject: str,
        payload: bytes,
        headers: dict[str, str],
        *,
        default_key: str = "",
        parser: Callable[..., ParsedRequest] = parse_infer,
    ) -> ParsedRequest:
        """A valid request for a model that this cell knows. Raises `Refusal`."""
        token = self._subjects.last_token(subject)
        try:
            model = unescape_model(token)
        except (ValueError, UnicodeDecodeError):
            raise Refusal("unknown_model", f"{token[:80]!r} is not a model's name as a subject token") from None
        parsed = parser(payload, headers.get("Content-Type"), model, default_key=default_key)
        if not self._live():
            raise Refusal("not_ready", "this control is still reading the ledger", retry_ms=1000)
        placement = self._placement()
        known = placement.models.get(model)
        if known is None or known.removed:
            have = ", ".join(sorted(name for name, one in placement.models.items() if not one.removed)) or "none"
            raise Refusal("unknown_model", f"no model {model!r} in this cell; it has: {have[:500]}")
        card, generation = known.card, parsed.accepted.generation
        if generation.inputs is not None:
            _check_inputs(generation.inputs, card)
            about(parsed.request)
            return parsed
        if card.kind == "encoder":
            raise Refusal("bad_request", f"{model} makes embeddings and no text: ask embed instead of infer")
        if generation.max_tokens > card.context:
            raise Refusal(
                "bad_request",
                f"max_tokens must be at most {card.context}, the context of {model}, got {generation.max_tokens}",
            )
        if generation.tokens is not None:
            if len(generation.tokens) >= card.context:
                size = len(generation.tokens)
                raise Refusal("bad_request", f"the prompt has {size} tokens, the context of {model} is {card.context}")
            wrong = next((token for token in generation.tokens if token >= card.vocabulary), None)
            if wrong is not None:
                raise Refusal(
                    "bad_request", f"token id {wrong} is outside of {model}'s vocabulary of {card.vocabulary}"
                )
        for field, ids in (
            ("stop_tokens", generation.stop_tokens),
            ("logit_bias", [token for token, _ in generation.logit_bias]),
        ):
            wrong = next((token for token in ids if token >= card.vocabulary), None)
            if wrong is not None:
                text = f"{field} has token id {wrong}, outside of {model}'s vocabulary of {card.vocabulary}"
                raise Refusal("bad_request", text)
        if generation.messages is not None and not card.chat:
            raise Refusal("bad_request", f"{model} has no chat template: send a prompt instead of messages")
        about(parsed.request)
        return parsed

    async def accept(self, parsed: ParsedRequest, reply: str) -> Status:
        """Append an accepted request. Raises `Refusal` where the cell has no room, or where parts are missing."""
        known = self._requests().known(parsed.request)
        placement = self._placement()
        limit, several = placement.configuration.queue_limit, parsed.accepted.generation.n
        if known is None and placement.waiting + several > limit:
            model = placement.models.get(parsed.accepted.model)
            retry_ms = placement.retry_ms(model) if model is not None else 1000
            waiting = f"{placement.waiting} requests wait already (the limit is {limit})"
            waiting += f", {several} more do not fit" if several > 1 else ""
            raise Refusal("queue_full", f"{waiting}; try again in {retry_ms} ms", retry_ms=retry_ms)
        if known is None and self._percent >= FULL_PERCENT:
            full = f"the ledger is filled to {FULL_PERCENT} % of its limit"
            raise Refusal("ledger_full", f"{full}: no new requests until an operator makes room", retry_ms=60_000)
        if known is None and self._tokens_percent >= FULL_PERCENT:
            # A worker whose pages find no room stops with all that it holds, until old ones expire.
            full = f"the stream of tokens is filled to {FULL_PERCENT} % of its limit"
            raise Refusal("ledger_full", f"{full}: no new requests until old answers expire", retry_ms=60_000)
        self._refuse_repeats()
        fact = parsed.fact(reply)
        body = body_digest(fact.generation, fact.model)
        again = known is not None and known.body == body
        if known is not None and not again:
            key, client = fact.key, fact.client
            raise Refusal("key_reused", f"the key {key!r} of client {client!r} was used for another request before")
        if not again and fact.generation.parts is not None:
            fact = msgspec.structs.replace(fact, deadline_ms=await self._deadline(fact, fact.generation.parts))
        try:
            if not again:
                mark = hashlib.blake2b(f"{body} {reply} {parsed.start}".encode(), digest_size=8).hexdigest()
                appended = await self.state("requests", fact, f"fact.intake.{parsed.request}.{mark}")
                again = appended.duplicate
                if again and not await self._stands(parsed.request):
                    # The server takes it for a repeat still, and the cell has forgotten what it would repeat.
                    await self.state("requests", fact, "")
                    again = False
            if again and fact.reply is not None:
                # The request stands in the ledger; whoever repeats it wants to be shown what there is.
                await self.state("requests", ReaderAttached(parsed.request, fact.reply), "")
        except NotTaken:
            raise no_leader() from None
        except NoAnswer:
            return unknown(parsed.request, "the ledger did not answer in time: repeat with the same key", retry_ms=1000)
        except LogFull:
            full = "the ledger is full: no new requests until an operator makes room"
            raise Refusal("ledger_full", full, retry_ms=60_000) from None
        log.info("request accepted", request=parsed.request, model=fact.model, again=again)
        return accepted(parsed.request)

    async def _stands(self, request: str) -> bool:
        """Whether the cell knows a request by now; another control may just have accepted it."""
        if self._requests().known(request) is None:
            await self._catch_up()
        return self._requests().known(request) is not None

    async def _deadline(self, fact: RequestAccepted, parts: PromptParts) -> int:
        """Milliseconds until the request has to have ended: before its parts expire. Raises `Refusal`."""
        left = self._parts_age_ns
        try:
            for index in dict.fromkeys((0, parts.count - 1)):
                record = await self._bus.parts.last(self._subjects.part(parts.upload, index))
                if record is None:
                    raise Refusal("unknown_parts", missing(parts, index))
                left = min(left, record.timestamp + self._parts_age_ns - self._bus.wall())
        except NoAnswer:
            raise Refusal(
                "not_ready", "the parts of the prompt cannot be looked at: try again", retry_ms=1000
            ) from None
        if not self._parts_age_ns:
            return fact.deadline_ms
        left_ms = left // 1_000_000 - PARTS_MARGIN_MS
        if left_ms <= 0:
            soon = f"the parts of upload {parts.upload} expire within {PARTS_MARGIN_MS // 1000} s"
            raise Refusal("unknown_parts", f"{soon}: upload them again under another name")
        return min(fact.deadline_ms, left_ms) if fact.deadline_ms else left_ms

    async def state(self, actor: str, message: Message, message_id: str) -> Appended:
        """Append a fact under intake's name."""
        payload = encode(FactEnvelope("intake", msgspec.Raw(encode(message))))
        subject = self._subjects.fact(actor, kind_of(message))
        return await self._buffer.append(subject, payload, message_id)

    async def _cancel(self, delivery: Delivery) -> Answer:
        request = await self._known(delivery)
        if not self._requests().over(request):
            # Under one id a key may come to stand for another request, once the first one is forgotten.
            accepted_at = self._requests().requests[request].accepted
            await self._stated("requests", CancelRequested(request), f"fact.intake.cancel.{request}.{accepted_at}")
            log.info("cancel accepted", request=request)
        return accepted(request)

    async def _resume(self, delivery: Delivery) -> Answer:
        request = await self._known(delivery)
        parsed = parse_resume(delivery.payload, delivery.headers.get("Content-Type"))
        if not delivery.reply:
            raise Refusal("bad_request", "resume needs a reply subject")
        self._refuse_repeats()
        await self._stated("requests", ReaderAttached(request, parsed.reply_to(delivery.reply)), "")
        return accepted(request) if parsed.stream else None

    def _refuse_repeats(self) -> None:
        if self._percent >= REPEATS_PERCENT:
            full = f"the ledger is filled to {REPEATS_PERCENT} % of its limit"
            raise Refusal("ledger_full", f"{full}: ask for the result instead, or come again later", retry_ms=60_000)

    async def _stated(self, actor: str, message: Message, message_id: str) -> Appended:
        try:
            return await self.state(actor, message, message_id)
        except NotTaken:
            raise no_leader() from None
        except NoAnswer:
            raise Refusal("not_ready", "the ledger did not answer in time: try again", retry_ms=1000) from None
        except LogFull:
            full = "the ledger is full: nothing can be stated until an operator makes room"
            raise Refusal("ledger_full", full, retry_ms=60_000) from None

    async def _result(self, delivery: Delivery) -> Answer:
        name = await self._known(delivery)
        state = self._requests()
        requests = [(member, state.requests[member]) for member in state.members(name)]
        if state.over(name):
            return await self._results.result(name, [as_ended(member, request) for member, request in requests])
        positions = sum(request.position for _, request in requests)
        choices = [far(as_ended(member, request)) for member, request in requests] if len(requests) > 1 else []
        return Result("running", name, positions, choices=tuple(choices))

    async def _known(self, delivery: Delivery) -> str:
        """The request that a subject names. Another control may just have accepted it: what is unknown gets a look."""
        request = parse_request_id(self._subjects.last_token(delivery.subject))
        about(request)
        if not self._live():
            raise Refusal("not_ready", "this control is still reading the ledger", retry_ms=1000)
        if not await self._stands(request):
            kept = self._requests().configuration.retention_ms // 1000
            raise Refusal("unknown_request", f"no request {request} is known here; ended ones are kept for {kept} s")
        return request

    async def _catch_up(self) -> None:
        """Until this replica has read what stands in the ledger now, at most a second."""
        end = (await self._bus.ledger.usage()).last_sequence
        for _ in range(200):
            if self._position() >= end:
                return
            await asyncio.sleep(0.005)

    # ---- operators --------------------------------------------------------------------------------------------

    async def _admin(self, delivery: Delivery) -> Answer:
        verb = self._subjects.last_token(delivery.subject)
        if verb == "models":
            return models_view(self._placement())
        if verb == "status":
            return status_view(
                self._cell(), self._placement(), self._requests(), self._subjects.cell, self._streams, live=self._live()
            )
        if verb == "snapshot":
            if not self._live():
                raise Refusal("not_ready", "this control is still reading the ledger", retry_ms=1000)
            self.wants_snapshot()
            return accepted("")
        if verb == "model.warm":
            return await self._warm(delivery)
        if verb not in ("model.add", "model.remove"):
            verbs = "models, status, snapshot, model.add, model.remove or model.warm"
            raise Refusal("bad_request", f"unknown verb {verb[:80]!r}: use {verbs}")
        content_type = delivery.headers.get("Content-Type")
        model, source = parse_model(delivery.payload, content_type, source=verb == "model.add")
        if verb == "model.remove" and model not in self._placement().models:
            raise Refusal("unknown_model", f"no model {model!r} in this cell")
        message: Message = ModelAdded(model, source) if verb == "model.add" else ModelRemoved(model)
        await self._stated("placement", message, "")
        return accepted("")

    async def _warm(self, delivery: Delivery) -> Answer:
        """The model in DRAM before requests come; `fact` is what `model.warmed` refers to."""
        model, server = parse_warm(delivery.payload, delivery.headers.get("Content-Type"))
        placement = self._placement()
        if model not in placement.models or placement.models[model].removed:
            raise Refusal("unknown_model", f"no model {model!r} in this cell")
        if server and server not in placement.servers:
            raise Refusal("bad_request", f"there is no server {server!r} in this cell: `longshore status` shows which")
        if self._cell().rules < WARM_RULES:
            older = f"the cell follows rule version {self._cell().rules}, models are warmed from {WARM_RULES} on"
            raise Refusal("bad_request", f"{older}: `longshore rules activate {WARM_RULES}`")
        stated = await self._stated("placement", ModelWanted(model, server), "")
        return {"status": "accepted", "request": "", "fact": stated.sequence}

    # ---- what the replica knows -------------------------------------------------------------------------------

    def _requests(self) -> RequestsState:
        actor = self._cell().actors.get("requests")
        return cast(RequestsState, actor.state) if actor is not None else RequestsState()

    def _placement(self) -> PlacementState:
        actor = self._cell().actors.get("placement")
        return cast(PlacementState, actor.state) if actor is not None else PlacementState()


def _check_inputs(inputs: tuple[Input, ...], card: ModelCard) -> None:
    """What can be known of inputs without a tokenizer. Raises `Refusal`."""
    for number, item in enumerate(inputs):
        if isinstance(item, str):
            continue
        if len(item) > card.context:
            size = f"tokens[{number}] has {len(item)} tokens"
            raise Refusal("bad_request", f"{size}, the context of {card.model} is {card.context}")
        wrong = next((token for token in item if token >= card.vocabulary), None)
        if wrong is not None:
            outside = f"token id {wrong} in tokens[{number}] is outside"
            raise Refusal("bad_request", f"{outside} of {card.model}'s vocabulary of {card.vocabulary}")
