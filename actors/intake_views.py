"""What operators are shown of a cell: `admin.models` and `admin.status`, from the replica beside the intake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from actors.cell import Cell
from actors.placement_state import PlacementState
from actors.request_state import RequestsState
from bus.contract import Usage


def models_view(placement: PlacementState) -> list[dict[str, Any]]:
    """Every model: its card, the nearest tier per server, where it runs."""
    return [
        {
            "model": name,
            "servers": dict(model.servers),
            "instances": list(model.instances),
            "removed": model.removed,
            **msgspec.to_builtins(model.card),
        }
        for name, model in placement.models.items()
    ]


def status_view(
    cell: Cell,
    placement: PlacementState,
    requests: RequestsState,
    name: str,
    streams: Mapping[str, Usage],
    *,
    live: bool,
) -> dict[str, Any]:
    """Requests by state, servers, workers, streams, and what was learned of loads and moves."""
    counts: dict[str, int] = {}
    for request in requests.requests.values():
        key = request.outcome or request.status
        counts[key] = counts.get(key, 0) + 1
    epochs = {driver: epoch.epoch for driver, epoch in cell.order.state.drivers.items()}
    return {
        "cell": name,
        "position": cell.position,
        "rules": cell.rules,
        "live": live,
        "requests": counts,
        "waiting": placement.waiting,
        "streams": {stream: _stream(usage) for stream, usage in streams.items()},
        "servers": _servers(cell, placement, epochs),
        "workers": _workers(cell, placement, epochs),
        "models": [model for model, known in placement.models.items() if not known.removed],
        "moves": {model: times.described() for model, times in placement.exchange.resume.items()},
    }


def _servers(cell: Cell, placement: PlacementState, epochs: Mapping[str, int]) -> dict[str, Any]:
    stores = {name: cell.actors[f"store/{name}"] for name in placement.servers if f"store/{name}" in cell.actors}
    return {
        name: {
            "up": server.up,
            "epoch": epochs.get(f"store/{name}", 0),
            "dram_bytes": server.dram_bytes,
            "dram_used_bytes": stores[name].state.dram_used() if name in stores else 0,
            "dram_tier": stores[name].state.dram_tier if name in stores else "",
            "ssd_bytes_per_second": server.ssd_rate,
            "remote_bytes_per_second": server.remote_rate,
            "models": {m: known.servers[name] for m, known in placement.models.items() if name in known.servers},
        }
        for name, server in placement.servers.items()
    }


def _workers(cell: Cell, placement: PlacementState, epochs: Mapping[str, int]) -> dict[str, Any]:
    workers = {}
    for name, worker in placement.workers.items():
        started = getattr(cell.actors[name].state, "started", None) if name in cell.actors else None
        workers[name] = {
            "server": worker.server,
            "epoch": epochs.get(name, 0),
            "process": started.process if started is not None else 0,
            "device": started.device if started is not None else "",
            "memory_bytes": worker.memory_bytes,
            "free_bytes": max(0, worker.free()),
            "instances": {
                model: {"status": one.status, "slots": one.slots, "active": len(one.active), "tier": one.tier}
                for model, one in worker.instances.items()
            },
        }
    return workers


def _stream(usage: Usage) -> dict[str, int]:
    return {
        "messages": usage.messages,
        "bytes": usage.stored_bytes,
        "limit_bytes": usage.limit_bytes,
        "percent": usage_percent(usage),
        "first": usage.first_sequence,
        "last": usage.last_sequence,
    }


def usage_percent(usage: Usage) -> int:
    """How full a stream is; 0 for one without a limit."""
    return usage.stored_bytes * 100 // usage.limit_bytes if usage.limit_bytes else 0
