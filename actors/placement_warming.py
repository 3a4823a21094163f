"""Models that an operator wants in DRAM before requests come (from rule version 5 on).

    model.wanted ─▶ the server where it is there soonest, or the one that was named ─▶ model.warm to its store
                 └▶ model.warmed: it is there already, or why it cannot be ◀── model.warmed from the store

The load takes the way of every other, behind those that somebody waits for, and evicts by the same rules. While it is
under way its bytes count as loading, so that no instance is promised the same room; afterwards nothing keeps it in DRAM
but its value.
"""

from __future__ import annotations

from actors.placement_drain import PlacementDrain
from actors.placement_sources import peers_of, sources_for
from actors.placement_start import dram_short, loading_times, nearest_tier, ssd_short
from actors.placement_state import KnownModel
from actors.rules import WARM_RULES
from bus.messages import ModelWanted, ModelWarmed, To, WarmModel

REASONS_SHOWN = 4
"""Servers that are named where none can take the model."""


class PlacementWarming(PlacementDrain):
    """Brings models closer that nobody has asked for yet."""

    def on_ModelWanted(self, message: ModelWanted, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if self.rules < WARM_RULES:
            return [_cold(message, f"the cell follows a rule version before {WARM_RULES}")]
        if model is None or model.removed:
            return [_cold(message, f"no server of this cell holds a model {message.model!r}")]
        if message.server and message.server not in self.state.servers:
            return [_cold(message, f"there is no server {message.server!r} in this cell")]
        names = [message.server] if message.server else list(self.state.servers)
        ready = [name for name in names if self.state.servers[name].up and name not in self.state.draining]
        there = [name for name in ready if model.servers.get(name) == "dram"]
        if there:
            return [To("record", ModelWarmed(message.model, message.sequence, there[0]))]
        peers = peers_of(self.state, model)
        weighed, reasons = list[tuple[int, str]](), list[str]()
        for name in names:
            found = self._until_there(model, name, peers)
            if isinstance(found, str):
                reasons.append(found)
            else:
                weighed.append((found, name))
        if not weighed:
            return [_cold(message, "; ".join(reasons[:REASONS_SHOWN]) or "no server of this cell is up")]
        ready_ns, name = min(weighed, key=lambda one: one[0])
        return [self._warm(message, model, name, ready_ns, len(weighed))]

    def on_ModelWarmed(self, message: ModelWarmed, now: int) -> list[To]:
        """What is not on its way any more takes no room; of a model that is there the store has told before."""
        self._note_loaded(message.server, message.model)
        return self._pump(now) if message.reason else []

    def _warm(self, message: ModelWanted, model: KnownModel, name: str, ready_ns: int, weighed: int) -> To:
        server, far = self.state.servers[name], model.servers.get(name, "remote") == "remote"
        server.loading.setdefault(message.model, model.card.weight_bytes)
        if far:
            asked = [peer for peer, _ in peers_of(self.state, model) if peer != name]
            server.fetching[message.model] = asked[0] if asked else ""
        order = WarmModel(
            message.model,
            message.sequence,
            "remote" if far else "ssd",
            ready_ns,
            weighed,
            sources_for(self.state, model, name) if far else (),
            model.card if far else None,
            self._waited_for(name, message.model),
        )
        return To(f"store/{name}", order)

    def _until_there(self, model: KnownModel, name: str, peers: list[tuple[str, str]]) -> int | str:
        """Nanoseconds until it lies in DRAM of this server; or one sentence that says why it cannot."""
        server, card = self.state.servers[name], model.card
        if not server.up:
            return f"server {name} is not up"
        if name in self.state.draining:
            return f"server {name} is being drained"
        if server.streams(card):
            return f"{card.model} needs {card.weight_bytes} bytes of DRAM, the budget of {name} is {server.dram_bytes}"
        tier = nearest_tier(self.state, model, name, peers)
        if tier is None and name in model.replaced:
            return f"{name} still runs an older {card.model}"
        if tier is None:
            return f"nobody is known from whom {name} can fetch {card.model}"
        promised = [
            self.state.models[other].card
            for other, room in self.state.room.items()
            if other != card.model and self.state.workers[room.worker].server == name
        ]
        if dram_short(server, card, promised, self.rules) > 0:
            return f"everything in the DRAM of {name} is in use, {card.model} finds no room"
        if tier == "remote" and ssd_short(server, card) > 0:
            return f"nothing on the SSD of {name} may go, {card.model} finds no room"
        return sum(loading_times(server, card, tier))


def _cold(message: ModelWanted, reason: str) -> To:
    return To("record", ModelWarmed(message.model, message.sequence, message.server, reason[:4000]))
