"""The promises on drains and on the ends of moves: each is broken once on purpose, and the verdict names it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.migration import Migration
from actors.placement_drain import PlacementDrain
from actors.placement_moves import PlacementMoves
from bus.messages import MoveEnded
from chaos.options import moving
from chaos.promises import Promise
from chaos.run import run_world

SEEDS = range(12)


def drains_count_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PlacementDrain, "_active", lambda self, name: [])


def moves_go_to_drained_servers(patch: pytest.MonkeyPatch) -> None:
    def is_allowed(self: Any, worker: str, wish: Any) -> bool:
        return bool(worker != wish.source)

    patch.setattr(PlacementMoves, "_is_allowed", is_allowed)
    patch.setattr(PlacementDrain, "_index_server", lambda self, name: None)


def ends_of_moves_are_not_told(patch: pytest.MonkeyPatch) -> None:
    whole = Migration._end

    def end(self: Migration, *arguments: Any, **named: Any) -> Any:
        return [to for to in whole(self, *arguments, **named) if not isinstance(to.message, MoveEnded)]

    patch.setattr(Migration, "_end", end)


@pytest.mark.parametrize(
    ("mutation", "promise"),
    [
        (drains_count_nothing, Promise.DRAINED),
        (moves_go_to_drained_servers, Promise.DRAINED),
        (ends_of_moves_are_not_told, Promise.MOVES_END),
    ],
)
def test_a_broken_promise_is_noticed(mutation: Any, promise: Promise, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in SEEDS:
        options = replace(moving(seed), drains=6, crash_at_move=0.0)
        with monkeypatch.context() as patch:
            mutation(patch)
            broken = {violation.promise for violation in run_world(options).violations}
        if promise in broken:
            return
    pytest.fail(f"{promise.name} was broken in none of {len(SEEDS)} worlds")
