"""Checkpoints for benches: the shapes of a Llama, random bytes, in every layout that a loader wants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from loaders.destination import check_space
from loaders.errors import CheckpointError

_WIDTHS = (2048, 1024, 512, 256)
_VOCABULARY = 32_000
_MARK = ".bench-checkpoint.json"


def shape_for(tensor_bytes: int, tensors: int) -> tuple[int, int, int]:
    """(width, layers, inner width) of a bf16 Llama of about this size: 9 tensors a layer, and 3; or fewer layers."""
    layers = max(1, (tensors - 3) // 9)
    while layers:
        for width in _WIDTHS:
            attention = 2 * width * width * 2 + 2 * width * (width // 4) * 2
            embeddings = 2 * _VOCABULARY * width * 2
            inner = (tensor_bytes - embeddings - layers * attention) // (layers * 3 * width * 2)
            if inner >= width:
                return width, layers, inner // 64 * 64
        layers //= 2
    raise CheckpointError(f"{tensor_bytes / 1e9:g} GB are too few for a model with {_VOCABULARY} tokens: ask for more")


def make_checkpoint(directory: Path, tensor_bytes: int, tensors: int = 291) -> Path:
    """A plain Hugging Face directory with shards of at most 5 GB; one that lies there already is taken as it is."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    wanted = {"bytes": tensor_bytes, "tensors": tensors, "version": 1}
    mark = directory / _MARK
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    check_space(directory.parent, tensor_bytes)
    width, layers, inner = shape_for(tensor_bytes, tensors)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    state = model.state_dict()
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 3}, unk_token="<unk>"))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(directory)
    random = np.random.default_rng(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    index: dict[str, str] = {}
    names = list(state)
    total = sum(tensor.nbytes for tensor in state.values())
    count = -(-total // 5_000_000_000)
    for name in names:
        if filled and filled + state[name].nbytes > total / count + 1e8:
            shards.append({})
            filled = 0
        shards[-1][name] = state[name]
        filled += state[name].nbytes
    for number, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        # Bytes below 0x3c in the upper half keep every number finite and small, whatever the lower half is.
        made = {
            name: torch.from_numpy(random.integers(0, 0x3C00, tuple(tensor.shape), dtype=np.uint16)).view(
                torch.bfloat16
            )
            for name, tensor in shard.items()
        }
        save_file(made, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        document = {"metadata": {"total_size": total}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(document))
    mark.write_text(json.dumps(wanted))
    return directory


def make_packed(source: Path, directory: Path) -> Path:
    """The packed form; one that lies there is taken as it is."""
    from loaders import pack_checkpoint, read_manifest

    try:
        read_manifest(directory)
    except CheckpointError:
        shutil.rmtree(directory, ignore_errors=True)
        pack_checkpoint(source, directory)
    return directory
