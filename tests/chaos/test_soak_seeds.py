"""Fixed worlds of the soak: every promise is kept while everybody dies during moves, in every phase of them.

`make soak` runs ten thousand; these are the first of them, and no phase of a move stays without deaths.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from chaos import soak_cli
from chaos.deaths import VICTIMS
from chaos.options import soaked
from chaos.phases import PHASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SEEDS = range(84)


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
    worlds = [soaked(seed) for seed in SEEDS]
    moved = [world for world in worlds if not world.scattered]
    assert 4 <= len(worlds) - len(moved) <= 20, "in some placement moves by itself"
    assert any(world.drains for world in moved) and any(world.generations for world in moved)
    assert {world.crash_at_move for world in moved} == {0.005, 0.02, 0.05}
    assert any(world.odds.on() for world in moved) and any(not world.odds.on() for world in moved)
    assert any(world.generations and world.snapshot_trouble for world in moved), "torn, and all there is to start from"
    assert {world.slow_links for world in moved} == {1, 20, 60, 100}
