"""The bench measures what it says: every figure is there, and the parts of a step add up to about the step."""

from __future__ import annotations

import json

import pytest

from models.bench_engine import BATCHES, measure, tables


@pytest.mark.slow
def test_figures_are_complete():
    figures = measure(parameters=400_000, rounds=1, answer_tokens=4, steps=4, contexts=(32, 256))
    assert [row.sequences for row in figures.throughput] == list(BATCHES)
    assert all(row.engine_tokens_per_s > 0 and row.generate_tokens_per_s > 0 for row in figures.throughput)
    mixed = figures.mixed
    assert mixed.engine_tokens_per_s > 0 and mixed.generate_tokens_per_s > 0
    assert 0 < mixed.shortest < mixed.longest and mixed.requests == 3 * mixed.slots
    assert [step.context for step in figures.steps] == [32, 256]
    for step in figures.steps:
        assert step.attention_ms > 0
        assert step.products_ms > 0
        assert step.framework_ms > 0
    assert figures.attention_growth_ms > 0
    assert json.loads(json.dumps(figures.to_dict()))["parameters"] == figures.parameters
    assert len(tables(figures)) == 2
