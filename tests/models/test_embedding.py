"""Embeddings: the vectors of plain transformers, alone and padded, beside decoding, and continued elsewhere."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from engine_support import greedy, run, tokens
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from models.contract import AdmissionRefused, Sampling, SequenceStart
from models.embedding import Embedder
from models.errors import ModelError
from models.instance import load_instance
from models.pooling import Pooling, read_pooling
from models.sample_encoder import POOLINGS, make_encoder_sample

BUDGET = {"kv_bytes": 2**28}
TEXTS = ["The harbour was quiet.", "A", "Ships come in at dawn, and leave " * 6, "", "the tide"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A function from architecture, dtype and pooling to the directory of a sample encoder."""
    made = {}

    def make(arch="bert", dtype="float64", pooling="mean", normalize=True):
        key = (arch, dtype, pooling, normalize)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(arch) / "sample"
            make_encoder_sample(
                made[key],
                arch=arch,
                parameters=400_000,
                seed=3,
                dtype=dtype,
                context=128,
                pooling=pooling,
                normalize=normalize,
            )
        return made[key]

    return make


def pooled(hidden, mode):
    """Hidden states [tokens, width] of one text, without padding, to its vector; written out once more, plainly."""
    n = len(hidden)
    weights = torch.arange(1, n + 1, dtype=hidden.dtype)[:, None]
    return {
        "cls": hidden[0],
        "lasttoken": hidden[-1],
        "max": hidden.max(0).values,
        "mean": hidden.sum(0) / n,
        "mean_sqrt_len_tokens": hidden.sum(0) / n**0.5,
        "weightedmean": (hidden * weights).sum(0) / weights.sum(),
    }[mode]


def embed(engine, inputs, key="e", generated=()):
    engine.admit(SequenceStart(key, (), generated, Sampling(len(inputs)), inputs=tuple(map(tuple, inputs))))
    return run(engine)[key]


def rows(events):
    return torch.tensor([list(memoryview(v).cast("f")) for event in events for v in event.vectors])


@pytest.mark.parametrize("arch", ["bert", "roberta"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_an_encoder_gives_what_plain_transformers_give_padded_or_not(encoder, arch, mode):
    directory = encoder(arch, pooling=mode, normalize=mode == "mean")
    model = AutoModel.from_pretrained(directory, dtype="auto").eval()
    instance = load_instance(directory, dict(model.state_dict()), encoder=True, **BUDGET)
    inputs = instance.encode_inputs(TEXTS)
    assert len(set(map(len, inputs))) > 3
    expected = []
    with torch.no_grad():
        for one in inputs:
            vector = pooled(model(torch.tensor([one])).last_hidden_state[0], mode)
            expected.append(vector / vector.norm() if mode == "mean" else vector)
    expected = torch.stack(expected)
    together = instance.engine.embedder.compute(inputs)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows(embed(instance.engine, inputs)), expected.float())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "mistral"])
