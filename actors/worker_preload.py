"""Imported once, before any thread exists, by the process from which all workers of a node are forked.

What is imported here costs a restarted worker nothing: it is up in the time of a fork and a connection.
"""

from __future__ import annotations

import transformers
import uvloop

import actors.worker_process
import bus.jetstream
import models.instance

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
    "PreTrainedTokenizerFast",
    "GenerationConfig",
)
"""Classes that are looked up here, because transformers imports each of them only when it is asked for."""

for _name in ARCHITECTURES:
    getattr(transformers, _name, None)

__all__ = ["ARCHITECTURES", "actors", "bus", "models", "uvloop"]
