"""From where a server that does not have a model would fetch it: other servers of the cell, then the model's source.

The order depends on nothing but the state, so that every replica says the same.
"""

from __future__ import annotations

from actors.placement_state import KnownModel, PlacementState
from bus.messages import escape_model

PEERS_ASKED = 4
"""How many other servers a load is told of."""


def peers_of(state: PlacementState, model: KnownModel) -> list[tuple[str, str]]:
    """(server, address) of those from whom others can fetch the model: who has it in DRAM first, then from whom the
    fewest fetch already, then who has the least to load."""
    found: list[tuple[bool, int, int, int, str, str]] = []
    asked: dict[str, int] = {}
    for server in state.servers.values():
        for peer_name in server.fetching.values():
            asked[peer_name] = asked.get(peer_name, 0) + 1
    for name, tier in model.servers.items():
        peer = state.servers[name]
        if tier != "remote" and peer.up and peer.address and name not in model.replaced:
            load = asked.get(name, 0), sum(peer.loading.values())
            found.append((tier != "dram", *load, len(found), name, peer.address))
    return [(name, f"{address}/{escape_model(model.card.model)}") for *_, name, address in sorted(found)]


def sources_for(state: PlacementState, model: KnownModel, server: str) -> tuple[str, ...]:
    """Where this server can fetch the model, the best first: other servers of the cell, then its source."""
    found = [address for name, address in peers_of(state, model) if name != server]
    own = (model.source,) if model.source else ()
    return (*found[:PEERS_ASKED], *own)
