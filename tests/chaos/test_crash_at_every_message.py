"""Whoever has a record stored dies at that moment: at each record in turn, before and after it learns of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chaos.options import Options, calm
from chaos.run import run_world

TURNS = 8


def small(crash_at: int = 0, before_answer: bool = True) -> Options:
    """Two controls and two workers of one server, few requests for two models that do not fit together.

    Some of them ask for several answers.
    """
    world = replace(calm(2), controls=2, servers=1, workers=2, requests=4, several=0.5, fault_seconds=4.0)
    return replace(world, models=world.models[:2], crash_at=crash_at, crash_before_answer=before_answer)


@pytest.mark.parametrize("turn", range(TURNS))
def test_a_process_may_die_at_any_message(turn: int) -> None:
    whole = run_world(small())
    assert whole.passed, whole.violations
    assert whole.records + whole.pages > 100
    deaths = 0
    for number in range(1 + turn, whole.records + whole.pages + 1, TURNS):
        for before_answer in (True, False):
            verdict = run_world(small(number, before_answer))
            broken = "\n".join(map(str, verdict.violations))
            assert verdict.passed, f"at record {number}, before_answer={before_answer}:\n{verdict.events}\n{broken}"
            deaths += sum(" dies " in text for _, text in verdict.events)
    assert deaths > 20
