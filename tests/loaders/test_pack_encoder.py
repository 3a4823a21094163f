"""Packing encoders: the module without its heads, and the files that say how a vector is made."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM

from loaders import CheckpointError, open_checkpoint, pack_checkpoint, read_manifest
from models.instance import load_instance, load_model
from models.sample_encoder import make_encoder_sample


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoder") / "source"
    make_encoder_sample(directory, parameters=400_000, seed=2, context=64)
    return directory


def test_an_encoder_is_packed_with_its_pooling_and_loaded_as_views(source, tmp_path):
    manifest = pack_checkpoint(source, tmp_path / "packed")
    assert (manifest.kind, manifest.architecture, manifest.kv_bytes_per_token) == ("encoder", "BertModel", 0)
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= manifest.files.keys()
    with open_checkpoint(tmp_path / "packed") as checkpoint:
        begin, end = checkpoint.address_range
        instance = load_instance(tmp_path / "packed", checkpoint.tensors, encoder=True, kv_bytes=1)
        model = load_model(tmp_path / "packed", checkpoint.tensors, encoder=True)
        assert all(begin <= parameter.data_ptr() < end for parameter in model.parameters())
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        inputs = instance.encode_inputs(["The harbour", "was quiet and the ships lay still"])
        packed = instance.engine.embedder.compute(inputs)
    plain = load_instance(source, None, encoder=True, kv_bytes=1).engine.embedder.compute(inputs)
    assert torch.equal(packed, plain)
    _, found = AutoModel.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"], found


def test_a_changed_pooling_is_found(source, tmp_path):
    pack_checkpoint(source, tmp_path / "packed")
    where = tmp_path / "packed" / "1_Pooling" / "config.json"
    where.write_text(where.read_text().replace("true", "false"))
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json.*not the one that was packed"):
        open_checkpoint(tmp_path / "packed")


def test_a_head_for_masked_words_is_left_out_and_its_missing_pooler_is_no_fault(source, tmp_path):
    directory = tmp_path / "masked"
    shutil.copytree(source, directory)
    base = AutoModel.from_pretrained(source)
    model = AutoModelForMaskedLM.from_config(base.config)
    assert isinstance(model, BertForMaskedLM)
    model.bert.load_state_dict(base.state_dict(), strict=False)
    model.save_pretrained(directory)
    manifest = pack_checkpoint(directory, tmp_path / "packed")
    assert (manifest.kind, manifest.architecture) == ("encoder", "BertModel")
    with open_checkpoint(tmp_path / "packed") as checkpoint:
        assert not [name for name in checkpoint.tensors if name.startswith(("cls.", "pooler.", "bert."))]
        instance = load_instance(tmp_path / "packed", checkpoint.tensors, encoder=True, kv_bytes=1)
        vectors = instance.engine.embedder.compute([[7, 8, 9]])
    plain = load_instance(source, None, encoder=True, kv_bytes=1).engine.embedder.compute([[7, 8, 9]])
    assert torch.equal(vectors, plain)


def test_weights_that_an_encoder_does_not_use_are_refused(source, tmp_path):
    directory = tmp_path / "more"
    shutil.copytree(source, directory)
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    save_file(state | {"encoder.layer.99.weight": torch.ones(3)}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.99\.weight"):
        pack_checkpoint(directory, tmp_path / "packed")


def test_a_decoder_without_its_head_counts_as_an_encoder(tmp_path):
    from models.sample import make_sample

    directory = tmp_path / "headless"
    make_sample(directory, arch="mistral", parameters=400_000, seed=1, context=64)
    model = AutoModel.from_pretrained(directory)
    model.save_pretrained(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["MistralModel"]
    assert pack_checkpoint(directory, tmp_path / "packed").kind == "encoder"


def test_manifests_of_decoders_stay_as_they_were(tmp_path):
    from packed_sample import pack_sample

    directory = pack_sample(tmp_path / "models", "plain", parameters=400_000)
    assert '"kind"' not in (directory / "longshore.json").read_text()
    assert read_manifest(directory).kind != "encoder"
