"""Tiny checkpoints in Hugging Face layout: real files, random weights, made once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loaders import Manifest, pack_checkpoint

COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **COMMON,
}


def make_config(name: str) -> Any:
    if name == "llama":
        return transformers.LlamaConfig(**SMALL)
    if name == "gpt2":
        return transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, **COMMON)
    if name == "qwen3":
        return transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)
    if name == "mixtral":
        return transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    raise KeyError(name)


DTYPES = {"llama": torch.float32, "gpt2": torch.float64, "qwen3": torch.bfloat16, "mixtral": torch.float16}


def make_source(directory: Path, name: str, dtype: torch.dtype, shard_bytes: int | None = None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = make_config(name)
    config.initializer_range = 0.08
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if shard_bytes:
        model.save_pretrained(directory, max_shard_size=shard_bytes)
    else:
        model.save_pretrained(directory)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"word{number}": number for number in range(3, 96)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The source directory of an architecture, read-only by convention. Llama's is sharded."""
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp("source") / name
            made[name] = make_source(directory, name, DTYPES[name], 200_000 if name == "llama" else None)
        return made[name]

    return source


@pytest.fixture(scope="session")
def packed(
    sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Manifest]]:
    """The packed directory of an architecture and its manifest, read-only by convention; chunks of 64 KiB."""
    made: dict[str, tuple[Path, Manifest]] = {}

    def pack(name: str) -> tuple[Path, Manifest]:
        if name not in made:
            directory = tmp_path_factory.mktemp("packed") / name
            made[name] = directory, pack_checkpoint(sources(name), directory, chunk_bytes=65_536)
        return made[name]

    return pack


@pytest.fixture
def llama_copy(sources: Callable[[str], Path], tmp_path: Path) -> Path:
    """A source of one's own to spoil: a sharded Llama."""
    return Path(shutil.copytree(sources("llama"), tmp_path / "spoiled"))


@pytest.fixture
def packed_copy(packed: Callable[[str], tuple[Path, Manifest]], tmp_path: Path) -> Path:
    """A packed Qwen3 (tied, bfloat16) of one's own to spoil."""
    return Path(shutil.copytree(packed("qwen3")[0], tmp_path / "packed"))
