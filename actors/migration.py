"""The actor that moves running sequences from one worker to another, without their readers noticing.

    asked ▸ described ▸ slot kept ▸ following ──caught up──▶ handing over ──released──▶ moved
                           │            │                        │
                           └── denied ──┴──── heir lost ─────────┴── source over ──▶ stays, or recovery

The destination follows the source's durable pages and recomputes the KV cache while the source goes on decoding; each
round is shorter than the one before (PAPER, contribution 2). When the gap is small the source stops at a step, its last
page is the hand-over, and the destination goes on from there.

Rules
* One move of a sequence at a time; a second one is denied and changes nothing.
* Until the hand-over is ordered the source knows nothing of a move: whatever fails before leaves it as it was.
* The heir is named to the requests in the same step as the hand-over is ordered. From there on, whatever becomes of the
  source, its attempt ends in pages or in a seal, and the heir goes on from exactly there; if the heir is lost, the
  request is placed anew as after a death.
* A move that is over leaves nothing behind: no slot is kept, and nobody follows.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from actors.actor import Actor
from bus.messages import (
    DescribeMove,
    DropHeir,
    Following,
    HandOver,
    HeirLost,
    HeirReady,
    MigrateRequested,
    MoveDescribed,
    MoveEnded,
    MoveOver,
    MoveStarted,
    MoveWanted,
    NameHeir,
    SlotDenied,
    SlotKept,
    SlotReleased,
    To,
    WantSlot,
)


class Move(msgspec.Struct):
    """One sequence on its way. `source_attempt` runs on `source`; `attempt` is to go on at `heir`."""

    described: MoveDescribed
    attempt: int
    since: int
    phase: Literal["placing", "following", "handing-over"] = "placing"
    heir: str = ""
    rounds: int = 0


class MigrationState(msgspec.Struct):
    """`moves` by request."""

    moves: dict[str, Move] = {}


class Migration(Actor):
    """See the head of this file."""

    State = MigrationState
    state: MigrationState

    # ---- who wants what moved ---------------------------------------------------------------------------------

    def on_MigrateRequested(self, message: MigrateRequested, now: int) -> list[To]:
        wanted = DescribeMove(message.request, message.model, message.server, message.to, "an operator asked for it")
        return [To("requests", wanted)]

    def on_MoveWanted(self, message: MoveWanted, now: int) -> list[To]:
        return [To("requests", DescribeMove(message.request, message.model, message.worker, message.to, message.why))]

    def on_MoveDescribed(self, message: MoveDescribed, now: int) -> list[To]:
        if message.request in self.state.moves:
            why = "it is being moved already"
            return [self._told(message, "", moved=False, reason=why, rounds=0, elapsed=0)]
        self.state.moves[message.request] = Move(message, message.heir, now)
        want = WantSlot(message.request, message.heir, message.model, message.worker, message.to)
        return [To("placement", want)]

    # ---- its course -------------------------------------------------------------------------------------------

    def on_SlotKept(self, message: SlotKept, now: int) -> list[To]:
        move = self._move(message.request, message.attempt)
        if move is None or move.phase != "placing":
            model = move.described.model if move is not None else "?"
            return [To("placement", SlotReleased(message.request, message.attempt, model))]
        move.phase, move.heir = "following", message.worker
        described = move.described
        following = Following(
            request=message.request,
            attempt=message.attempt,
            heir=message.worker,
            source=described.worker,
            source_attempt=described.attempt,
            model=described.model,
            accepted=described.accepted,
            position=described.position,
            history=described.history,
            generation=described.generation,
            choice=described.choice,
        )
        started = MoveStarted(message.request, message.attempt, described.worker, message.worker, described.why)
        return [To(described.worker, following), To("record", started)]

    def on_SlotDenied(self, message: SlotDenied, now: int) -> list[To]:
        move = self._move(message.request, message.attempt)
        return self._end(message.request, move, now, reason=message.reason) if move is not None else []

    def on_HeirReady(self, message: HeirReady, now: int) -> list[To]:
        move = self._move(message.request, message.attempt)
        if move is None or move.phase != "following":
            return []
        move.phase, move.rounds = "handing-over", message.rounds
        described = move.described
        return [
            To("requests", NameHeir(message.request, message.attempt, move.heir)),
            To(described.worker, HandOver(message.request, described.attempt)),
        ]

    def on_HeirLost(self, message: HeirLost, now: int) -> list[To]:
        move = self._move(message.request, message.attempt)
        if move is None:
            return []
        said = [To("requests", message)] if move.phase == "handing-over" else []
        move.phase = "placing"  # nobody is there any more who would have to forget it
        return [*said, *self._end(message.request, move, now, reason=message.reason)]

    def on_MoveOver(self, message: MoveOver, now: int) -> list[To]:
        move = self.state.moves.get(message.request)
        if move is None or move.described.attempt != message.attempt:
            return []
        return self._end(message.request, move, now, moved=message.moved, reason=message.reason)

    # ---- what they have in common -----------------------------------------------------------------------------

    def _move(self, request: str, attempt: int) -> Move | None:
        move = self.state.moves.get(request)
        return move if move is not None and move.attempt == attempt else None

    def _end(self, request: str, move: Move, now: int, *, moved: bool = False, reason: str = "") -> list[To]:
        del self.state.moves[request]
        said: list[To] = []
        if not moved:
            if move.phase != "placing":
                said.append(To(move.heir, DropHeir(request, move.attempt)))
            said.append(To("placement", SlotReleased(request, move.attempt, move.described.model)))
        elapsed = max(0, now - move.since)
        told = self._told(move.described, move.heir, moved=moved, reason=reason, rounds=move.rounds, elapsed=elapsed)
        return [*said, told]

    @staticmethod
    def _told(described: MoveDescribed, heir: str, *, moved: bool, reason: str, rounds: int, elapsed: int) -> To:
        ended = MoveEnded(
            request=described.request,
            attempt=described.attempt,
            source=described.worker,
            destination=heir,
            moved=moved,
            rounds=rounds,
            reason=reason,
            elapsed_ns=elapsed,
        )
        return To("record", ended)
