"""The actor that owns requests: from the accepted fact to the one end, over as many attempts as it takes.

    accepted > queued ──placed──▶ running ──finished──▶ ended
                  ▲                  │ sealed (worker died), rejected with retry
                  └──────────────────┘ next attempt, from the first position that is not durable

A request that asks for several answers is a family: each answer (choice) is a request of its own here, placed, moved,
recovered and ended on its own, with a seed and an id that follow from the family's. The first has the family's id.

Rules
* A request ends exactly once. While a worker holds it (running), only that worker's fact or the seal of its epoch
  ends it: cancel and deadline are effects then. While it is queued, this actor ends it at once.
* An attempt ends at a position; the next one starts there. What lies before is cited (spans), never copied.
* A repeated acceptance under the same id adds a reader; under another body it is refused.
* Whoever is told of an end that no worker shows is shown the durable positions with it.
* While it runs, somebody else may prepare to go on with it (`actors.migration`). Whatever ends the attempt without
  ending the request then hands it to the heir that was named, at the position that is durable.
* Ended requests are kept for `retention_ms`, then forgotten; one timer serves them all. A family counts as ended when
  its last answer is: only that ends its readers' streams, and they are told by the reader of control.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from actors.actor import Actor
from actors.dead_letters import dead_letter, note_death
from actors.request_moves import about_tokens, is_meant, not_moved
from actors.request_state import Family, Request, RequestsState, as_ended
from bus.messages import (
    CancelRequested,
    Choice,
    ChoicesEnded,
    DescribeMove,
    GoOn,
    HandedOver,
    HeirLost,
    MoveDescribed,
    MoveOver,
    NameHeir,
    PlacementRefused,
    PlaceRequest,
    ReaderAdded,
    ReaderAttached,
    ReaderRefused,
    ReplyTo,
    RequestAccepted,
    RequestEnded,
    RequestPlaced,
    RequestsConfigured,
    RunSequence,
    SequenceEnded,
    SequenceRejected,
    SetTimer,
    ShowFrom,
    ShowPositions,
    SlotReleased,
    SlotTaken,
    Span,
    StopSequence,
    TimerFired,
    To,
    body_digest,
    choice_id,
    is_small,
)

REPLIES_LIMIT = 64
"""Readers of one request at a time; the oldest makes room."""

REJECTIONS_LIMIT = 20
"""How often workers may send a request back without having begun it: no death, but no progress either."""

RETENTION = "retention"
MILLISECOND = 1_000_000
SECOND = 1_000_000_000
LATEST = 2**62
"""No timer is due later than a message can say."""


class Requests(Actor):
    """See the head of this file. `state.requests` is keyed by request id; `state.ended` by id in order of ending."""

    State = RequestsState
    state: RequestsState

    # ---- from intake ------------------------------------------------------------------------------------------

    def on_RequestAccepted(self, message: RequestAccepted, now: int) -> list[To]:
        body = body_digest(message.generation, message.model)
        known = self.state.known(message.request)
        if known is not None:
            if message.reply is None:
                return []
            if known.body != body:
                reason = f"the key {message.key!r} of client {message.client!r} was used for another request before"
                return [To("reader", ReaderRefused(message.request, message.reply, "key_reused", reason))]
            return self._show(message.request, known, message.reply)
        of = message.generation.n
        if of == 1:
            said = [self._new(message.request, message, body, now, None)]
        else:
            members = [choice_id(message.request, message.client, message.key, index) for index in range(of)]
            self.state.families[message.request] = Family(members, of, [message.reply] if message.reply else [])
            said = [
                self._new(member, message, body, now, Choice(message.request, index, of))
                for index, member in enumerate(members)
            ]
        deadline = self.state.requests[message.request].deadline
        return [*said, To("timer", SetTimer(deadline, message.request))] if deadline else said

    def _new(self, name: str, message: RequestAccepted, body: str, now: int, choice: Choice | None) -> To:
        shown = message.reply is not None and (choice is None or not message.reply.single)
        request = self.state.requests[name] = Request(
            model=message.model,
            client=message.client,
            key=message.key,
            body=body,
            accepted=message.sequence,
            accepted_at=now,
            deadline=min(LATEST, now + message.deadline_ms * MILLISECOND) if message.deadline_ms else 0,
            priority=message.priority,
            replies=[message.reply] if message.reply is not None and shown else [],
            spans=[],
            small=message.generation if is_small(message.generation) else None,
            choice=choice,
        )
        return self._wish(name, request, about_tokens(message.generation))

    def on_ReaderAttached(self, message: ReaderAttached, now: int) -> list[To]:
        request = self.state.known(message.request)
        if request is None:
            kept = self.state.configuration.retention_ms // 1000
            reason = f"no request {message.request} is known here; ended ones are kept for {kept} s"
            return [To("reader", ReaderRefused(message.request, message.reply, "unknown_request", reason))]
        return self._show(message.request, request, message.reply)

    def on_CancelRequested(self, message: CancelRequested, now: int) -> list[To]:
        return self._stop_all(message.request, "cancelled", now)

    def on_RequestsConfigured(self, message: RequestsConfigured, now: int) -> list[To]:
        self.state.configuration = message
        return []

    def on_TimerFired(self, message: TimerFired, now: int) -> list[To]:
        if message.about != RETENTION:
            request = self.state.requests.get(message.about)
            due = request is not None and 0 < request.deadline <= now
            return self._stop_all(message.about, "deadline", now) if due else []
        self.state.retention_timer = False
        limit = now - self.state.configuration.retention_ms * MILLISECOND
        while self.state.ended:
            name, ended_at = next(iter(self.state.ended.items()))
            if ended_at > limit:
                break
            del self.state.ended[name]
            del self.state.requests[name]
            self.state.families.pop(name, None)
        return self._arm_retention(now)

    # ---- from placement ---------------------------------------------------------------------------------------

    def on_RequestPlaced(self, message: RequestPlaced, now: int) -> list[To]:
        request = self.state.requests.get(message.request)
        if request is None or request.status != "queued" or request.attempt != message.attempt:
            model = request.model if request is not None else "?"
            return [To("placement", SlotReleased(message.request, message.attempt, model))]
        request.status, request.worker = "running", message.worker
        run = RunSequence(
            request=message.request,
            attempt=request.attempt,
            model=request.model,
            accepted=request.accepted,
            position=request.position,
            history=tuple(request.spans),
            replies=tuple(request.replies),
            generation=request.small,
            choice=request.choice,
        )
        request.small = None
        return [To(message.worker, run)]

    def on_PlacementRefused(self, message: PlacementRefused, now: int) -> list[To]:
        request = self.state.requests.get(message.request)
        if request is None or request.status != "queued" or request.attempt != message.attempt:
            return []
        return self._end(
            message.request, request, now, "failed", code=message.code, reason=message.reason, retry_ms=message.retry_ms
        )

    # ---- from workers -----------------------------------------------------------------------------------------

    def on_SequenceEnded(self, message: SequenceEnded, now: int) -> list[To]:
        request = self._running(message.request, message.attempt)
        if request is None:
            return []
        request.prompt_tokens = message.prompt_tokens or request.prompt_tokens
        said = self._advance(message.request, request, message.span)
        if message.reason:
            computed = self._computed(message.span)
            released = To("placement", SlotReleased(message.request, message.attempt, request.model, computed))
            return [*self._end_as(message, request, now), released]
        if not message.left:
            request.deaths += 1
            note_death(request, self.state.configuration, message.span, "its worker died")
        if request.stopping:
            return self._end(message.request, request, now, self._stopped(request))
        if not message.left and request.deaths >= self.state.configuration.deaths_limit:
            reason = f"{request.deaths} workers died while they held this request"
            return self._end(message.request, request, now, "quarantined", code="quarantined", reason=reason)
        return [*said, *self._again(message.request, request)]

    def _end_as(self, message: SequenceEnded, request: Request, now: int) -> list[To]:
        """A page ended it; its readers saw that, unless a seal found the page."""
        shown = message.span is None or not message.span.sealed
        name, missed = message.request, message.missed
        match message.reason:
            case "stop" | "length":
                return self._end(name, request, now, "finished", end=message.reason, shown=shown, missed=missed)
            case "cancelled" | "deadline":
                return self._end(name, request, now, message.reason, shown=shown, missed=missed)
        return []

    def on_SequenceRejected(self, message: SequenceRejected, now: int) -> list[To]:
        request = self._running(message.request, message.attempt)
        if request is None:
            return []
        released = To("placement", SlotReleased(message.request, message.attempt, request.model))
        said = self._advance(message.request, request, message.span)
        if not message.retry:
            ended = self._end(message.request, request, now, "failed", code=message.code, reason=message.reason)
            return [*ended, released]
        if request.stopping:
            return [*self._end(message.request, request, now, self._stopped(request)), released]
        note_death(request, self.state.configuration, message.span, f"{message.code}: {message.reason}"[:4000])
        if message.code == "engine_error":
            request.deaths += 1
        else:
            request.rejections += 1
        if request.deaths >= self.state.configuration.deaths_limit or request.rejections >= REJECTIONS_LIMIT:
            count = request.deaths + request.rejections
            reason = f"{count} workers gave this request up, the last one because {message.reason}"[:4000]
            ended = self._end(message.request, request, now, "quarantined", code="quarantined", reason=reason)
            return [*ended, released]
        return [released, *said, *self._again(message.request, request)]

    def on_ReaderAdded(self, message: ReaderAdded, now: int) -> list[To]:
        """The worker no longer had the sequence when the reader came: show it what is durable by now."""
        request = self.state.requests.get(message.request)
        if message.found or request is None:
            return []
        said = self._show_one(message.request, request, message.reply)
        if request.choice is None:
            return said
        name = request.choice.family
        family = self.state.families[name]
        # Its readers may have been told of the last end before; whoever waits for one more word gets it.
        return said if family.running else [*said, self._all_ended(name, request.model, family, (message.reply,))]

    # ---- from migration ---------------------------------------------------------------------------------------

    def on_DescribeMove(self, message: DescribeMove, now: int) -> list[To]:
        said: list[To] = []
        for name in self.state.members(message.request) if message.request else list(self.state.requests):
            request = self.state.requests.get(name)
            if request is not None and request.status == "running" and not request.stopping:
                if is_meant(request, message):
                    said.append(self._describe(name, request, message))
            elif message.request:
                said.append(not_moved(name, request))
        return said

    def _describe(self, name: str, request: Request, message: DescribeMove) -> To:
        heir = max(request.attempt, request.tried) + 1
        # A move that came to nothing is not told here: its heir's number must not be given away a second time.
        if self.rules >= 3 or not request.moving:
            request.moving, request.tried = True, heir
        described = MoveDescribed(
            request=name,
            attempt=request.attempt,
            heir=heir,
            model=request.model,
            worker=request.worker,
            accepted=request.accepted,
            position=request.position,
            history=tuple(request.spans),
            choice=request.choice,
            to=message.to,
            why=message.why,
        )
        return To("migration", described)

    def on_NameHeir(self, message: NameHeir, now: int) -> list[To]:
        request = self.state.requests.get(message.request)
        if request is not None and request.moving:
            request.heir, request.heir_attempt = message.worker, message.attempt
        return []

    def on_HeirLost(self, message: HeirLost, now: int) -> list[To]:
        request = self.state.requests.get(message.request)
        if request is not None and request.heir_attempt == message.attempt:
            request.heir = ""
        return []

    def on_HandedOver(self, message: HandedOver, now: int) -> list[To]:
        request = self._running(message.request, message.attempt)
        if request is None:
            return []
        request.prompt_tokens = message.prompt_tokens or request.prompt_tokens
        said = self._advance(message.request, request, message.span)
        computed = self._computed(message.span)
        released = To("placement", SlotReleased(message.request, message.attempt, request.model, computed))
        if request.stopping:
            return [*said, *self._end(message.request, request, now, self._stopped(request)), released]
        return [released, *said, *self._again(message.request, request)]

    # ---- what they have in common -----------------------------------------------------------------------------

    def _running(self, name: str, attempt: int) -> Request | None:
        request = self.state.requests.get(name)
        if request is None or request.status != "running" or request.attempt != attempt:
            return None
        return request

    def _advance(self, name: str, request: Request, span: Span | None) -> list[To]:
        """Note durable positions; what a dead worker may not have shown is shown again."""
        if span is None or span.next <= span.first:
            return []
        request.spans.append(span)
        request.position = span.next
        streams = tuple(reply for reply in request.replies if not reply.single)
        if not span.sealed or not streams:
            return []
        return [To("reader", ShowPositions(name, request.model, streams, (span,), request.choice))]

    def _again(self, name: str, request: Request) -> list[To]:
        """Its heir goes on with it; without one it is placed anew."""
        if request.heir:
            return self._inherit(name, request)
        said = self._no_move(name, request, "the source let go before anybody could go on")
        request.status, request.worker = "queued", ""
        request.attempt = request.tried = max(request.attempt, request.tried) + 1
        return [*said, self._wish(name, request)]

    def _inherit(self, name: str, request: Request) -> list[To]:
        over = MoveOver(name, request.attempt, moved=True)
        request.worker, request.attempt = request.heir, request.heir_attempt
        request.heir, request.moving = "", False
        # A reader of the stream was shown what is durable; whatever it missed, it asks for.
        replies = tuple(
            reply if reply.single else msgspec.structs.replace(reply, start=max(reply.start, request.position))
            for reply in request.replies
        )
        go_on = GoOn(name, request.attempt, request.position, tuple(request.spans), replies)
        known = request.prompt_tokens + request.position if self.rules >= 3 and request.prompt_tokens else 0
        taken = To("placement", SlotTaken(name, request.attempt, known))
        return [To(request.worker, go_on), taken, To("migration", over)]

    @staticmethod
    def _no_move(name: str, request: Request, reason: str) -> list[To]:
        """Whoever prepares to go on with it is told that there is nothing to go on with."""
        if not request.moving:
            return []
        request.moving, request.heir = False, ""
        return [To("migration", MoveOver(name, request.attempt, reason=reason))]

    def _computed(self, span: Span | None) -> int:
        return span.next - span.first if span is not None and self.rules >= 3 else 0

    def _wish(self, name: str, request: Request, prompt_tokens: int = 0) -> To:
        wish = PlaceRequest(name, request.attempt, request.model, request.accepted, request.priority, request.choice)
        if self.rules >= 3:
            tokens = (request.prompt_tokens or prompt_tokens) + request.position
            wish = msgspec.structs.replace(wish, deadline=request.deadline, tokens=tokens)
        return To("placement", wish)

    def _stop_all(self, name: str, reason: Literal["cancelled", "deadline"], now: int) -> list[To]:
        return [to for member in self.state.members(name) for to in self._stop(member, reason, now)]

    def _stop(self, name: str, reason: Literal["cancelled", "deadline"], now: int) -> list[To]:
        request = self.state.requests.get(name)
        if request is None or request.status == "ended" or request.stopping:
            return []
        if request.status == "queued":
            released = To("placement", SlotReleased(name, request.attempt, request.model))
            return [*self._end(name, request, now, reason), released]
        request.stopping = reason
        return [To(request.worker, StopSequence(name, request.attempt, reason))]

    @staticmethod
    def _stopped(request: Request) -> Literal["cancelled", "deadline"]:
        return "cancelled" if request.stopping == "cancelled" else "deadline"

    def _show(self, name: str, request: Request, reply: ReplyTo) -> list[To]:
        """Show a request that a client names, all its answers, to a reader."""
        family = self.state.families.get(name)
        if family is None:
            return self._show_one(name, request, reply)
        said: list[To] = []
        for member in family.members if not reply.single else ():
            said += self._show_one(member, self.state.requests[member], reply)
        if not family.running:
            return [*said, self._all_ended(name, request.model, family, (reply,))]
        _attach(family.replies, reply)
        return said

    def _show_one(self, name: str, request: Request, reply: ReplyTo) -> list[To]:
        """Show one answer to a reader from `reply.start` on, wherever its positions are."""
        if request.status == "ended":
            return [To("reader", self._ended(name, request, replies=(reply,), shown=False))]
        _attach(request.replies, reply)
        if request.status == "running":
            return [To(request.worker, ShowFrom(name, request.attempt, reply))]
        if request.spans and not reply.single:
            shown = ShowPositions(name, request.model, (reply,), tuple(request.spans), request.choice)
            return [To("reader", shown)]
        return []

    def _end(
        self,
        name: str,
        request: Request,
        now: int,
        outcome: Literal["finished", "failed", "cancelled", "deadline", "quarantined"],
        *,
        end: Literal["", "stop", "length"] = "",
        code: str = "",
        reason: str = "",
        retry_ms: int = 0,
        shown: bool = False,
        missed: tuple[ReplyTo, ...] = (),
    ) -> list[To]:
        over = self._no_move(name, request, f"it ended as {outcome}")
        request.status, request.worker, request.ended_at = "ended", "", now
        request.outcome, request.end, request.code, request.reason = outcome, end, code, reason
        request.retry_ms = retry_ms
        replies = tuple(request.replies)
        request.replies = []
        said = [To("reader", self._ended(name, request, replies=replies, shown=shown))]
        if shown and missed:
            said.append(To("reader", self._ended(name, request, replies=missed, shown=False)))
        if request.choice is None:
            self.state.ended[name] = now
        else:
            said += self._end_in_family(request.choice.family, request.model, now)
        if outcome == "quarantined":
            said += dead_letter(name, request, self.state.configuration)
        return [*said, *over, *self._arm_retention(now)]

    def _end_in_family(self, name: str, model: str, now: int) -> list[To]:
        """One of its answers has ended; after the last one, everybody who reads the family is told so."""
        family = self.state.families[name]
        family.running -= 1
        if family.running:
            return []
        for member in family.members:
            self.state.ended[member] = now
        replies, family.replies = tuple(family.replies), []
        return [self._all_ended(name, model, family, replies)] if replies else []

    def _all_ended(self, name: str, model: str, family: Family, replies: tuple[ReplyTo, ...]) -> To:
        choices: tuple[RequestEnded, ...] = ()
        if any(reply.single for reply in replies):
            choices = tuple(as_ended(member, self.state.requests[member]) for member in family.members)
        return To("reader", ChoicesEnded(name, model, replies, choices))

    @staticmethod
    def _ended(name: str, request: Request, *, replies: tuple[ReplyTo, ...], shown: bool) -> RequestEnded:
        if shown or not replies:
            return msgspec.structs.replace(as_ended(name, request), shown=shown, spans=())
        return msgspec.structs.replace(as_ended(name, request), replies=replies)

    def _arm_retention(self, now: int) -> list[To]:
        """For the oldest that ended, and not more than once a second."""
        if self.state.retention_timer or not self.state.ended:
            return []
        self.state.retention_timer = True
        due = next(iter(self.state.ended.values())) + self.state.configuration.retention_ms * MILLISECOND
        return [To("timer", SetTimer(min(LATEST, max(due, now + SECOND)), RETENTION))]


def _attach(replies: list[ReplyTo], reply: ReplyTo) -> None:
    """Add a reader in place of an earlier one with this subject; the oldest of too many makes room."""
    replies[:] = [known for known in replies if known.subject != reply.subject]
    replies.append(reply)
    del replies[:-REPLIES_LIMIT]
