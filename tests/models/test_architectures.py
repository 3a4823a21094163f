"""Every architecture of the list, the whole way: sample, packed, mapped as views, run beside `generate`.

In float64. Sequences join, leave, are cancelled and move between two engines in mid-answer; prompts are fed in chunks;
where the architecture has a window, the sequences are longer than it."""

from __future__ import annotations

import random
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from engine_support import ANSWER, Loaded, greedy, run, tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from actors.admission import EngineExaminer
from loaders import CheckpointError, open_checkpoint, pack_checkpoint
from models.architecture import choose_experts
from models.instance import load_model
from models.sample import ARCHITECTURES
from models.slot_cache import SlotLayer
from models.trial import check_configuration, try_engine

WINDOW = {"sliding_window": 20}
OVERRIDES = {"mistral": WINDOW, "gemma2": WINDOW, "gemma3": WINDOW}
OVERRIDES["qwen2"] = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}


@pytest.fixture(scope="module")
def packed(sample_directory, tmp_path_factory):
    """A function from architecture to its packed directory; the examiner lets each pass."""
    made = {}

    def pack(arch):
        if arch not in made:
            source = sample_directory(arch, **OVERRIDES.get(arch, {}))
            made[arch] = tmp_path_factory.mktemp("packed") / arch
            pack_checkpoint(source, made[arch], examiner=EngineExaminer(source))
        return made[arch]

    return pack


def run_with_moves(engines, prompts, seed):
    """Answers to `prompts`, which join at random steps and move between the engines in mid-answer; some leave."""
    rng = random.Random(seed)
    waiting = [greedy(str(index), prompt) for index, prompt in enumerate(prompts)]
    place, said, moves, steps = {}, {start.key: [] for start in waiting}, 0, 0
    while waiting or place:
        steps += 1
        assert steps < 3000
        engine = rng.choice(engines)
        if waiting and engine.active() < engine.slots and rng.random() < 0.5:
            place[waiting[-1].key] = engine
            engine.admit(waiting.pop())
        if engine.active() < engine.slots and rng.random() < 0.1:
            engine.admit(greedy(f"passer-by {steps}", tuple(range(8, 8 + rng.randint(1, 30)))))
        if place and rng.random() < 0.2:
            key = rng.choice(sorted(place))
            target = engines[0] if place[key] is engines[1] else engines[1]
            if target.active() < target.slots:
                assert place[key].cancel(key)
                target.admit(greedy(key, prompts[int(key)], tuple(said[key])))
                place[key] = target
                moves += 1
        for engine in engines:
            for event in engine.step():
                if event.key in said:
                    assert event.position == len(said[event.key])
                    said[event.key].append(event.token)
                    if event.end:
                        del place[event.key]
                elif rng.random() < 0.2 and not event.end:
                    engine.cancel(event.key)
    assert moves >= 2
    return [said[str(index)] for index in range(len(prompts))]


def without_windows(architecture):
    return replace(architecture, kinds=tuple(replace(kind, window=None) for kind in architecture.kinds))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_mapped_and_equal_to_generate(packed, arch, monkeypatch):
    directory = packed(arch)
    reference, found = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"] and not found["error_msgs"]
    assert all(key.startswith("__padding__.") for key in found["unexpected_keys"])
    with open_checkpoint(directory) as checkpoint:
        model = load_model(directory, checkpoint.tensors)
        begin, end = checkpoint.address_range
        for name, parameter in model.named_parameters():
            assert begin <= parameter.data_ptr() < end, name
        buffers = dict(reference.named_buffers())
        for name, buffer in model.named_buffers():
            assert not buffer.is_meta and torch.equal(buffer, buffers[name]), name
        choose_experts(reference)
        mapped, other = Loaded(model), Loaded(reference)
        long = [prompt for prompt in mapped.prompts(seed=8, count=40) if len(prompt) > 22][:2]
        prompts = [*long, (9,)]
        engines = [mapped.engine(max_slots=3, prefill_chunk=chunk) for chunk in (7, 16)]
        answers = run_with_moves(engines, prompts, seed=8)
        assert answers == [other.reference(prompt) for prompt in prompts]
        assert sum(len(set(answer)) for answer in answers[:2]) >= 20
        assert all(len(answer) == ANSWER for answer in answers)
        if arch in OVERRIDES:  # the windows count: without them the engine says something else
            monkeypatch.setattr(mapped, "architecture", without_windows(mapped.architecture))
            engine = mapped.engine()
            for index, prompt in enumerate(long):
                engine.admit(greedy(str(index), prompt))
            assert [tokens(found) for _, found in sorted(run(engine).items())] != answers[:2]


def config_of(kind, **more):
    small = {"pad_token_id": 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
    return CONFIG_MAPPING[kind](**small | more)


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("bloom", {}, "does not take position_ids"),
        ("mamba", {}, "does not take position_ids"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "attends in both directions"),
        (
            "olmo_hybrid",
            {"num_hidden_layers": 4},
            "layers of kind 'linear_attention', which keep more than keys and values",
        ),
        ("falcon", {"alibi": True}, "from their place in the batch"),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, "from their place in the batch"),
        ("moshi", {}, "made for images or sound"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_by_its_configuration(sample_directory, tmp_path, kind, more, says):
    source = shutil.copytree(sample_directory("llama", "float32"), tmp_path / "source")
    config_of(kind, **more).save_pretrained(source)
    with pytest.raises(CheckpointError, match=f"source: .*{says}") as caught:
        pack_checkpoint(source, tmp_path / "packed", examiner=EngineExaminer(source))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("falcon", {"multi_query": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
        ("gpt_bigcode", {"multi_query": True}),
        (
            "deepseek_v3",
            {
                "num_key_value_heads": 2,
                "kv_lora_rank": 12,
                "q_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 12,
                "head_dim": 8,
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
        ),
        (
            "gemma4_text",
            {
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "intermediate_size": 48,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 512,
            },
        ),
    ],
)
def test_caches_of_unusual_shapes_pass_the_trial(kind, more):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config_of(kind, **more), dtype=torch.float32).eval()
        check_configuration(model.config)
        try_engine(model)


def test_a_model_that_says_something_else_in_a_batch_is_refused(sample_directory, tmp_path, monkeypatch):
    source = sample_directory("llama", "float32")

    def forgetful(layer, keys, values, *arguments, **settings):
        seen = honest(layer, keys, values)
        return tuple(tensor * (layer.span.length < 5) for tensor in seen)

    honest = SlotLayer.update
    monkeypatch.setattr(SlotLayer, "update", forgetful)
    with pytest.raises(CheckpointError, match="says something else in continuous batching than alone"):
        pack_checkpoint(source, tmp_path / "packed", examiner=EngineExaminer(source))
    assert not (tmp_path / "packed").exists()
