"""Penalties, bias, least lengths: as transformers and plain loops have them, and the same wherever it goes on."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engine_support import ANSWER, Loaded, run, tokens
from transformers import RepetitionPenaltyLogitsProcessor

import models.engine
from models.contract import Sampling, SequenceStart
from models.likelihood import measure
from models.shaping import Shaping, shape

VOCABULARY = 40


@pytest.fixture(scope="module")
def loaded(sample_directory):
    return Loaded(sample_directory("llama"))


def reference(logits: torch.Tensor, sampling: Sampling, prompt, answer, ends) -> torch.Tensor:
    """One row, token by token, as the contract says it."""
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(
        torch.tensor([[*prompt, *answer]]), logits.float()[None].clone()
    )[0]
    for token in range(len(scores)):
        count = answer.count(token)
        scores[token] += dict(sampling.logit_bias).get(token, 0.0) - (
            (sampling.presence_penalty if count else 0.0) + sampling.frequency_penalty * count
        )
        if token in ends and len(answer) < sampling.min_tokens:
            scores[token] = float("-inf")
    return scores


def random_sampling(rng: random.Random) -> Sampling:
    return Sampling(
        max_tokens=50,
        min_tokens=rng.choice((0, 0, 5, 20)),
        repetition_penalty=rng.choice((1.0, 0.7, 1.3, 4.0)),
        presence_penalty=rng.choice((0.0, -1.5, 0.8)),
        frequency_penalty=rng.choice((0.0, 0.3, -0.2)),
        logit_bias=tuple(sorted((t, rng.uniform(-3, 3)) for t in rng.sample(range(VOCABULARY), rng.choice((0, 3))))),
    )


def test_a_batch_of_rows_is_shaped_as_a_plain_loop_would():
    rng = random.Random(4)
    for _ in range(40):
        rows = []
        for _ in range(rng.randint(1, 5)):
            sampling = random_sampling(rng)
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))]
            answer = [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 40))]
            ends = frozenset(rng.sample(range(VOCABULARY), 3))
            shaping = Shaping(sampling, prompt, ends)
            for token in answer:
                shaping.take(token)
            rows.append((sampling, prompt, answer, ends, shaping))
        logits = torch.randn(len(rows), VOCABULARY, dtype=torch.float64) * 3
        before = logits.clone()
        shapings = [None if rng.random() < 0.2 else row[4] for row in rows]
        shaped = shape(logits, shapings, [len(row[2]) for row in rows])
        assert torch.equal(logits, before)
        for index, (sampling, prompt, answer, ends, _) in enumerate(rows):
            if shapings[index] is None:
                assert torch.equal(shaped[index], logits[index].float())
            else:
                expected = reference(logits[index], sampling, prompt, answer, ends)
                torch.testing.assert_close(shaped[index], expected, rtol=1e-6, atol=1e-6)


def test_ids_behind_the_logits_change_nothing():
    sampling = Sampling(max_tokens=5, repetition_penalty=2.0, logit_bias=((2, 1.0), (9, 5.0)))
    shaped = shape(torch.ones(1, 4), [Shaping(sampling, (1, 7), ())], [0])
    assert shaped.tolist() == [[1.0, 0.5, 2.0, 1.0]]


def test_the_engine_says_what_generate_says_with_a_repetition_penalty_and_a_least_length(loaded):
    for index, prompt in enumerate(loaded.prompts(seed=5, count=3)):
        plain = loaded.reference(prompt)
        eos = [plain[4], plain[9]]
        given = torch.tensor([prompt])
        expected = loaded.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=ANSWER,
            do_sample=False,
            repetition_penalty=1.25,
            min_new_tokens=12,
            eos_token_id=eos,
            pad_token_id=0,
            temperature=None,
            top_p=None,
            top_k=None,
        )[0, len(prompt) :].tolist()
        engine = loaded.engine(eos=eos[:1])
        sampling = Sampling(ANSWER, repetition_penalty=1.25, min_tokens=12, stop_tokens=tuple(eos[1:]))
        engine.admit(SequenceStart(str(index), prompt, (), sampling))
        answer = tokens(run(engine)[str(index)])
        assert answer == expected and answer != plain and len(answer) > 12


def test_a_shaped_answer_goes_on_from_any_position_in_another_engine(loaded):
    rng = random.Random(7)
    changed = 0
    for index, prompt in enumerate(loaded.prompts(seed=6, count=5)):
        sampling = replace(
            random_sampling(rng), max_tokens=ANSWER, temperature=rng.choice((0.0, 0.8)), seed=index, top_k=30
        )
        engine = loaded.engine(eos=range(8, 16))
        engine.admit(SequenceStart("whole", prompt, (), sampling))
        whole = run(engine)["whole"]
        answer = tokens(whole)
        plain = loaded.engine(eos=range(8, 16))
        unshaped = Sampling(ANSWER, temperature=sampling.temperature, seed=index, top_k=30)
        plain.admit(SequenceStart("plain", prompt, (), unshaped))
        changed += tokens(run(plain)["plain"]) != answer
        for cut in rng.sample(range(1, len(answer)), min(3, len(answer) - 1)):
            other = loaded.engine(eos=range(8, 16), prefill_chunk=rng.choice((3, 64)))
            other.admit(SequenceStart("bystander", prompt[::-1], (), replace(unshaped, repetition_penalty=2.0)))
            other.admit(SequenceStart("whole", prompt, tuple(answer[:cut]), sampling))
            assert run(other)["whole"] == whole[cut:]
    assert changed >= 3, "otherwise this shows nothing"


def test_logprobs_are_those_of_the_shaped_distribution_before_temperature(loaded):
    prompt = loaded.prompts(seed=6, count=1)[0]
    sampling = Sampling(8, temperature=1.7, top_k=5, seed=3, repetition_penalty=1.4, logprobs=5)
    engine = loaded.engine()
    engine.admit(SequenceStart("a", prompt, (), sampling))
    said: list[int] = []
    for event in run(engine)["a"]:
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([[*prompt, *said]])).logits[0, -1]
        expected = reference(logits, sampling, prompt, said, ()).double().log_softmax(0)
        best = expected.topk(5)
        assert event.logprobs.logprob == pytest.approx(float(expected[event.token]), abs=3e-6)
        assert [one.token for one in event.logprobs.alternatives] == best.indices.tolist()
        assert [one.logprob for one in event.logprobs.alternatives] == pytest.approx(best.values.tolist(), abs=3e-6)
        assert [one.text for one in event.logprobs.alternatives] == [f" {token}" for token in best.indices.tolist()]
        said.append(event.token)


def test_what_is_not_finite_has_the_least_logprob():
    scores = torch.tensor([[0.0, float("-inf"), float("-inf")], [float("nan")] * 3, [0.0, 1.0, 2.0]])
    barred, broken, unasked = measure(scores, [1, 0, 2], [3, 3, -1])
    assert barred == (-9999.0, [(0, 0.0)]) and broken == (-9999.0, []) and unasked is None
    assert measure(scores[2:], [2], [20])[0].likeliest[0] == (2, pytest.approx(-0.407606))


def test_who_asks_for_nothing_pays_nothing(loaded, monkeypatch):
    calls = []
    monkeypatch.setattr(models.engine, "shape", lambda *args: calls.append(args) or shape(*args))
    monkeypatch.setattr(models.engine, "measure", lambda *args: calls.append(args) or measure(*args))
    engine = loaded.engine()
    engine.admit(SequenceStart("a", (9, 10), (), Sampling(5, stop=("x",), stop_tokens=(9,))))
    run(engine)
    assert not calls
    engine.admit(SequenceStart("b", (9, 10), (), Sampling(1, min_tokens=1, logprobs=0)))
    run(engine)
    assert len(calls) == 2
