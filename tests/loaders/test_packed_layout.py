"""What the packed file promises to any reader of safetensors, to transformers, and to our own layout rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loaders import Manifest, open_checkpoint, pack_checkpoint, read_manifest
from loaders.layout import LAYER_ALIGNMENT, TENSOR_ALIGNMENT, TensorShape, arrange, group_by_layer, layer_of
from loaders.packed import read_packed_header

NAMES = ["llama", "gpt2", "qwen3", "mixtral"]
Packed = Callable[[str], tuple[Path, Manifest]]
Sources = Callable[[str], Path]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_packed_directory_and_computes_the_same(
    name: str, sources: Sources, packed: Packed
) -> None:
    directory, _ = packed(name)
    # Half-precision experts have no CPU kernel everywhere; float32 shows equality of weights as well.
    original = AutoModelForCausalLM.from_pretrained(sources(name), dtype=torch.float32)
    loaded, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"] and not found["error_msgs"]
    assert all(key.startswith("__padding__.") for key in found["unexpected_keys"])
    tokens = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(original(tokens).logits, loaded(tokens).logits)
    assert AutoTokenizer.from_pretrained(directory).chat_template


@pytest.mark.parametrize("name", NAMES)
def test_every_safetensors_reader_gets_the_modules_own_state(name: str, sources: Sources, packed: Packed) -> None:
    directory, manifest = packed(name)
    model = AutoModelForCausalLM.from_pretrained(sources(name))
    state = model.state_dict()
    loaded = load_file(directory / "model.safetensors")
    with safe_open(directory / "model.safetensors", "pt") as file, open_checkpoint(directory) as mapped:
        assert file.metadata()["format"] == "pt"
        assert mapped.tensors.keys() == state.keys()
        for key, expected in state.items():
            assert mapped.tensors[key].dtype == expected.dtype and torch.equal(mapped.tensors[key], expected)
        stored = [key for key in file.keys() if not key.startswith("__padding__.")]  # noqa: SIM118 - no mapping
        assert len(stored) == manifest.tensors
        for key in stored:
            assert torch.equal(file.get_tensor(key), state[key]) and torch.equal(loaded[key], state[key])


@pytest.mark.parametrize("name", NAMES)
def test_places_are_aligned_and_padding_is_zero(name: str, packed: Packed) -> None:
    directory, _ = packed(name)
    header = read_packed_header(directory / "model.safetensors").header
    content = (directory / "model.safetensors").read_bytes()
    assert header.data_start % 4096 == 0 and len(content) % 4096 == 0
    seen: set[str] = set()
    for record in header.tensors:
        if record.name.startswith("__padding__."):
            assert not any(content[header.data_start + record.begin : header.data_start + record.end])
            continue
        assert record.begin % 256 == 0
        layer = layer_of(record.name)
        if layer and layer not in seen:
            seen.add(layer)
            assert record.begin % 4096 == 0
    assert len(seen) == (2 if name == "gpt2" else 3)


def test_tensors_stand_in_order_of_first_use(packed: Packed) -> None:
    names = [record.name for record in read_packed_header(packed("llama")[0] / "model.safetensors").tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layer = [name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")]
    assert layer[:4] == [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ]


def test_tied_tensors_are_stored_once(packed: Packed) -> None:
    directory, _ = packed("qwen3")
    header = read_packed_header(directory / "model.safetensors")
    assert header.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    with open_checkpoint(directory) as mapped:
        head, embedding = mapped.tensors["lm_head.weight"], mapped.tensors["model.embed_tokens.weight"]
        assert head.data_ptr() == embedding.data_ptr()


def test_fused_experts_remember_what_they_were_made_of(packed: Packed, sources: Sources) -> None:
    header = read_packed_header(packed("mixtral")[0] / "model.safetensors")
    originals = header.original_names["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(originals) == 8 and any("experts.3.w1" in name for name in originals)
    with safe_open(sources("mixtral") / "model.safetensors", "pt") as file:
        assert set(originals) <= set(file.keys())
    assert not read_packed_header(packed("llama")[0] / "model.safetensors").original_names


@pytest.mark.parametrize(
    ("name", "dtype", "kv_bytes"),
    [
        ("llama", "float32", 3 * 2 * 2 * 16 * 4),
        ("gpt2", "float64", 2 * 2 * 4 * 16 * 8),
        ("qwen3", "bfloat16", 3 * 2 * 2 * 16 * 2),
        ("mixtral", "float16", 3 * 2 * 2 * 16 * 2),
    ],
)
def test_manifest_describes_the_model(name: str, dtype: str, kv_bytes: int, packed: Packed, sources: Sources) -> None:
    directory, manifest = packed(name)
    model = AutoModelForCausalLM.from_pretrained(sources(name))
    assert read_manifest(directory) == manifest
    assert manifest.architecture == type(model).__name__ and manifest.model_type == name
    assert manifest.dtype == dtype and manifest.kv_bytes_per_token == kv_bytes
    assert manifest.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert manifest.context == 128 and manifest.vocab_size == 96
    assert manifest.layers == (2 if name == "gpt2" else 3)
    assert manifest.bytes == (directory / "model.safetensors").stat().st_size
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= manifest.files.keys()
    for file in manifest.files:
        assert (directory / file).read_bytes() == (sources(name) / file).read_bytes()
    json.loads((directory / "longshore.json").read_bytes())


def test_packing_is_repeatable_and_a_packed_directory_is_a_source(packed: Packed, tmp_path: Path) -> None:
    directory, manifest = packed("qwen3")
    again = pack_checkpoint(directory, tmp_path / "again", chunk_bytes=65_536)
    # The names in the source differ for nothing in this model, so the bytes are the same too.
    assert again == manifest
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_stored_dtype_wins_over_the_configuration(sources: Sources, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in sources("qwen3").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(re.sub(r'"(torch_)?dtype": "bfloat16"', '"dtype": "float32"', text))
    assert pack_checkpoint(source, tmp_path / "packed").dtype == "bfloat16"


shapes = st.builds(
    TensorShape,
    st.builds(lambda layer, part: f"{layer}{part}", st.sampled_from(["", "m.h.0.", "m.h.1.", "m.h.2."]), st.uuids()),
    st.sampled_from(["F32", "BF16", "U8"]),
    st.lists(st.integers(0, 70), max_size=3).map(tuple),
)


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=20))
def test_any_tensors_are_arranged_without_holes_and_aligned(tensors: list[TensorShape]) -> None:
    records = arrange(tensors)
    by_name = {record.name: record for record in records}
    position = 0
    for record in records:
        assert record.begin == position
        position = record.end
    assert position % LAYER_ALIGNMENT == 0
    for tensor in tensors:
        record = by_name[tensor.name]
        assert record.end - record.begin == tensor.bytes and record.begin % TENSOR_ALIGNMENT == 0
    paddings = len(records) - len(tensors)
    allowed = 0
    for group in group_by_layer(tensors):
        assert min(by_name[tensor.name].begin for tensor in group) % LAYER_ALIGNMENT == 0
        # At most one per layer, and one more for each further tensor of a size that no alignment can hide.
        allowed += max(1, sum(1 for tensor in group if tensor.bytes % TENSOR_ALIGNMENT))
    assert paddings <= allowed
