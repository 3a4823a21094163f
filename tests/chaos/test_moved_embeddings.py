"""In the simulated world embeddings go on elsewhere in the middle, and prompts come in parts: seen, not assumed."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import mutations
import pytest

from bus.pages import Page, decode_page
from chaos import clients, run
from chaos.faults import Odds
from chaos.options import Options, draw
from chaos.promises import Promise

SEED = 5


def crashing() -> Options:
    """A world in which somebody dies ten times a second."""
    return replace(draw(SEED), disturbances=("crash",), disturb_every=0.1, requests=30, odds=Odds(), deaths_limit=100)


def _kind(random: Random, plan: clients.Plan) -> clients.Plan:
    return replace(plan, inputs=256, n=1) if plan.number % 3 else replace(plan, parts=True)


def test_embeddings_are_moved_in_the_middle_and_what_they_lose_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    judge = run.judge
    monkeypatch.setattr(clients, "_other_kind", _kind)
    monkeypatch.setattr(run, "judge", lambda world: (seen.append(world), judge(world)))
    verdict = run.run_world(crashing())
    assert verdict.passed, [str(violation) for violation in verdict.violations]
    world = seen[0]
    first: dict[tuple[str, int], int] = {}
    for record in world.observer.pages:
        page = decode_page(record.payload)
        for part in page.sequences if isinstance(page, Page) else ():
            if part.vectors:
                first.setdefault((part.request, part.attempt), part.position)
    assert any(first.values()), "no embedding went on in the middle: choose another seed"
    assert world.server.parts.last_sequence > 10, "no prompt came in parts: choose another seed"
    with mutations.earlier_vectors_are_forgotten():
        mutated = run.run_world(crashing())
    assert Promise.NEVER_CHANGES in {violation.promise for violation in mutated.violations}
