"""What a process computes for the first time costs more: threads are made, kernels compiled, modules imported.

So a worker answers one small request of its own, of no model, before anybody asks it for something.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.architecture import describe
from models.contract import Sampling, SequenceStart
from models.engine import SlotEngine

_CONTEXT = 32


def warm_up() -> None:
    """Run an engine over a model of a few thousand random numbers. To be called in the thread that will compute."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=_CONTEXT,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    engine = SlotEngine(model, describe(model), _spaces, eos=(), kv_bytes=1 << 20, context=_CONTEXT)
    engine.admit(SequenceStart("warm", tuple(range(1, 9)), (), Sampling(max_tokens=2, temperature=1.0)))
    while engine.active():
        engine.step()


def _spaces(tokens: list[int]) -> str:
    return " " * len(tokens)
