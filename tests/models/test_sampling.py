"""Sampling draws from the softmax over the candidates that top-k and top-p leave, without any state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.contract import Sampling
from models.sampling import choose, gumbel

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
# Computed with Python integers from the definition in models/sampling.py.
EXPECTED = [0.9727386249390678, 1.7285965931103622, -1.061184853089493]


def draws(logits, count, **settings):
    sampling = Sampling(max_tokens=1, **settings)
    rows = logits.expand(count, -1)
    return torch.tensor(choose(rows, [sampling] * count, range(count)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    count = 4000
    expected = torch.softmax(LOGITS / temperature, 0) * count
    seen = torch.bincount(draws(LOGITS, count, temperature=temperature, seed=11), minlength=6)
    chi_squared = float(((seen - expected) ** 2 / expected).sum())
    assert chi_squared < 20.5  # 5 degrees of freedom: passed by chance in 999 of 1,000, and the draw is fixed


def test_noise_has_the_mean_and_spread_of_a_gumbel():
    noise = gumbel(3, 9, torch.arange(200_000))
    assert abs(float(noise.mean()) - 0.57722) < 0.01
    assert abs(float(noise.std()) - math.pi / math.sqrt(6)) < 0.01
    across = torch.stack([gumbel(3, position, torch.arange(50)) for position in range(2000)])
    correlation = torch.corrcoef(across.T) - torch.eye(50)
    assert float(correlation.abs().max()) < 0.1


@given(st.integers(), st.integers(0, 2**40), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_noise_is_finite_and_depends_on_seed_position_and_token(seed, position, token):
    (noise,) = gumbel(seed, position, torch.tensor([token])).tolist()
    assert math.isfinite(noise)
    assert noise == gumbel(seed + 2**64, position, torch.tensor([token])).item()
    others = [gumbel(seed + 1, position, torch.tensor([token])), gumbel(seed, position + 1, torch.tensor([token]))]
    others.append(gumbel(seed, position, torch.tensor([token + 1])))
    assert all(other.item() != noise for other in others)


def test_the_hash_is_fixed():
    # Durable answers rest on it: a change of these numbers is a change of every sampled answer in flight.
    assert gumbel(7, 5, torch.tensor([0, 1, 31999])).tolist() == pytest.approx(EXPECTED, abs=1e-12)


def test_top_k_keeps_the_best_and_their_equals():
    assert set(draws(LOGITS, 300, temperature=5.0, top_k=3).tolist()) == {0, 1, 2}
    tied = torch.tensor([1.0, 0.0, 0.0, -1.0])
    assert set(draws(tied, 300, temperature=5.0, top_k=2).tolist()) == {0, 1, 2}
    assert set(draws(LOGITS, 20, temperature=5.0, top_k=1).tolist()) == {0}


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=40), st.floats(0.05, 0.999), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_it(values, top_p, top_k):
    logits = torch.tensor(values)
    order = sorted(range(len(values)), key=lambda index: -logits[index].item())
    kept = order[:top_k] if top_k else order
    mass = torch.softmax(logits[kept].double(), 0).tolist()
    allowed, total = set(), 0.0
    for index, share in zip(kept, mass, strict=True):
        if total < top_p + 1e-6:
            allowed.add(logits[index].item())
        total += share
    for token in draws(logits, 30, temperature=1.0, top_p=top_p, top_k=top_k).tolist():
        assert logits[token].item() in allowed


def test_top_p_over_a_flat_distribution_looks_further_than_the_first_thousand():
    logits = torch.linspace(0.0, 0.001, 5000)
    seen = draws(logits, 400, temperature=1.0, top_p=0.9)
    assert int(seen.min()) < 3000
    assert int(seen.min()) >= 400


def test_rows_do_not_see_each_other_and_greedy_is_the_argmax():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    samplings = [
        Sampling(max_tokens=1, temperature=t, seed=s) for t, s in [(0, 1), (1, 1), (0, 2), (1, 2), (2, 1), (1, 1)]
    ]
    together = choose(logits, samplings, range(6))
    alone = [choose(logits[i : i + 1], [samplings[i]], [i])[0] for i in range(6)]
    assert together == alone
    assert [together[i] for i in (0, 2)] == logits.argmax(-1)[[0, 2]].tolist()


def test_numbers_that_are_not_finite_still_give_a_token():
    for value in (float("nan"), float("inf"), float("-inf")):
        logits = torch.full((1, 8), value)
        (token,) = choose(logits, [Sampling(max_tokens=1, temperature=1.0, top_p=0.5)], [0])
        assert 0 <= token < 8
