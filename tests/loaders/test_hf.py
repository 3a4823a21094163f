"""The drop-in for `from_pretrained`: the same model as transformers itself loads, without another copy."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from loaders import CheckpointError, Manifest
from loaders import direct as direct_module
from loaders.hf import finish_loading, from_pretrained
from loaders.plan import plan_load

Packed = Callable[[str], tuple[Path, Manifest]]
TOKENS = torch.tensor([[1, 5, 9, 40, 3]])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
def test_the_same_model_as_transformers_loads(
    name: str, plain: bool, packed: Packed, sources: Callable[[str], Path]
) -> None:
    directory = sources(name) if plain else packed(name)[0]
    expected = transformers.AutoModelForCausalLM.from_pretrained(sources(name)).eval()
    model = from_pretrained(directory)
    assert type(model) is type(expected) and model.dtype == expected.dtype and not model.training
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits)
    assert finish_loading(model).bytes > 0
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_parameters_are_the_bytes_that_were_read(packed: Packed) -> None:
    model = from_pretrained(packed("llama")[0])
    addresses = sorted(parameter.data_ptr() for parameter in model.parameters())
    spread = addresses[-1] - addresses[0]
    assert spread < 4 * sum(parameter.nbytes for parameter in model.parameters())
    assert all(address % 256 == 0 for address in addresses)


def test_other_classes_and_dtypes(packed: Packed) -> None:
    directory, _ = packed("llama")
    base = from_pretrained(directory, model_class=transformers.AutoModel, dtype=torch.float64)
    assert type(base) is transformers.LlamaModel and base.dtype == torch.float64
    assert from_pretrained(directory, torch_dtype=torch.float16).dtype == torch.float16


def test_what_does_not_fit_is_one_sentence(packed_copy: Path, packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no configuration"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="knows no"):
        from_pretrained(packed_copy, model_class=transformers.AutoModelForSeq2SeqLM)
    with pytest.raises(CheckpointError, match="no class of models"):
        from_pretrained(packed_copy, model_class=transformers.LlamaTokenizer)
    with pytest.raises(CheckpointError, match=r"'nonsense'"):
        from_pretrained(packed_copy, nonsense=1)
    with pytest.raises(CheckpointError, match="takes no device_map"):
        from_pretrained(packed_copy, device_map="auto")
    with pytest.raises(CheckpointError, match="cannot be moved to 'abacus'"):
        from_pretrained(packed_copy, device="abacus")
    config = packed_copy / "config.json"
    before = config.read_text()
    for old, new, says in (
        ('"hidden_size": 64', '"hidden_size": "x"', "no configuration that transformers knows: .*hidden_size"),
        ('"hidden_size": 64', '"hidden_size": 128', "other shapes than config.json asks for"),
        ('"Qwen3ForCausalLM"', '"pipeline"', "no class of models"),
        ("{", '{"quantization_config": {"quant_method": "fp8"},', "does not fit"),
    ):
        config.write_text(before.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=says) as caught:
            from_pretrained(packed_copy, verify=False)
        assert "\n" not in str(caught.value)
    config.write_text(before)
    (packed_copy / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: transformers cannot use it"):
        from_pretrained(packed_copy, verify=False)
    # The weights of one model under the configuration of another.
    shutil.copy(packed("llama")[0] / "config.json", tmp_path / "config.json")
    other = Path(shutil.copytree(packed("gpt2")[0], tmp_path / "other"))
    shutil.copy(tmp_path / "config.json", other / "config.json")
    with pytest.raises(CheckpointError, match=r"fits|packed"):
        from_pretrained(other)
    with pytest.raises(CheckpointError, match="fits"):
        from_pretrained(other, verify=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
def test_the_first_layers_compute_while_the_last_are_on_their_way(
    name: str, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = packed(name)
    expected = from_pretrained(directory)
    last = plan_load(directory).pieces[-1].offset
    gate, computed = threading.Event(), threading.Event()
    real = direct_module.read_some

    def read(descriptor: int, memory: memoryview, offset: int) -> int:
        if offset >= last:
            gate.wait(30)
        return real(descriptor, memory, offset)

    monkeypatch.setattr(direct_module, "read_some", read)
    model = from_pretrained(directory, wait=False)
    first = model.get_input_embeddings()
    first.register_forward_hook(lambda *_: computed.set())
    logits: list[torch.Tensor] = []

    def compute() -> None:
        with torch.inference_mode():
            logits.append(model(TOKENS).logits)

    thread = threading.Thread(target=compute)
    thread.start()
    assert computed.wait(30) and not gate.is_set() and not logits
    gate.set()
    thread.join(30)
    with torch.inference_mode():
        torch.testing.assert_close(logits[0], expected(TOKENS).logits)
        finish_loading(model)
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits)


def test_a_load_that_fails_meanwhile_ends_the_forward_pass(packed_copy: Path) -> None:
    path = packed_copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-20_000] ^= 1
    path.write_bytes(content)
    model = from_pretrained(packed_copy, wait=False)
    with torch.inference_mode(), pytest.raises(CheckpointError, match="damaged"):
        model(TOKENS)
    with pytest.raises(CheckpointError, match="damaged"):
        finish_loading(model)
