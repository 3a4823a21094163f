"""Packed models under the worker's real machinery: vectors of an encoder, and of a decoder beside its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_sample import pack_sample
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from actors.admission import EngineExaminer
from actors.local_runtime import LocalRuntime
from actors.local_storage import LocalStorage
from bus.embeddings import numbers
from bus.messages import Generation, encode
from loaders import CheckpointError, pack_checkpoint, read_manifest
from models.contract import SequenceStart, VectorEvent
from models.sample_encoder import make_encoder_sample

TEXTS = ("The harbour was quiet.", "A", "Ships come in at dawn and leave with the tide, and nobody counts them.")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("embeddings") / "models"
    pack_sample(directory, "llama", parameters=400_000)
    source = directory.parent / "bert"
    make_encoder_sample(source, parameters=400_000, context=64)
    pack_checkpoint(source, directory / "bert", examiner=EngineExaminer(source))
    return directory


async def embed(models: Path, model: str, inputs: tuple[Any, ...]) -> torch.Tensor:
    runtime = LocalRuntime(models)
    digest = read_manifest(models / model).digest
    engine = await runtime.attach(model, digest, slots=2, kv_bytes=1 << 26, context=64)
    encoded = await runtime.encode(model, Generation(len(inputs), inputs=inputs))
    engine.admit(SequenceStart("e", (), (), encoded.sampling, encoded.inputs))
    vectors: list[bytes] = []
    while engine.active():
        for result in await runtime.step([(model, engine)]):
            assert not result.error
            for event in result.events:
                assert isinstance(event, VectorEvent)
                vectors += event.vectors
    await runtime.reset()
    runtime.close()
    return torch.tensor([numbers(vector) for vector in vectors])


async def test_a_packed_encoder_makes_the_vectors_of_transformers(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    model = AutoModel.from_pretrained(models / "bert").eval()
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][:, :, None].float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(await embed(models, "bert", TEXTS), expected, rtol=1e-4, atol=1e-5)
    tokens = tuple(tokenizer(TEXTS[2])["input_ids"])
    torch.testing.assert_close(await embed(models, "bert", (tokens, "A")), expected[[2, 1]], rtol=1e-4, atol=1e-5)


async def test_a_packed_decoder_makes_those_of_its_last_token(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    model = AutoModelForCausalLM.from_pretrained(models / "llama").eval()
    with torch.no_grad():
        expected = torch.stack(
            [
                model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0, -1]
                for text in TEXTS
            ]
        )
    torch.testing.assert_close(await embed(models, "llama", TEXTS), expected, rtol=1e-4, atol=1e-5)


async def test_cards_tell_encoders_from_decoders(models: Path) -> None:
    storage = LocalStorage(models)
    assert (await storage.find("bert")).card.kind == "encoder"
    card = (await storage.find("llama")).card
    assert card.kind == "decoder" and b'"kind"' not in encode(card), "as cards were before there were encoders"


def test_what_cannot_be_pooled_is_refused_before_it_is_packed(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    make_encoder_sample(source, parameters=400_000, context=64)
    modules = json.loads((source / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="'Dense', which is not supported"):
        pack_checkpoint(source, tmp_path / "packed", examiner=EngineExaminer(source))
    assert not (tmp_path / "packed").exists()
