"""Sixteen-bit weights. There prefill and decode differ in the last bits, so an answer need not be that of `generate`;
but every token that the engine says is, within rounding, the likeliest one of a forward pass over all before it."""

from __future__ import annotations

import pytest
import torch
from engine_support import ANSWER, Loaded, run_with_traffic

from loaders import open_checkpoint, pack_checkpoint
from models.instance import load_model

DENSE = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt2", "gpt_neox", "opt", "phi")
WITHIN = 0.1
"""Of the logits' standard deviation."""


def largest_deficit(model: Loaded, prompts: list[tuple[int, ...]]) -> float:
    """How far below the maximum the engine's tokens are in a forward pass over prompt and answer, in standard
    deviations of the logits."""
    answers = run_with_traffic(model.engine(), prompts, seed=6)
    worst = 0.0
    for index, prompt in enumerate(prompts):
        answer = torch.tensor(answers[f"watched-{index}"])
        assert len(answer) == ANSWER
        with torch.inference_mode():
            fed = torch.tensor([[*prompt, *answer[:-1].tolist()]])
            logits = model.model(fed, use_cache=False).logits[0, len(prompt) - 1 :].float()
        said = logits.gather(1, answer[:, None])[:, 0]
        worst = max(worst, float(((logits.max(dim=-1).values - said) / logits.std(dim=-1)).max()))
    return worst


@pytest.mark.parametrize("arch", DENSE)
def test_in_bfloat16_every_token_is_within_rounding_the_likeliest(sample_directory, arch):
    model = Loaded(sample_directory(arch, "bfloat16"))
    assert model.model.dtype == torch.bfloat16
    assert largest_deficit(model, model.prompts(seed=5, count=3, longest=40)) <= WITHIN


@pytest.mark.parametrize(("arch", "dtype"), [("llama", "float16"), ("mixtral", "float16"), ("mixtral", "float32")])
def test_other_dtypes_say_what_the_model_says(sample_directory, arch, dtype):
    model = Loaded(sample_directory(arch, dtype))
    assert str(model.model.dtype) == f"torch.{dtype}"
    assert largest_deficit(model, model.prompts(seed=5, count=3, longest=40)) <= WITHIN


def test_a_position_shifted_by_one_is_noticed_in_bfloat16(sample_directory, monkeypatch):
    model = Loaded(sample_directory("llama", "bfloat16"))
    forward = model.model.forward

    def shifted(*args, position_ids=None, **kwargs):
        if position_ids is not None and position_ids.shape[1] == 1:
            position_ids = position_ids + 1
        return forward(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", shifted)
    assert largest_deficit(model, model.prompts(seed=5, count=3, longest=40)) > WITHIN


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_stay_sixteen_bits_on_their_way(sample_directory, tmp_path, dtype):
    source = sample_directory("mixtral", dtype)
    manifest = pack_checkpoint(source, tmp_path / "packed")
    assert manifest.dtype == dtype
    with open_checkpoint(tmp_path / "packed") as checkpoint:
        model = load_model(tmp_path / "packed", checkpoint.tensors)
        assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
