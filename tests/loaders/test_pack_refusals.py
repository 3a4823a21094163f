"""Each thing that can be wrong with a source or a destination: one sentence that names it, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loaders import CheckpointError, Manifest, pack_checkpoint, verify_checkpoint


def edit_json(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def without_directory(source: Path) -> None:
    shutil.rmtree(source)


def a_file(source: Path) -> None:
    shutil.rmtree(source)
    source.write_text("x")


def without_config(source: Path) -> None:
    (source / "config.json").unlink()


def broken_config(source: Path) -> None:
    (source / "config.json").write_text('{"model_type":')


def config_of_megabytes(source: Path) -> None:
    (source / "config.json").write_text(" " * (17 << 20) + "{}")


def without_weights(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()


def weights_of_another_kind(source: Path) -> None:
    without_weights(source)
    (source / "model.gguf").write_bytes(b"x")


def truncated_shard(source: Path) -> None:
    path = sorted(source.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])


def empty_shard(source: Path) -> None:
    sorted(source.glob("model-*.safetensors"))[0].write_bytes(b"")


def missing_shard(source: Path) -> None:
    sorted(source.glob("model-*.safetensors"))[1].unlink()


def index_with_a_path(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = "../../etc/passwd"
    index.write_text(json.dumps(document))


def index_without_map(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')


def index_that_promises_too_much(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.extra"] = next(iter(document["weight_map"].values()))
    index.write_text(json.dumps(document))


def unknown_model_type(source: Path) -> None:
    edit_json(source / "config.json", model_type="gryphon")


def without_model_type(source: Path) -> None:
    edit_json(source / "config.json", model_type=None)


def unknown_architecture(source: Path) -> None:
    edit_json(source / "config.json", architectures=["GryphonForCausalLM"])


def remote_code(source: Path) -> None:
    edit_json(source / "config.json", model_type="gryphon", auto_map={"AutoModelForCausalLM": "x.Y"})


def encoder_decoder(source: Path) -> None:
    transformers.T5Config().save_pretrained(source)


def quantised(source: Path) -> None:
    edit_json(source / "config.json", quantization_config={"quant_method": "fp8"})


def impossible_config(source: Path) -> None:
    edit_json(source / "config.json", hidden_size="wide")


def other_shapes(source: Path) -> None:
    edit_json(source / "config.json", intermediate_size=256)


def fewer_layers(source: Path) -> None:
    edit_json(source / "config.json", num_hidden_layers=2)


def more_layers(source: Path) -> None:
    edit_json(source / "config.json", num_hidden_layers=4)


def without_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def broken_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").write_text('{"version":')


def eight_bit_weights(source: Path) -> None:
    for path in source.glob("model-*.safetensors"):
        save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)


def lying_shard(source: Path) -> None:
    path = sorted(source.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_directory, "there is no directory"),
        (a_file, "not a directory but a file"),
        (without_config, r"has no config\.json"),
        (broken_config, r"config\.json is not valid JSON"),
        (config_of_megabytes, r"config\.json has \d+ bytes, more than"),
        (without_weights, "has no weights"),
        (weights_of_another_kind, r"model\.gguf' is not read"),
        (truncated_shard, r"model-00002-of-\d+\.safetensors is truncated"),
        (empty_shard, "has 0 bytes"),
        (missing_shard, "lacks the shard 'model-00002"),
        (index_with_a_path, "not a plain file name"),
        (index_without_map, "no weight_map"),
        (index_that_promises_too_much, r"lacks 'model\.extra'"),
        (unknown_model_type, "does not know the model type 'gryphon'"),
        (without_model_type, "names no model_type"),
        (unknown_architecture, "does not know the architecture 'GryphonForCausalLM'"),
        (remote_code, "such code is not run"),
        (encoder_decoder, "'t5' is not a decoder-only"),
        (quantised, "is quantised; it can be packed as it is stored"),
        (impossible_config, r"config\.json: transformers cannot use it: .*hidden_size"),
        (other_shapes, r"the shape of .*mlp.* is not the one"),
        (fewer_layers, r"hold 'model\.layers\.2\..* and 6 more, which the model does not use"),
        (more_layers, r"lack 'model\.layers\.3\..* and 6 more, which the model needs"),
        (without_tokenizer, "has no tokenizer"),
        (broken_tokenizer, "its tokenizer cannot be used"),
        (eight_bit_weights, "stored as F8_E4M3"),
        (lying_shard, "tensor .* needs .* bytes"),
    ],
)
def test_a_spoiled_source_is_refused_in_one_sentence(
    spoil: Callable[[Path], None], says: str, llama_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(llama_copy)
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=says) as caught:
        pack_checkpoint(llama_copy, tmp_path / "out")
    assert "\n" not in str(caught.value) and "spoiled" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"spoiled"}
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_packing_says_nothing_and_tells_its_progress(
    llama_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int]] = []
    manifest = pack_checkpoint(llama_copy, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
    assert seen == sorted(seen) and seen[-1] == (manifest.bytes, manifest.bytes)


def test_a_model_larger_than_memory_is_refused(
    llama_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.conversion.available_memory_bytes", lambda: 1000)
    with pytest.raises(CheckpointError, match=r"only 0\.0 GB of memory are free"):
        pack_checkpoint(llama_copy, tmp_path / "out")


@pytest.mark.parametrize("chunk_bytes", [0, -4096, 1000, 2 << 30])
def test_an_impossible_chunk_size_is_refused(chunk_bytes: int, llama_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chunk"):
        pack_checkpoint(llama_copy, tmp_path / "out", chunk_bytes=chunk_bytes)


def test_destinations_that_would_destroy_something_are_refused(llama_copy: Path, tmp_path: Path) -> None:
    def refused(destination: Path, says: str) -> None:
        with pytest.raises(CheckpointError, match=says):
            pack_checkpoint(llama_copy, destination)

    refused(llama_copy, "is or contains the source")
    refused(tmp_path, "is or contains the source")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a directory")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    refused(tmp_path / "home", "no packed checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    refused(tmp_path / "link", "symbolic link")
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_empty_or_missing_destination_is_made(
    llama_copy: Path, tmp_path: Path, packed: Callable[[str], tuple[Path, Manifest]]
) -> None:
    (tmp_path / "empty").mkdir()
    for destination in (tmp_path / "empty", tmp_path / "not" / "yet" / "there"):
        pack_checkpoint(llama_copy, destination)
        verify_checkpoint(destination)
