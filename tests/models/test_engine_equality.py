"""Greedy output equals `generate`: alone, and while others join and leave. In float64, where numerics cannot excuse a
difference; and in float32 with fixed seeds. The samples answer with many distinct tokens, otherwise nothing would show;
that the comparison can fail is shown by two engines that are wrong on purpose. Windows, and all other architectures:
test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from engine_support import ANSWER, Loaded, greedy, run, run_with_traffic, tokens

import models.engine
import models.slot_cache
from models.masks import masks

ARCHITECTURES = ("llama", "qwen3", "gpt2", "opt", "mixtral")


@pytest.fixture(scope="module")
def loaded(sample_directory):
    made = {}

    def load(arch, dtype="float64", **overrides):
        key = repr((arch, dtype, overrides))
        if key not in made:
            made[key] = Loaded(sample_directory(arch, dtype, **overrides))
        return made[key]

    return load


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_alone_equals_generate_and_says_many_things(loaded, arch):
    model = loaded(arch)
    distinct = []
    for prompt in model.prompts(seed=3, count=4):
        engine = model.engine()
        engine.admit(greedy("only", prompt))
        answer = tokens(run(engine)["only"])
        assert answer == model.reference(prompt)
        assert len(answer) == ANSWER
        distinct.append(len(set(answer)))
    assert sum(distinct) / len(distinct) >= 10, distinct


@pytest.mark.parametrize("prefill_chunk", [1, 7, 16, 256])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_generate_while_others_join_and_leave(loaded, arch, prefill_chunk):
    model = loaded(arch)
    prompts = model.prompts(seed=3, count=4) + model.prompts(seed=4, count=2)
    answers = run_with_traffic(model.engine(prefill_chunk=prefill_chunk, max_slots=5), prompts, seed=prefill_chunk)
    assert [answers[f"watched-{index}"] for index in range(len(prompts))] == [model.reference(p) for p in prompts]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_equals_generate_in_float32(loaded, arch):
    model = loaded(arch, "float32")
    prompts = model.prompts(seed=5, count=4)
    answers = run_with_traffic(model.engine(), prompts, seed=6)
    assert [answers[f"watched-{index}"] for index in range(len(prompts))] == [model.reference(p) for p in prompts]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_position_shifted_by_one_is_noticed(loaded, arch, monkeypatch):
    model = loaded(arch)
    engine = model.engine()
    forward = model.model.forward

    def shifted(*args, position_ids, **kwargs):
        decoding = position_ids.shape[1] == 1
        return forward(*args, position_ids=position_ids + (1 if decoding else 0), **kwargs)

    monkeypatch.setattr(model.model, "forward", shifted)
    for index, prompt in enumerate(model.prompts(seed=3, count=4)):
        engine.admit(greedy(str(index), prompt))
    events = run(engine)
    monkeypatch.undo()
    different = sum(
        tokens(events[str(index)]) != model.reference(prompt)
        for index, prompt in enumerate(model.prompts(seed=3, count=4))
    )
    assert different >= 3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_dropped_key_is_noticed(loaded, arch, monkeypatch):
    model = loaded(arch)
    engine = model.engine()

    def forgetful(positions, length, kinds, dtype):
        mask = masks(positions, length, kinds, dtype)
        if positions.shape[1] == 1 and length > 3:
            mask[:, :, :, 2] = torch.finfo(dtype).min
        return mask

    monkeypatch.setattr(models.engine, "masks", forgetful)
    # Of different lengths: rows that are equally long and see everything need no mask.
    prompts = [prompt[: 16 - 3 * index] for index, prompt in enumerate(model.prompts(seed=3, count=4))]
    for index, prompt in enumerate(prompts):
        engine.admit(greedy(str(index), prompt))
    events = run(engine)
    assert sum(tokens(events[str(index)]) != model.reference(prompt) for index, prompt in enumerate(prompts)) >= 2
