"""Loading: parameters are the tensors that were given, buffers are what the architecture computes, errors say what."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from engine_support import greedy, run, tokens
from transformers import AutoModelForCausalLM

from models.contract import Sampling, SequenceStart
from models.errors import ModelError
from models.instance import load_instance, load_model, prepare
from models.sample import ARCHITECTURES

BUDGET = {"kv_bytes": 2**28}


def state_of(directory):
    """What `loaders` gives: the module's own state by name, tied names once."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    seen, state = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return model, state


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_views_become_the_parameters_and_buffers_are_rebuilt(sample_directory, arch):
    directory = sample_directory(arch, "float32")
    reference, state = state_of(directory)
    model = load_model(directory, state)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == state[name].data_ptr()
        assert not parameter.requires_grad
    buffers = dict(model.named_buffers())
    assert sorted(buffers) == sorted(dict(reference.named_buffers()))
    for name, buffer in reference.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)
    prompt = torch.arange(20, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(prompt).logits, reference.eval()(prompt).logits)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
    ],
)
def test_scaled_rotary_frequencies_are_rebuilt(sample_directory, rope):
    rope = rope | {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
    directory = sample_directory("llama", "float32", rope_parameters=rope)
    reference, state = state_of(directory)
    model = load_model(directory, state)
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.attention_scaling == reference.model.rotary_emb.attention_scaling


def test_frequencies_that_change_with_the_batch_bound_the_context(sample_directory):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    directory = sample_directory("llama", "float32", rope_parameters=rope)
    assert load_instance(directory, None, **BUDGET).engine.context == 64
    with pytest.raises(ModelError, match="2 to 64"):
        load_instance(directory, None, context=128, **BUDGET)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral"])
def test_an_instance_of_views_answers_as_one_read_from_the_directory(sample_directory, arch):
    directory = sample_directory(arch)
    _, state = state_of(directory)
    answers = []
    for tensors in (state, None):
        engine = load_instance(directory, tensors, **BUDGET).engine
        engine.admit(greedy("a", tuple(range(20, 40))))
        answers.append(tokens(run(engine)["a"]))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral", "gpt2"])
def test_what_was_prepared_is_filled_with_another_mapping(sample_directory, arch):
    """The same answer as from the first tensors, to which nothing refers any more."""
    directory = sample_directory(arch)
    _, state = state_of(directory)
    prepared = prepare(directory, state)
    prepared.skeleton.empty()
    assert all(parameter.is_meta for parameter in prepared.model.parameters())
    again = {name: tensor.clone() for name, tensor in state.items()}
    answers = []
    for instance in (
        load_instance(directory, state, **BUDGET),
        load_instance(directory, again, prepared=prepared, **BUDGET),
    ):
        instance.engine.admit(greedy("a", tuple(range(20, 40))))
        answers.append(tokens(run(instance.engine)["a"]))
    assert answers[0] == answers[1]
    addresses = {tensor.data_ptr() for tensor in again.values()}
    assert {parameter.data_ptr() for parameter in prepared.model.parameters()} <= addresses
    model = load_model(directory, state)
    assert len(list(model.parameters())) == len(list(prepared.model.parameters())), "tied ones are one parameter"


def test_tied_embeddings_share_memory(sample_directory):
    _, state = state_of(sample_directory("qwen3", "float32"))
    assert "lm_head.weight" not in state
    model = load_model(sample_directory("qwen3", "float32"), state)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    swapped = {name: tensor for name, tensor in state.items() if name != "model.embed_tokens.weight"}
    swapped["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = load_model(sample_directory("qwen3", "float32"), swapped)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_missing_unexpected_and_misshapen_tensors_are_named(sample_directory):
    directory = sample_directory("llama", "float32")
    _, state = state_of(directory)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=f"LlamaForCausalLM lacks {name}: the checkpoint is incomplete"):
        load_model(directory, {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ModelError, match=r"has no place for model\.extra"):
        load_model(directory, state | {"model.extra": torch.zeros(3)})
    with pytest.raises(ModelError, match=f"expects other shapes of {name}"):
        load_model(directory, state | {name: torch.zeros(3, 3)})
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(directory, {})
    _, tied = state_of(sample_directory("qwen3", "float32"))
    del tied["model.embed_tokens.weight"]
    with pytest.raises(ModelError, match=r"lacks .*embed_tokens"):
        load_model(sample_directory("qwen3", "float32"), tied)


def test_dtype_converts_and_nonsense_is_refused(sample_directory):
    directory = sample_directory("llama", "float32")
    _, state = state_of(directory)
    assert load_model(directory, state, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="'int8' is not a number type"):
        load_model(directory, state, dtype="int8")


def test_bfloat16_answers(sample_directory):
    instance = load_instance(sample_directory("llama", "float32"), None, dtype="bfloat16", **BUDGET)
    instance.engine.admit(greedy("a", tuple(range(20, 40))))
    assert len(tokens(run(instance.engine)["a"])) == 32


def test_context_and_budget(sample_directory):
    directory = sample_directory("llama", "float32")
    assert load_instance(directory, None, **BUDGET).engine.context == 256
    assert load_instance(directory, None, context=64, **BUDGET).engine.context == 64
    with pytest.raises(ModelError, match="context asked for is 257"):
        load_instance(directory, None, context=257, **BUDGET)
    with pytest.raises(ModelError, match="KV budget"):
        load_instance(directory, None, kv_bytes=1000)


def test_prompts_chats_and_defaults(sample_directory):
    instance = load_instance(sample_directory("llama", "float32"), None, **BUDGET)
    tokenizer = instance.tokenizer
    assert tokenizer.decode(instance.encode_prompt("The harbour wakes")) == "The harbour wakes"
    chat = instance.encode_chat([{"role": "user", "content": "Whose turn is it?"}])
    assert tokenizer.decode(chat) == "<|user|>Whose turn is it?<|end|><|assistant|>"
    assert chat[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    sampling = instance.defaults.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.95, 50)
    assert instance.defaults.eos == (tokenizer.eos_token_id,)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template: send a plain prompt"):
        instance.encode_chat([{"role": "user", "content": "x"}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match="roles must alternate"):
        instance.encode_chat([{"role": "user", "content": "x"}])
    instance.close()


def test_defaults_are_greedy_without_do_sample(sample_directory, tmp_path):
    directory = shutil.copytree(sample_directory("llama", "float32"), tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.7}))
    defaults = load_instance(directory, None, **BUDGET).defaults
    assert defaults.sampling.temperature == 0.0
    assert defaults.eos == (0, 5)
    (directory / "generation_config.json").unlink()
    assert load_instance(directory, None, **BUDGET).defaults.eos == (0,)


@pytest.mark.parametrize("stop", [(), ("e", "the h")])
def test_text_goes_on_elsewhere_as_if_nothing_had_happened(sample_directory, stop):
    instance = load_instance(sample_directory("llama"), None, max_slots=4, **BUDGET)
    rng = random.Random(4)
    broken = 0
    for seed in range(3):
        sampling = Sampling(max_tokens=32, temperature=3.0, seed=seed, stop=stop)
        prompt = tuple(instance.encode_prompt("A ship nears the coast 雪")[: -1 - seed % 2])
        instance.engine.admit(SequenceStart("whole", prompt, (), sampling))
        whole = run(instance.engine)["whole"]
        generated = [event.token for event in whole]
        if not stop:
            text = instance.tokenizer.decode([*prompt, *generated], skip_special_tokens=True)
            seen = instance.tokenizer.decode(prompt, skip_special_tokens=True)
            assert seen.rstrip("\ufffd") + "".join(event.text for event in whole) == text
        broken += sum(not event.text for event in whole)
        for _ in range(3):
            cut = rng.randrange(len(whole))
            instance.engine.admit(SequenceStart("rest", prompt, tuple(generated[:cut]), sampling))
            rest = run(instance.engine)["rest"]
            assert [(e.position, e.token, e.text, e.end) for e in rest] == [
                (e.position, e.token, e.text, e.end) for e in whole[cut:]
            ]
    assert broken > 3  # half characters were held back


def test_directories_that_are_no_models(sample_directory, tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_instance(tmp_path, None, **BUDGET)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not a model configuration"):
        load_instance(tmp_path, None, **BUDGET)
    (tmp_path / "config.json").write_text('{"model_type": "zeppelin"}')
    with pytest.raises(ModelError, match="does not know the architecture 'zeppelin'"):
        load_instance(tmp_path, None, **BUDGET)
    directory = shutil.copytree(sample_directory("llama", "float32"), tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"weights of .* cannot be read"):
        load_instance(directory, None, **BUDGET)
    weights.unlink()
    with pytest.raises(ModelError, match=r"weights of .* cannot be read"):
        load_instance(directory, None, **BUDGET)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_architectures_that_cannot_be_batched_are_refused(sample_directory, tmp_path, kind):
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](hidden_size=32, num_hidden_layers=1, vocab_size=512, num_attention_heads=2)
    directory = shutil.copytree(sample_directory("llama", "float32"), tmp_path / "model")
    (directory / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    with pytest.raises(ModelError, match="choose another model"):
        load_instance(directory, None, **BUDGET)


def test_importing_models_is_light():
    import subprocess
    import sys

    code = "import models, models.contract, models.stub, models.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
