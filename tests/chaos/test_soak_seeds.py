"""Fixed worlds of the soak: every promise is kept while everybody dies during moves, in every phase of them.

`make soak` runs ten thousand; these are some of them, such that no phase of a move stays without deaths.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from chaos import soak_cli
from chaos.deaths import VICTIMS
from chaos.options import moving
from chaos.phases import PHASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SEEDS = (*range(70), 424, 484, 489, 549, 552, 597, 642, 653, 658, 683, 700, 717, 737, 757, 2510)
"""The first ones; some in which a death falls into a short phase, so that none is empty when decisions change; and
2510, where a control that dies lets the last word of several answers come before their ends, which readers have to
stand."""


@pytest.fixture(scope="module")
def verdicts() -> list[dict[str, Any]]:
    return [soak_cli.one(seed) for seed in SEEDS]


def test_worlds_of_the_soak_keep_every_promise(verdicts: list[dict[str, Any]]) -> None:
    failed = [verdict for verdict in verdicts if verdict["violations"]]
    assert not failed, "\n".join(
        f"longshore chaos soak --seeds 1 --from {v['seed']}: {v['violations']}" for v in failed
    )


def test_deaths_fall_into_every_phase_of_a_move_and_on_everybody(verdicts: list[dict[str, Any]]) -> None:
    phases: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for verdict in verdicts:
        phases.update(verdict["deaths"]["phases"])
        victims.update(verdict["deaths"]["victims"])
        kinds.update(verdict["deaths"]["kinds"])
    assert all(phases[phase] for phase in PHASES), phases
    assert all(victims[victim] for victim in VICTIMS), victims
    assert len(kinds) > 40, "deaths come at any message"
    assert sum(kinds.values()) == sum(victims.values())


def test_the_worlds_are_wide() -> None:
    worlds = [moving(seed) for seed in SEEDS]
    assert any(world.drains for world in worlds) and any(world.generations for world in worlds)
    assert {world.crash_at_move for world in worlds} == {0.005, 0.02, 0.05}
    assert any(world.odds.on() for world in worlds) and any(not world.odds.on() for world in worlds)