def test_a_decoder_gives_its_last_hidden_state_beside_its_answers(sample_directory, arch):
    directory = sample_directory(arch)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    instance = load_instance(directory, None, max_slots=4, **BUDGET)
    rng = random.Random(2)
    inputs = [[rng.randrange(8, 500) for _ in range(n)] for n in (1, 7, 60, 30, 2)]
    prompt = tuple(rng.randrange(8, 500) for _ in range(9))
    alone = load_instance(directory, None, max_slots=4, **BUDGET)
    alone.engine.admit(greedy("g", prompt))
    instance.engine.admit(greedy("g", prompt))
    events = {"g": [], "e": []}
    start = SequenceStart("e", (), (), Sampling(len(inputs)), inputs=tuple(map(tuple, inputs)))
    for step in range(200):
        if step == 3:
            instance.engine.admit(start)
            assert instance.engine.active() == 2
        for event in instance.engine.step():
            events[event.key].append(event)
    assert tokens(events["g"]) == tokens(run(alone.engine)["g"])
    with torch.no_grad():
        expected = [model(torch.tensor([one]), output_hidden_states=True).hidden_states[-1][0, -1] for one in inputs]
    torch.testing.assert_close(instance.engine.embedder.compute(inputs), torch.stack(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows(events["e"]), torch.stack(expected).float())


def test_float32_is_close_to_plain_transformers(encoder):
    directory = encoder(dtype="float32")
    model = AutoModel.from_pretrained(directory, dtype="auto").eval()
    instance = load_instance(directory, None, encoder=True, **BUDGET)
    inputs = instance.encode_inputs(TEXTS)
    with torch.no_grad():
        vectors = torch.stack([model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in inputs])
    torch.testing.assert_close(
        rows(embed(instance.engine, inputs)), torch.nn.functional.normalize(vectors), rtol=1e-4, atol=1e-5
    )


def test_many_inputs_come_in_order_in_parts_and_are_continued_from_any_of_them(encoder, monkeypatch):
    monkeypatch.setattr("models.embedding.STEP_TOKENS", 100)
    instance = load_instance(encoder(), None, encoder=True, **BUDGET)
    rng = random.Random(5)
    inputs = [[rng.randrange(8, 500) for _ in range(rng.randint(1, 60))] for _ in range(40)]
    events = embed(instance.engine, inputs)
    assert len(events) > 5
    assert [event.position for event in events] == [sum(len(e.counts) for e in events[:i]) for i in range(len(events))]
    assert [count for event in events for count in event.counts] == list(map(len, inputs))
    assert [event.done for event in events] == [False] * (len(events) - 1) + [True]
    for cut in (1, 17, 39):
        rest = embed(instance.engine, inputs, generated=tuple(map(len, inputs[:cut])))
        assert rest[0].position == cut
        torch.testing.assert_close(rows(rest), rows(events)[cut:])
    over = embed(instance.engine, inputs, generated=tuple(map(len, inputs)))
    assert [(event.position, event.vectors, event.done) for event in over] == [(40, (), True)]


def test_those_that_wait_take_turns_and_leave_when_cancelled(encoder, monkeypatch):
    monkeypatch.setattr("models.embedding.STEP_TOKENS", 10)
    engine = load_instance(encoder(), None, encoder=True, max_slots=3, **BUDGET).engine
    inputs = tuple((5 + i, 6, 7, 8, 9) for i in range(8))
    for key in ("long", "gone", "short"):
        some = inputs[:1] if key == "short" else inputs
        engine.admit(SequenceStart(key, (), (), Sampling(len(some)), inputs=some))
    with pytest.raises(AdmissionRefused, match="All 3 slots"):
        engine.admit(SequenceStart("fourth", (), (), Sampling(1), inputs=inputs[:1]))
    assert engine.cancel("gone") and not engine.cancel("gone")
    first, second = engine.step(), engine.step()
    assert [event.key for event in first] == ["long"]
    assert [event.key for event in second] == ["short", "long"]
    assert engine.active() == 1


def test_what_an_engine_does_not_embed_is_refused_in_a_sentence(encoder):
    engine = load_instance(encoder(), None, encoder=True, **BUDGET).engine
    for inputs, sentence in [
        (((5,) * 129,), "Input 0 has 129 tokens and the context holds 128"),
        (((5,), ()), "Input 1 has no tokens"),
        (((5, 700_000),), "Token id 700000 of input 0"),
    ]:
        with pytest.raises(AdmissionRefused, match=sentence):
            engine.admit(SequenceStart("e", (), (), Sampling(1), inputs=inputs))
    with pytest.raises(AdmissionRefused, match="makes embeddings and no text"):
        engine.admit(greedy("g", (5, 6)))
    assert engine.active() == 0


def test_the_context_is_what_the_strictest_file_says(encoder, tmp_path):
    directory = tmp_path / "short"
    shutil.copytree(encoder("roberta"), directory)
    assert load_instance(directory, None, encoder=True, **BUDGET).engine.context == 128
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    engine = load_instance(directory, None, encoder=True, **BUDGET).engine
    with pytest.raises(AdmissionRefused, match="context holds 20"):
        engine.admit(SequenceStart("e", (), (), Sampling(1), inputs=((5,) * 21,)))


def test_without_modules_the_default_follows_from_the_model(encoder):
    directory = encoder(pooling=None)
    config = AutoModel.from_pretrained(directory).config
    assert read_pooling(directory, config, encoder=True) == Pooling(("mean",))
    assert read_pooling(directory, config, encoder=False) == Pooling(("lasttoken",))
    config.classifier_pooling = "cls"
    assert read_pooling(directory, config, encoder=True) == Pooling(("cls",))


def test_several_poolings_stand_behind_each_other_in_their_order(encoder, tmp_path):
    directory = tmp_path / "both"
    shutil.copytree(encoder(), directory)
    said = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(said))
    pooling = read_pooling(directory, None, encoder=True)
    assert (pooling.modes, pooling.normalize) == (("cls", "mean"), True)
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert read_pooling(directory, None, encoder=True).modes == ("lasttoken",)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("modules.json", "{}", "not a list of modules"),
        ("modules.json", "[", "not valid JSON"),
        ("modules.json", '[{"type": "x.Transformer", "path": ""}]', "names no Pooling"),
        ("modules.json", '[{"type": "x.Transformer", "path": "0_T"}]', "must lie beside it"),
        ("modules.json", '[{"type": "x.Dense", "path": "2_Dense"}]', "kind 'Dense', which is not supported"),
        ("modules.json", '[{"type": "x.Pooling", "path": "../1"}]', "no plain folder"),
        ("1_Pooling/config.json", '{"pooling_mode": "attention"}', "pooling of kind 'attention'"),
        ("1_Pooling/config.json", '{"pooling_mode_cls_token": false}', "pooling of kind none"),
        ("1_Pooling/config.json", "[]", "missing or not an object"),
    ],
)
def test_a_pooling_that_cannot_be_computed_is_refused(encoder, tmp_path, name, content, sentence):
    directory = tmp_path / "broken"
    shutil.copytree(encoder(), directory)
    (directory / name).write_text(content)
    with pytest.raises(ModelError, match=sentence):
        read_pooling(directory, None, encoder=True)


