"""Each safeguard is taken out while one answer moves and somebody fails at a stage of the move: it is noticed."""

from __future__ import annotations

from typing import Any

import mutations
import pytest
from staged import STAGES, Act, staged

from chaos.faults import Odds
from chaos.promises import Promise


def source_dies(world: Any, record: Any) -> None:
    world.kill(world.source, record, before_answer=True)


def source_is_cut_off(world: Any, record: Any) -> None:
    world.slow(world.source, 4.0)


def nothing(world: Any, record: Any) -> None:
    return


LOSSY = {"odds": Odds(append_lost=0.08)}


@pytest.mark.parametrize(
    ("mutation", "promise", "act", "changes"),
    [
        (mutations.seal_does_nothing, Promise.NEVER_CHANGES, source_dies, {}),
        (mutations.epochs_are_ignored, Promise.QUIET, source_is_cut_off, {}),
        (mutations.facts_are_not_held_back, Promise.NO_HOLES, nothing, LOSSY),
        (mutations.writers_are_not_fenced, Promise.SEALED, source_is_cut_off, {}),
        (mutations.pages_are_not_awaited, Promise.DURABLE_FIRST, source_dies, {}),
        (mutations.sources_are_released_at_once, Promise.NEVER_CHANGES, nothing, {}),
        (mutations.heirs_do_not_wait, Promise.NO_FAILURE, nothing, {}),
        (mutations.heirs_forget_what_they_read, Promise.UNDISTURBED, nothing, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_missing_safeguard_of_moves_is_noticed(
    mutation: Any, promise: Promise, act: Act, changes: dict[str, Any]
) -> None:
    found: list[list[str]] = []
    for number, stage in enumerate(STAGES):
        with mutation():
            mutated, _ = staged(stage, act, seed=3 + number, **changes)
        found.append([str(violation) for violation in mutated.violations])
        if promise in {violation.promise for violation in mutated.violations}:
            whole, _ = staged(stage, act, seed=3 + number, **changes)
            assert whole.passed, [str(violation) for violation in whole.violations]
            return
    pytest.fail(f"{mutation.__name__} did not break {promise.name} at any stage: {found}")
