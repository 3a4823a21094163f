"""Checkpoints packed as they stand: every dtype of safetensors comes back bit by bit, by every way of reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import deserialize
from safetensors.torch import load_file, save_file

from actors.local_storage import LocalStorage
from actors.store_driver import StorageFailed
from loaders import (
    CheckpointError,
    Manifest,
    fetch_checkpoint,
    load_checkpoint,
    open_checkpoint,
    pack_checkpoint,
    read_manifest,
)
from loaders import verify_checkpoint as verify
from loaders.dtypes import DTYPE_OF_NAME, SHOWN_AS_BYTES
from loaders.header import DTYPE_BITS

UNKNOWN_TO_THE_LIBRARY = {"F8_E8M0", *SHOWN_AS_BYTES}
"""safetensors 0.8 has these in its format, and not in what it gives to torch."""


def tensors_of(name: str) -> dict[str, torch.Tensor]:
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
    dtype = DTYPE_OF_NAME[name]
    for key, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if name in ("F4", *SHOWN_AS_BYTES) and not shape:
            continue  # several elements, which the format cannot hold without a dimension
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
        made[key] = raw.view(dtype).reshape(shape)
        if name in SHOWN_AS_BYTES:
            made[key] = raw[: size // 3 * 3].view(-1, 3)
    return made


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def make_source(directory: Path, tensors: dict[str, torch.Tensor], name: str = "") -> Path:
    """`name`: the dtype of all of them as safetensors names it, where its library does not know it."""
    directory.mkdir()
    if name in UNKNOWN_TO_THE_LIBRARY:
        entries, data = {}, b""
        for key, tensor in tensors.items():
            shape = list(tensor.shape)
            if shape:
                shape[-1] = shape[-1] * 8 // DTYPE_BITS[name]
            entries[key] = {"dtype": name, "shape": shape, "data_offsets": [len(data), len(data) + tensor.nbytes]}
            data += bits(tensor)
        text = json.dumps(entries).encode()
        (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    else:
        save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 40}
    config["quantization_config"] = {"quant_method": "fp8"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", sorted(DTYPE_BITS))
def test_every_dtype(name: str, tmp_path: Path) -> None:
    tensors = tensors_of(name)
    source = make_source(tmp_path / "source", tensors, name)
    manifest = pack_checkpoint(source, tmp_path / "packed", as_stored=True, chunk_bytes=4096)
    assert manifest.kind == "stored" and manifest.layers == 2
    assert manifest.dtype == SHOWN_AS_BYTES.get(name, str(DTYPE_OF_NAME[name]).removeprefix("torch."))
    verify(tmp_path / "packed")
    fetch_checkpoint(str(tmp_path / "packed"), tmp_path / "fetched")
    for directory in (tmp_path / "packed", tmp_path / "fetched"):
        with open_checkpoint(directory) as mapped, load_checkpoint(directory) as loaded:
            for found in (mapped.tensors, loaded.tensors):
                assert {key: (t.dtype, t.shape, bits(t)) for key, t in found.items()} == {
                    key: (t.dtype, t.shape, bits(t)) for key, t in tensors.items()
                }
    others = dict(deserialize((tmp_path / "packed" / "model.safetensors").read_bytes()))
    for key, one in deserialize((source / "model.safetensors").read_bytes()):
        assert (one["dtype"], one["shape"], one["data"]) == tuple(
            others[key][field] for field in ("dtype", "shape", "data")
        )
    if name not in UNKNOWN_TO_THE_LIBRARY:
        loaded_by_others = load_file(tmp_path / "packed" / "model.safetensors")
        assert all(bits(loaded_by_others[key]) == bits(tensors[key]) for key in tensors)


def test_it_stands_in_the_order_of_its_layers(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of("F8_E4M3"))
    pack_checkpoint(source, tmp_path / "packed", as_stored=True)
    with open_checkpoint(tmp_path / "packed") as mapped:
        names = list(mapped.tensors)
    assert names[0] == "model.embed_tokens.weight"
    assert names.index("model.layers.2.mlp.weight") < names.index("model.layers.10.mlp.weight")
    assert names.index("model.layers.10.mlp.weight") < names.index("lm_head.weight")


@pytest.mark.parametrize("name", ["F8_E4M3", "F4", "F6_E3M2"])
def test_a_quantised_checkpoint_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of(name), name)
    (source / "tokenizer.json").write_text("{}")
    for quantised in ({"quant_method": "some"}, None):
        config = {"model_type": "qwen3", "quantization_config": quantised}
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="--as-stored"):
            pack_checkpoint(source, tmp_path / "packed")


def test_what_was_packed_and_is_packed_again_keeps_its_tied_tensors_tied(
    packed: Callable[[str], tuple[Path, Manifest]], tmp_path: Path
) -> None:
    first, manifest = packed("qwen3")
    again = pack_checkpoint(first, tmp_path / "again", as_stored=True)
    assert (again.tensors, again.tensor_bytes) == (manifest.tensors, manifest.tensor_bytes)
    with open_checkpoint(first) as before, open_checkpoint(tmp_path / "again") as after:
        assert before.tensors.keys() == after.tensors.keys() and "lm_head.weight" in after.tensors
        assert all(bits(before.tensors[key]) == bits(after.tensors[key]) for key in before.tensors)


@pytest.mark.parametrize("spoiled", [{"model_type": ""}, {"model_type": 5}, {"architectures": ["\ud800"]}])
def test_a_configuration_without_names_is_refused(spoiled: dict[str, object], tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of("F8_E4M3"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | spoiled))
    with pytest.raises(CheckpointError, match="names no model_type"):
        pack_checkpoint(source, tmp_path / "packed", as_stored=True)


def test_a_manifest_that_nobody_would_read_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source", tensors_of("F8_E4M3"))
    before = pack_checkpoint(source, tmp_path / "packed", as_stored=True)
    (source / "config.json").write_text('{"model_type": ""}')
    monkeypatch.setattr("loaders.as_stored._is_name", lambda name: True)
    with pytest.raises(CheckpointError, match="not a valid manifest"):
        pack_checkpoint(source, tmp_path / "packed", as_stored=True)
    assert read_manifest(tmp_path / "packed") == before


def test_pickles_are_not_packed_as_stored(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of("F32"))
    (source / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(3)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="leave out --as-stored"):
        pack_checkpoint(source, tmp_path / "packed", as_stored=True)


async def test_a_cell_does_not_serve_it(packed: Callable[[str], tuple[Path, object]], tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", tensors_of("F8_E5M2"))
    pack_checkpoint(source, tmp_path / "models" / "eight", as_stored=True)
    storage = LocalStorage(tmp_path / "models")
    assert await storage.scan() == ()
    with pytest.raises(StorageFailed, match="packed as stored"):
        await storage.find("eight")
