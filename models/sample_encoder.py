"""Sample encoders: random weights in the layout of sentence-transformers, with a tokenizer of their own."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModel

from models.errors import ModelError
from models.sample import DEFAULT_STD, Sample, check_sample, no_progress_bar
from models.sample_tokenizer import BOS, EOS, PAD, SPECIAL, train_tokenizer

ENCODER_ARCHITECTURES = ("bert", "roberta")
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_WIDTHS = (32, 64, 128, 256, 384, 512, 768, 1024)
_ROBERTA_EXTRA = 1 + PAD
"""Positions that RoBERTa never uses: it counts from behind the padding token."""


def make_encoder_sample(
    directory: Path,
    *,
    arch: str = "bert",
    parameters: int = 4_000_000,
    seed: int = 0,
    dtype: str = "float32",
    std: float = DEFAULT_STD,
    vocabulary: int | None = None,
    context: int = 512,
    pooling: str | None = "mean",
    normalize: bool = True,
) -> Sample:
    """Write an encoder of about `parameters` parameters to `directory`, which must be empty or not exist; ModelError.

    `pooling` is one of `POOLINGS`; with None nothing is said about how a vector is made.
    """
    if arch not in ENCODER_ARCHITECTURES:
        raise ModelError(f"There is no sample encoder {arch!r}: choose one of {', '.join(ENCODER_ARCHITECTURES)}.")
    if pooling is not None and pooling not in POOLINGS:
        raise ModelError(f"There is no pooling {pooling!r}: choose one of {', '.join(POOLINGS)}.")
    wanted = check_sample(directory, dtype=dtype, std=std, vocabulary=vocabulary, parameters=parameters)
    config = _fit(arch, parameters, wanted, context, std)
    text = resources.files("models").joinpath("training_text.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text, wanted, context)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A {SPECIAL[EOS]}",
        pair=f"{SPECIAL[BOS]} $A {SPECIAL[EOS]} $B {SPECIAL[EOS]}",
        special_tokens=[(SPECIAL[BOS], BOS), (SPECIAL[EOS], EOS)],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        builder: Any = AutoModel
        model = builder.from_config(config, dtype=getattr(torch, dtype))
    directory.mkdir(parents=True, exist_ok=True)
    with no_progress_bar():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if pooling is not None:
        _write_modules(directory, pooling, normalize, int(config.hidden_size), context)
    files = sorted(directory.glob("*.safetensors"))
    return Sample(
        directory=directory,
        architecture=arch,
        parameters=sum(int(parameter.numel()) for parameter in model.parameters()),
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        vocabulary=wanted,
        context=context,
        tied=False,
        dtype=dtype,
        shards=len(files),
        weight_bytes=sum(file.stat().st_size for file in files),
    )


def _fit(arch: str, parameters: int, vocabulary: int, context: int, std: float) -> Any:
    """The configuration of about this size whose depth is as usual for its width."""
    best: tuple[float, Any] | None = None
    for width in _WIDTHS:
        per_layer = 12 * width * width
        layers = round((parameters - (vocabulary + context) * width - width * width) / per_layer)
        if layers < 1:
            break
        off = abs(math.log(layers / max(2.0, width / 64)))
        if best is None or off < best[0]:
            best = off, (width, layers)
    if best is None:
        raise ModelError(f"{parameters:,} parameters are too few: the embeddings of the smallest sample take more.")
    width, layers = best[1]
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "intermediate_size": 4 * width,
        "max_position_embeddings": context + (_ROBERTA_EXTRA if arch == "roberta" else 0),
        "initializer_range": std,
        "type_vocab_size": 2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return CONFIG_MAPPING[arch](**settings)


def _write_modules(directory: Path, pooling: str, normalize: bool, width: int, context: int) -> None:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    said = {"word_embedding_dimension": width} | {switch: name == pooling for name, switch in POOLINGS.items()}
    _write(directory / "modules.json", modules)
    _write(directory / "1_Pooling" / "config.json", said)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": context, "do_lower_case": False})


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
