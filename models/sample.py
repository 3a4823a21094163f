"""Sample models: random weights in Hugging Face layout, made in a moment, for tests, benches and the demo.

They answer with nonsense, but everything around them is real: config, safetensors, a byte-level BPE tokenizer trained
on a text that ships with this package, a chat template, a generation config. The default standard deviation of 0.08 is
large on purpose: at the usual 0.02 a random model repeats one token, and a test that compares answers sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import logging

from models.errors import ModelError
from models.sample_tokenizer import BOS, EOS, PAD, SMALLEST_VOCABULARY, train_tokenizer

DEFAULT_STD = 0.08
_WIDTHS = (32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096)


@dataclass(frozen=True, slots=True)
class _Shape:
    width: int
    layers: int
    inner: int

    @property
    def heads(self) -> int:
        return self.width // (16 if self.width < 256 else 32 if self.width < 512 else 64)

    @property
    def kv_heads(self) -> int:
        return next(self.heads // group for group in (4, 3, 2, 1) if self.heads % group == 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """What was made."""

    directory: Path
    architecture: str
    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    context: int
    tied: bool
    dtype: str
    shards: int
    weight_bytes: int


def _llama_like(shape: _Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "intermediate_size": shape.inner,
    }


def _mixtral(shape: _Shape) -> dict[str, Any]:
    return _llama_like(shape) | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}


def _qwen3_moe(shape: _Shape) -> dict[str, Any]:
    return _llama_like(shape) | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": shape.inner,
        "decoder_sparse_step": 1,
    }


def _gemma3(shape: _Shape) -> dict[str, Any]:
    # Every second layer sees a window, so that two layers show both kinds.
    kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(shape.layers)]
    return _llama_like(shape) | {"layer_types": kinds, "query_pre_attn_scalar": shape.width // shape.heads}


def _neox(shape: _Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
    }


def _phi(shape: _Shape) -> dict[str, Any]:
    return _neox(shape) | {"num_key_value_heads": shape.kv_heads}


def _gpt2(shape: _Shape) -> dict[str, Any]:
    return {"n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads, "n_inner": shape.inner}


def _opt(shape: _Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.width,
        "word_embed_proj_dim": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "ffn_dim": shape.inner,
    }


# Architecture: its settings for a shape, and whether it usually ties its embeddings.
_ARCHITECTURES: dict[str, tuple[Callable[[_Shape], dict[str, Any]], bool]] = {
    "llama": (_llama_like, False),
    "mistral": (_llama_like, False),
    "mixtral": (_mixtral, False),
    "qwen2": (_llama_like, True),
    "qwen3": (_llama_like, True),
    "qwen3_moe": (_qwen3_moe, False),
    # With random weights a tied Gemma says its last token for ever: the embeddings are scaled up.
    "gemma": (_llama_like, False),
    "gemma2": (_llama_like, False),
    "gemma3": (_gemma3, False),
    "gpt2": (_gpt2, True),
    "gpt_neox": (_neox, False),
    "opt": (_opt, True),
    "phi": (_phi, False),
}
# The text part of a family whose plain name is that of a model for images, too.
_MODEL_TYPES = {"gemma3": "gemma3_text"}
ARCHITECTURES = tuple(_ARCHITECTURES)


def make_sample(
    directory: Path,
    *,
    arch: str = "llama",
    parameters: int = 60_000_000,
    seed: int = 0,
    dtype: str = "float32",
    std: float = DEFAULT_STD,
    shards: int = 1,
    vocabulary: int | None = None,
    context: int = 2048,
    tied: bool | None = None,
    overrides: dict[str, Any] | None = None,
) -> Sample:
    """Write a model of about `parameters` parameters to `directory`, which must be empty or not exist; ModelError.

    The same arguments give the same weights. `tied` None is what the architecture usually does. `overrides` go into
    the configuration as they are, last (a sliding window, a rope scaling).
    """
    wanted = check_sample(directory, dtype=dtype, std=std, vocabulary=vocabulary, parameters=parameters)
    if arch not in _ARCHITECTURES:
        raise ModelError(f"There is no sample of architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}.")
    if context < 8 or shards < 1:
        raise ModelError("A sample needs a context of at least 8 and at least one shard.")
    settings, tied_usually = _ARCHITECTURES[arch]
    text = resources.files("models").joinpath("training_text.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text, wanted, context)
    common = {
        "vocab_size": wanted,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied_usually if tied is None else tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": std,
        "init_std": std,
    }

    def configure(shape: _Shape) -> PretrainedConfig:
        return CONFIG_MAPPING[_MODEL_TYPES.get(arch, arch)](**common | settings(shape) | (overrides or {}))

    shape = _fit(configure, parameters)
    config = configure(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=0.8, top_p=0.95, top_k=50
    )
    directory.mkdir(parents=True, exist_ok=True)
    with no_progress_bar():
        model.save_pretrained(directory, max_shard_size=_shard_bytes(model, shards))
    tokenizer.save_pretrained(directory)
    files = sorted(directory.glob("*.safetensors"))
    return Sample(
        directory=directory,
        architecture=arch,
        parameters=_count(model),
        layers=shape.layers,
        hidden=shape.width,
        vocabulary=wanted,
        context=context,
        tied=bool(config.tie_word_embeddings),
        dtype=dtype,
        shards=len(files),
        weight_bytes=sum(file.stat().st_size for file in files),
    )


def check_sample(directory: Path, *, dtype: str, std: float, vocabulary: int | None, parameters: int) -> int:
    """What every sample needs; the size of its vocabulary. Raises ModelError."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ModelError(f"{directory} exists and is not an empty directory: name another one or remove it.")
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ModelError(f"A sample cannot have dtype {dtype!r}: choose float32, bfloat16, float16 or float64.")
    if not 0 < std < math.inf:
        raise ModelError("A sample needs a std above 0.")
    wanted = vocabulary if vocabulary is not None else _usual_vocabulary(parameters)
    if wanted < SMALLEST_VOCABULARY:
        raise ModelError(f"A vocabulary of {wanted} is too small: bytes and special tokens take {SMALLEST_VOCABULARY}.")
    return wanted


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Writing weights draws nothing on the terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _usual_vocabulary(parameters: int) -> int:
    """As many tokens as the text can fill, fewer where the embeddings would take most of a small model."""
    return 2048 if parameters >= 4_000_000 else 512


