"""Slots for sequences that run elsewhere and are to move: kept while they are prepared, taken when they go on.

A wish is served before the queues: whoever moves frees a slot where it comes from. A model that has no free slot in an
allowed place is started there, as it would be for a waiting request, on memory that is free or idle. Where it cannot
be, the wish is denied; but who is to leave a server that is drained waits for the next slot that comes free (rules 3).
"""

from __future__ import annotations

from actors.placement_exchanges import PlacementExchanges
from actors.placement_start import best_options
from actors.placement_state import KnownModel, Placed, RunningInstance, SlotWish
from bus.messages import SlotDenied, SlotKept, SlotReleased, SlotTaken, To, WantSlot

STARTS_LIMIT = 2
"""How often a model is started for one wish: a move is no reason to go on failing."""


class PlacementMoves(PlacementExchanges):
    """Keeps slots for moves."""

    def on_WantSlot(self, message: WantSlot, now: int) -> list[To]:
        wish = SlotWish(message.attempt, message.model, message.source, message.to, now)
        self.state.wishes[message.request] = wish
        return self._serve_wishes(now)

    def on_SlotTaken(self, message: SlotTaken, now: int) -> list[To]:
        kept = self.state.kept.get(message.request)
        if kept is None or kept.attempt != message.attempt:
            return []
        del self.state.kept[message.request]
        self.state.placed[message.request] = kept
        self._note_taken(message, kept, now)
        return []

    def _give_back(self, message: SlotReleased, now: int) -> list[To] | None:
        """A slot that was kept, or only wished for, is not wanted any more; None where it was neither."""
        wish = self.state.wishes.get(message.request)
        if wish is not None and wish.attempt == message.attempt:
            del self.state.wishes[message.request]
            self._got_away(message.request)
            self._forget_sequence(message.request)
            return self._abandon_for(wish)
        kept = self.state.kept.get(message.request)
        if kept is None or kept.attempt != message.attempt:
            return None
        del self.state.kept[message.request]
        self._got_away(message.request)
        self._forget_sequence(message.request)
        model, instance = self.state.models.get(kept.model), self._instance(kept.worker, kept.model)
        if model is None or instance is None:
            return []
        self._vacate(instance, message.request, message.attempt)
        instance.used_at = now
        self._index(kept.worker, model, instance)
        return self._use_slot(model, instance, now)

    def _abandon_for(self, wish: SlotWish) -> list[To]:
        """What starts where only this wish would have been served need not go on (rule version 4)."""
        abandoned = self._abandon(wish.model) if self.rules >= 4 and wish.model in self.state.models else []
        return [to for to in abandoned if self._is_allowed(to.receiver, wish)]

    def _vacate(self, instance: RunningInstance, request: str, attempt: int) -> None:
        """Its slot is free, unless a later attempt has taken it: it may be placed where one was kept for its move."""
        if self.rules < 3 or instance.active.get(request) == attempt:
            instance.active.pop(request, None)

    def _serve_wishes(self, now: int) -> list[To]:
        said: list[To] = []
        full: dict[tuple[str, str, str], bool] = {}
        for request, wish in list(self.state.wishes.items()):
            kind = (wish.model, wish.source, wish.to)
            if kind in full:
                continue
            model = self.state.models.get(wish.model)
            if model is None or model.removed:
                said.append(self._deny(request, wish, f"{wish.model} is not served any more"))
                continue
            worker = self._open_elsewhere(model, wish)
            if worker is not None:
                said.append(self._keep(request, wish, model, worker, now))
            elif not self._starts_elsewhere(model, wish):
                told = self._start_elsewhere(request, wish, model, now)
                said += told
                if not told:
                    full[kind] = True
        return said

    def _waits(self, wish: SlotWish) -> bool:
        """Whether a wish that finds no room is kept until some comes free, instead of being denied."""
        source = self.state.workers.get(wish.source)
        return self.rules >= 3 and not wish.to and source is not None and source.server in self.state.draining

    def _is_allowed(self, worker: str, wish: SlotWish) -> bool:
        if self.state.workers[worker].server in self.state.draining:
            return False
        return worker != wish.source and wish.to in ("", worker, self.state.workers[worker].server)

    def _open_elsewhere(self, model: KnownModel, wish: SlotWish) -> str | None:
        """The allowed running instance with the most free slots."""
        for free in sorted(model.open, reverse=True):
            for worker in model.open[free]:
                if self._is_allowed(worker, wish):
                    return worker
        return None

    def _starts_elsewhere(self, model: KnownModel, wish: SlotWish) -> bool:
        return any(
            self._is_allowed(worker, wish)
            and self.state.workers[worker].instances[model.card.model].status == "starting"
            for worker in model.instances
        )

    def _keep(self, request: str, wish: SlotWish, model: KnownModel, worker: str, now: int) -> To:
        del self.state.wishes[request]
        instance = self.state.workers[worker].instances[wish.model]
        instance.active[request] = wish.attempt
        instance.used_at = now
        self._index(worker, model, instance)
        runs = self.state.placed.get(request)
        urgency = (runs.priority, runs.deadline) if runs is not None else (0, 0)
        self.state.kept[request] = Placed(worker, wish.model, wish.attempt, now, *urgency)
        return To("migration", SlotKept(request, wish.attempt, worker))

    def _start_elsewhere(self, request: str, wish: SlotWish, model: KnownModel, now: int) -> list[To]:
        options, _ = best_options(self.state, model, unmet=1, running=False, rules=self.rules)
        allowed = [option for option in options if self._is_allowed(option.candidate.worker, wish)]
        if not allowed or wish.starts >= STARTS_LIMIT:
            if self._waits(wish):
                return []
            where = wish.to or "elsewhere"
            why = "has no room for it" if not wish.starts else "did not start it"
            return [self._deny(request, wish, f"{wish.model}: no free slot, and {where} {why}")]
        wish.starts += 1
        return self._begin(wish.model, model, allowed, now, request)

    def _deny(self, request: str, wish: SlotWish, reason: str) -> To:
        del self.state.wishes[request]
        self._got_away(request)
        return To("migration", SlotDenied(request, wish.attempt, reason))
