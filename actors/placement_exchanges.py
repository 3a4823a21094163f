"""Exchanges: what runs on a device is moved away, so that a model that lies near it starts there (rule version 3).

    request waits, its model runs nowhere ▸ weighed ▸ device drained for it, moves asked ▸ moved away ▸ stopped ▸ start
                                                            │
                                                            └── a move failed ▸ the device is drained as ever, or the
                                                                model starts at the free place that was slower

Placement asks, `actors.migration` moves. What an exchange counts on is reserved in the step that decides it: the device
like any that is drained (`room`), destinations by starting there what does not run there yet.

Hysteresis. An exchange has to be sooner than what else there is (a free place; waiting for what runs) by a quarter of
that, and by MARGIN_NS and the error of the estimate beside it. A sequence that placement has moved, or tried to, stays
for HOLD_NS, and is moved MOVES_LIMIT times at the most. A request gets EXCHANGES_LIMIT exchanges, LOOK_NS apart.

While nobody waits, what shares a device moves to one that idles (`actors.placement_spread`): one instance at a time,
HOLD_NS apart, looked for once a LOOK_NS at the most, and no sequence that was moved before.
"""

from __future__ import annotations

from actors.learning import SECOND, learned
from actors.placement_exchange import HOLD_NS, MARGIN_NS, Exchange, choose_exchange, drain_time
from actors.placement_pump import PlacementPump
from actors.placement_spread import choose_spread
from actors.placement_start import Option
from actors.placement_state import ExchangeUnderWay, KnownModel, Placed, Room, RunningSequence
from actors.resume_times import ResumeTimes
from bus.messages import (
    InstanceDraining,
    MoveWanted,
    PlacementExchanged,
    PlacementSpread,
    PlannedMove,
    SlotReleased,
    SlotTaken,
    To,
)

EXCHANGES_LIMIT = 2
"""How often something is moved away for one waiting request."""
LOOK_NS = SECOND
"""Between two exchanges for one request."""
PATIENCE_NS = 10 * SECOND
"""How long beyond four times its estimate an exchange may take before the model may start elsewhere."""