def test_padding_is_no_part_of_any_pooling():
    hidden = torch.randn(2, 5, 4, dtype=torch.float64)
    hidden[1, 3:] = 1e9
    for mode in POOLINGS:
        both = Pooling((mode,))(hidden, torch.tensor([5, 3]))
        torch.testing.assert_close(both[1], pooled(hidden[1, :3], mode))


def test_the_tokenizer_puts_its_special_tokens_around_inputs(encoder):
    directory = encoder()
    instance = load_instance(directory, None, encoder=True, **BUDGET)
    assert instance.encode_inputs(["quiet"]) == AutoTokenizer.from_pretrained(directory)(["quiet"])["input_ids"]
    assert isinstance(instance.engine.embedder, Embedder)


def test_a_text_that_is_far_too_long_is_not_tokenized_whole(sample_directory, encoder):
    decoder = load_instance(sample_directory("llama"), None, context=64, **BUDGET)
    longest = []
    tokenizer = decoder.tokenizer
    decoder.tokenizer = lambda text, **how: longest.append(len(text)) or tokenizer(text, **how)
    with pytest.raises(ModelError, match="more than 128 tokens, the context of sample is 64"):
        decoder.encode_prompt("The harbour was quiet. " * 100_000)
    assert max(longest) <= 64 * 16
    assert len(decoder.encode_prompt("The harbour " * 40)) > 64, "what is not far too long is counted"
    instance = load_instance(encoder(), None, encoder=True, **BUDGET)
    with pytest.raises(ModelError, match="more than 256 tokens"):
        instance.encode_inputs(["short", "The harbour was quiet. " * 1000])
