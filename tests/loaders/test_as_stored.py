"""Checkpoints packed as they stand: every dtype of safetensors comes back bit by bit, by every way of reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.local_storage import LocalStorage
from actors.store_driver import StorageFailed
from loaders import CheckpointError, fetch_checkpoint, load_checkpoint, open_checkpoint, pack_checkpoint
from loaders import verify_checkpoint as verify
from loaders.dtypes import DTYPE_OF_NAME

UNKNOWN_TO_THE_LIBRARY = {"F8_E8M0"}
"""safetensors 0.8 has this one in its format, and not in what it gives to torch."""


def tensors_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Several layers with names that sort wrongly as text, odd sizes, an empty one and a scalar; any bits at all."""
    shapes = {
        "model.layers.10.mlp.weight": (7, 33),
        "model.layers.2.mlp.weight": (64, 32),
        "model.layers.2.mlp.weight_scale_inv": (1, 3),
        "model.embed_tokens.weight": (40, 16),
        "lm_head.weight": (40, 16),
        "model.norm.weight": (16,),
        "model.nothing": (0, 4),
        "model.scalar": (),
    }
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if dtype == torch.float4_e2m1fn_x2 and not shape:
            continue  # two elements, which the format cannot hold without a dimension
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
        made[name] = raw.view(dtype).reshape(shape)
    return made


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def make_source(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 40}
    config["quantization_config"] = {"quant_method": "fp8"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", sorted(set(DTYPE_OF_NAME) - UNKNOWN_TO_THE_LIBRARY))
def test_every_dtype(name: str, tmp_path: Path) -> None:
    dtype = DTYPE_OF_NAME[name]
    tensors = tensors_of(dtype)
    source = make_source(tmp_path / "source", tensors)
    manifest = pack_checkpoint(source, tmp_path / "packed", as_stored=True, chunk_bytes=4096)
    assert manifest.kind == "stored" and manifest.dtype == str(dtype).removeprefix("torch.") and manifest.layers == 2
    verify(tmp_path / "packed")
    fetch_checkpoint(str(tmp_path / "packed"), tmp_path / "fetched")
    for directory in (tmp_path / "packed", tmp_path / "fetched"):
        with open_checkpoint(directory) as mapped, load_checkpoint(directory) as loaded:
            for found in (mapped.tensors, loaded.tensors):
                assert {key: (t.dtype, t.shape, bits(t)) for key, t in found.items()} == {
                    key: (t.dtype, t.shape, bits(t)) for key, t in tensors.items()
                }
    others = load_file(tmp_path / "packed" / "model.safetensors")
    assert all(bits(others[key]) == bits(tensors[key]) for key in tensors)


def test_it_stands_in_the_order_of_its_layers(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of(torch.float8_e4m3fn))
    pack_checkpoint(source, tmp_path / "packed", as_stored=True)
    with open_checkpoint(tmp_path / "packed") as mapped:
        names = list(mapped.tensors)
    assert names[0] == "model.embed_tokens.weight"
    assert names.index("model.layers.2.mlp.weight") < names.index("model.layers.10.mlp.weight")
    assert names.index("model.layers.10.mlp.weight") < names.index("lm_head.weight")


def test_a_quantised_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of(torch.float8_e4m3fn))
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--as-stored"):
        pack_checkpoint(source, tmp_path / "packed")


async def test_a_cell_does_not_serve_it(packed: Callable[[str], tuple[Path, object]], tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of(torch.float8_e5m2))
    pack_checkpoint(source, tmp_path / "models" / "eight", as_stored=True)
    storage = LocalStorage(tmp_path / "models")
    assert await storage.scan() == ()
    with pytest.raises(StorageFailed, match="packed as stored"):
        await storage.find("eight")