def _count(model: Any) -> int:
    return sum(int(parameter.numel()) for parameter in model.parameters())


def _fit(configure: Callable[[_Shape], PretrainedConfig], parameters: int) -> _Shape:
    """Width, depth and inner width of a model of about this many parameters, as deep for its width as usual ones."""

    def count(shape: _Shape) -> int:
        with torch.device("meta"):
            return _count(AutoModelForCausalLM.from_config(configure(shape)))  # type: ignore[no-untyped-call]

    best: tuple[float, _Shape] | None = None
    for width in _WIDTHS:
        one = count(_Shape(width, 1, 4 * width))
        per_layer = count(_Shape(width, 2, 4 * width)) - one
        layers = 1 + (parameters - one) / per_layer
        if layers < 1:
            break
        off = abs(math.log(layers / max(2.0, width / 64)))
        if best is None or off < best[0]:
            best = off, _Shape(width, max(1, round(layers)), 4 * width)
    if best is None:
        raise ModelError(f"{parameters:,} parameters are too few: the embeddings of the smallest sample take more.")
    shape = best[1]
    # Depth comes in whole layers; the inner width makes up for the rest.
    per_step = (count(shape) - count(_Shape(shape.width, shape.layers, 3 * shape.width))) / shape.width
    inner = shape.inner + 8 * round((parameters - count(shape)) / per_step / 8)
    return _Shape(shape.width, shape.layers, max(8, inner))


def _shard_bytes(model: Any, shards: int) -> int:
    """The largest shard size that gives this many files, or as near as whole tensors allow."""
    sizes = [int(tensor.numel()) * int(tensor.element_size()) for tensor in model.parameters()]
    total, largest = sum(sizes), max(sizes)
    low, high = max(1, total // shards), total + largest
    while low < high:
        middle = (low + high) // 2
        if _files(sizes, middle) <= shards:
            high = middle
        else:
            low = middle + 1
    return low if shards > 1 else 2 * high


def _files(sizes: list[int], limit: int) -> int:
    files, filled = 1, 0
    for size in sizes:
        if filled and filled + size > limit:
            files, filled = files + 1, 0
        filled += size
    return files