class PlacementExchanges(PlacementPump):
    """Decides exchanges and follows them; learns how long moves take."""

    # ---- deciding ---------------------------------------------------------------------------------------------

    def _exchange(self, name: str, model: KnownModel, options: list[Option], now: int) -> list[To] | None:
        """What an exchange for this model has to say now; None where it is to start or to wait as ever."""
        under_way = self.state.exchange.rooms.get(name)
        if under_way is not None:
            if self._goes_on(name, under_way, now):
                return self._stop_idle(name)
            del self.state.exchange.rooms[name]
        request = next(iter(self.state.queues[name]))
        times, last = self.state.exchange.tried.get(request, (0, 0))
        if times >= EXCHANGES_LIMIT or (times and now - last < LOOK_NS):
            return None
        start_ns = options[0].total_ns if options else 0
        if self._stops_for(name) or (start_ns and not _is_worth(model.attach_ns, start_ns)):
            return None  # no exchange is sooner than the attach alone
        found = choose_exchange(self.state, model, now, self.rules)
        if found is None:
            return None
        drain_ns = drain_time(self.state, model, now, self.rules)
        known = [other for other in (drain_ns, start_ns) if other]
        if known and not _is_worth(found.total_ns + found.error_ns, min(known)):
            return None
        self.state.exchange.tried[request] = (times + 1, now)
        return self._begin_exchange(name, model, request, found, drain_ns, start_ns, now)

    def _begin_exchange(
        self, name: str, model: KnownModel, request: str, found: Exchange, drain_ns: int, start_ns: int, now: int
    ) -> list[To]:
        worker = self.state.workers[found.worker]
        said: list[To] = []
        victims = [*(relocation.model for relocation in found.relocations), *found.stops]
        before = self.state.room.pop(name, None)
        self.state.room[name] = Room(found.worker, [(found.worker, victim) for victim in victims])
        for victim in victims:
            instance = worker.instances[victim]
            instance.status = "draining"
            self._index(found.worker, self.state.models[victim], instance)
            said.append(To("record", InstanceDraining(found.worker, victim, name)))
        for place, spared in before.victims if before is not None else ():
            # For DRAM, instances on other workers of the server were drained, too.
            if place != found.worker or spared not in victims:
                said += self._undrain_one(place, spared, now)
        moves: list[PlannedMove] = []
        wanted: list[To] = []
        moving: dict[str, bool] = {}
        why = f"so that {name} can start on {found.worker}"[:200]
        for relocation in found.relocations:
            if relocation.option is not None:
                other = self.state.models[relocation.model]
                said += self._begin(relocation.model, other, [relocation.option], now, next(iter(relocation.tokens)))
            for sequence, tokens in relocation.tokens.items():
                known = self.state.exchange.sequences[sequence]
                known.moves, known.moved_at, moving[sequence] = known.moves + 1, now, True
                starts = relocation.option is not None
                moves.append(
                    PlannedMove(sequence, relocation.model, relocation.to, tokens, starts, relocation.resume_ns)
                )
                wanted.append(To("migration", MoveWanted(request=sequence, to=relocation.to, why=why)))
        self.state.exchange.rooms[name] = ExchangeUnderWay(
            found.worker, request, moving, now + PATIENCE_NS + 4 * found.move_ns
        )
        decided = PlacementExchanged(
            model=name,
            worker=found.worker,
            request=request,
            migrate_ns=found.total_ns,
            move_ns=found.move_ns,
            drain_ns=drain_ns,
            start_ns=start_ns,
            moves=tuple(moves),
            stops=found.stops,
            weighed=found.weighed,
            reason=_reason(drain_ns, start_ns),
        )
        return [To("record", decided), *said, *wanted, *self._stop_idle(name)]

    def _spread(self, now: int) -> list[To]:
        """Nobody waits: what shares a device may have one of its own."""
        state = self.state
        if self.rules < 3 or state.queues or state.wishes or state.room or now < state.exchange.spread_at:
            return []
        state.exchange.spread_at = now + LOOK_NS
        found = choose_spread(state, now, self.rules)
        if found is None:
            return []
        state.exchange.spread_at = now + HOLD_NS
        said: list[To] = []
        if found.option is not None:
            first, model = found.requests[0], state.models[found.model]
            said = self._begin(found.model, model, [found.option], now, first, urgent=False)
        why = f"it shares {found.worker} with {', '.join(found.shared)}, and {found.to} idles"[:200]
        for request in found.requests:
            known = state.exchange.sequences[request]
            known.moves, known.moved_at = known.moves + 1, now
            said.append(To("migration", MoveWanted(request=request, to=found.to, why=why)))
        spread = PlacementSpread(
            found.model, found.worker, found.to, found.requests, found.shared, found.option is not None, found.resume_ns
        )
        return [To("record", spread), *said]

    # ---- following --------------------------------------------------------------------------------------------

    def _goes_on(self, name: str, under_way: ExchangeUnderWay, now: int) -> bool:
        """Whether its device is still to come free by what moves: then nothing else is begun for the model."""
        room = self.state.room.get(name)
        if room is None or room.worker != under_way.worker or now >= under_way.until:
            return False
        return bool(room.victims and under_way.moving) or self._stops_for(name)

    def _stops_for(self, name: str) -> bool:
        """Whether all that was drained for this model is stopping now."""
        room = self.state.room.get(name)
        if room is None or room.victims or room.worker not in self.state.workers:
            return False
        return any(one.status == "stopping" for one in self.state.workers[room.worker].instances.values())

    def _got_away(self, request: str) -> None:
        """It does not run where it ran any more, or will not move: no exchange waits for it to move."""
        for under_way in self.state.exchange.rooms.values():
            under_way.moving.pop(request, None)

    # ---- learning ---------------------------------------------------------------------------------------------

    def _note_placed(self, request: str, tokens: int) -> None:
        if self.rules >= 3:
            self.state.exchange.sequences[request] = RunningSequence(tokens)

    def _note_released(self, message: SlotReleased, placed: Placed | None, now: int) -> None:
        self._got_away(message.request)
        if placed is not None and message.tokens:
            each = max(1, (now - placed.since) // message.tokens)
            known = self.state.exchange.token_ns.get(placed.model)
            self.state.exchange.token_ns[placed.model] = learned(known, each) if known else each
        if message.request not in self.state.kept:
            self._forget_sequence(message.request)

    def _note_taken(self, message: SlotTaken, kept: Placed, now: int) -> None:
        """A sequence goes on where it was moved to: how long that took from the slot on."""
        if self.rules < 3:
            return
        known = self.state.exchange.sequences.setdefault(message.request, RunningSequence(0))
        known.tokens = message.tokens or known.tokens
        if known.tokens:
            times = self.state.exchange.resume.setdefault(kept.model, ResumeTimes())
            times.learn(known.tokens, now - kept.since)

    def _forget_sequence(self, request: str) -> None:
        """Nothing is kept of a request that neither has a slot nor is to get one by a move."""
        if request not in self.state.placed and request not in self.state.kept:
            self.state.exchange.sequences.pop(request, None)


def _is_worth(exchange_ns: int, other_ns: int) -> bool:
    return exchange_ns + MARGIN_NS + other_ns // 4 < other_ns


def _reason(drain_ns: int, start_ns: int) -> str:
    if start_ns:
        return "sooner than on the best free place"
    return "sooner than waiting for what runs there" if drain_ns else "nobody knows how long what runs there will"
