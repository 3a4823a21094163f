"""What a step may cost: one chunk of prompt, no copy of the cache, memory within the budget."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from engine_support import Loaded, greedy, run, tokens

from models.architecture import describe
from models.contract import Sampling, SequenceStart
from models.errors import ModelError
from models.slot_cache import SlotCache, bytes_per_token


@pytest.fixture(scope="module")
def loaded(sample_directory):
    return Loaded(sample_directory("llama"))


@pytest.fixture
def fed(loaded, monkeypatch):
    """Shapes [rows, tokens] of every forward pass."""
    shapes = []
    forward = loaded.model.forward

    @functools.wraps(forward)  # the engine looks at the signature
    def counting(*args, input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", counting)
    return shapes


def test_a_long_prompt_lengthens_no_step_by_more_than_one_chunk(loaded, fed):
    engine = loaded.engine(max_slots=6, prefill_chunk=24)
    decoding = 0
    for index, prompt in enumerate(loaded.prompts(seed=1, count=3, longest=20)):
        engine.admit(SequenceStart(f"short-{index}", prompt, (), Sampling(max_tokens=60)))
    while engine.active() == 3 and decoding < 3:
        decoding = max(decoding, len(engine.step()))
    engine.admit(greedy("long", tuple(range(20, 220))))
    engine.admit(greedy("middle", tuple(range(20, 90))))
    engine.admit(greedy("other", tuple(range(30, 41))))
    spoke = 0
    while engine.active():
        fed.clear()
        before = engine._decoding
        events = engine.step()
        passes = [rows * width for rows, width in fed]
        assert sum(passes) <= 24 + before
        assert len(fed) <= 2
        spoke += {event.key for event in events} >= {"short-0", "short-1", "short-2"}
    assert spoke >= 8  # all the while, the short ones said a token in every step


def test_a_burst_of_short_prompts_shares_a_chunk(loaded, fed):
    engine = loaded.engine(max_slots=8, prefill_chunk=64)
    prompts = [tuple(range(20 + index, 27 + index + index % 3)) for index in range(8)]
    for index, prompt in enumerate(prompts):
        engine.admit(greedy(str(index), prompt))
    fed.clear()
    steps = 0
    first = set()
    while len(first) < 8:
        steps += 1
        first |= {event.key for event in engine.step()}
    assert steps == 2
    events = run(engine)
    assert len(events) == 8


def computed(engine):
    """How many tokens of each row every pass from now on computes; padding is none."""
    passes = []
    forward = engine._forward

    def counting(rows, counts):
        passes.append(sum(counts))
        return forward(rows, counts)

    engine._forward = counting
    return passes


@pytest.mark.parametrize("chunk", [4, 16, 64])
@pytest.mark.parametrize("groups", ["aaaaa", "abab", "aabb", "cacac"])
def test_a_common_beginning_is_computed_once_however_many_have_it(loaded, groups, chunk):
    """`c` has nothing in common with anybody, and so little to compute that others come along with it."""
    engine = loaded.engine(max_slots=6, prefill_chunk=chunk)
    passes = computed(engine)
    beginnings = {"a": tuple(range(20, 80)), "b": tuple(range(30, 90))}
    prompts = [(*beginnings.get(group, ()), 200 + index, 210, 220 + index) for index, group in enumerate(groups)]
    for index, prompt in enumerate(prompts):
        engine.admit(SequenceStart(str(index), prompt, (), Sampling(max_tokens=4), held=True))
    while engine.busy():
        engine.step()
    assert sum(passes) == 60 * len({*groups} & {*beginnings}) + 3 * len(groups)
    for index in range(len(prompts)):
        engine.release(str(index))
    events = run(engine)
    assert [tokens(events[str(index)]) for index in range(len(prompts))] == [
        loaded.reference(prompt)[:4] for prompt in prompts
    ]


def test_those_that_follow_take_a_beginning_from_one_that_is_extended_all_the_time(loaded):
    engine = loaded.engine(max_slots=6, prefill_chunk=16)
    passes = computed(engine)
    beginning = tuple(range(20, 80))
    for index in range(4):
        engine.admit(SequenceStart(str(index), (*beginning, 200 + index), (), Sampling(max_tokens=40), held=True))
    extended = 0
    while any(engine.left(str(index)) for index in range(1, 4)):
        engine.extend("0", [300 + extended])
        extended += 1
        engine.step()
    assert sum(passes) == 60 + 4 + extended


def test_while_nobody_decodes_several_chunks_go_into_a_step(loaded, fed):
    engine = loaded.engine(max_slots=3, prefill_chunk=16, idle_chunks=4)
    engine.admit(greedy("first", tuple(range(20, 80))))
    assert [event.key for event in engine.step()] == ["first"]
    engine.admit(greedy("second", tuple(range(30, 90))))
    fed.clear()
    assert [event.key for event in engine.step()] == ["first"]
    assert fed == [(1, 1), (1, 16)]  # now somebody waits for a token
    assert tokens(run(engine)["second"]) == loaded.reference(tuple(range(30, 90)))


def test_rows_of_one_chunk_answer_as_they_do_alone(loaded):
    engine = loaded.engine(max_slots=8, prefill_chunk=64)
    prompts = loaded.prompts(seed=12, count=8, longest=24)
    for index, prompt in enumerate(prompts):
        engine.admit(greedy(str(index), prompt))
    events = run(engine)
    assert [tokens(events[str(index)]) for index in range(8)] == [loaded.reference(prompt) for prompt in prompts]


def test_the_oldest_prompt_is_not_slowed_by_those_that_come_along(loaded, fed):
    engine = loaded.engine(max_slots=3, prefill_chunk=64)
    engine.admit(greedy("old", tuple(range(20, 80))))
    engine.admit(greedy("young", tuple(range(20, 60))))
    assert [event.key for event in engine.step()] == ["old"]
    assert fed == [(1, 60)]


def test_a_forward_pass_reads_the_cache_in_place(loaded, monkeypatch):
    engine = loaded.engine()
    for index, prompt in enumerate(loaded.prompts(seed=2, count=4)):
        engine.admit(greedy(str(index), prompt))
    layer = engine._cache._slot_layers[0]
    inside = range(layer.keys.data_ptr(), layer.keys.data_ptr() + layer.keys.nbytes)
    seen = []
    update = layer.update

    def watched(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        seen.append(keys.data_ptr() in inside)
        return keys, values

    monkeypatch.setattr(layer, "update", watched)
    run(engine)
    assert len(seen) > 30
    assert all(seen)


def test_at_most_one_slot_moves_when_a_sequence_leaves(loaded, monkeypatch):
    moves = []
    move = SlotCache.move

    def counting(cache, source, target, length):
        moves.append((source, target))
        move(cache, source, target, length)

    monkeypatch.setattr(SlotCache, "move", counting)
    engine = loaded.engine(prefill_chunk=256)
    for index in range(4):
        engine.admit(SequenceStart(str(index), tuple(range(20, 30)), (), Sampling(max_tokens=4 + 3 * index)))
    run(engine)
    assert moves == [(3, 0), (2, 1), (1, 0)] or len(moves) <= 3
    moves.clear()
    for index in range(4):
        engine.admit(greedy(str(index), tuple(range(20, 30))))
    run(engine)
    assert len(moves) <= 3


def test_rows_in_mid_prefill_change_places(loaded, monkeypatch):
    swaps = []
    swap = SlotCache.swap

    def counting(cache, one, other, length):
        swaps.append((one, other, length))
        swap(cache, one, other, length)

    monkeypatch.setattr(SlotCache, "swap", counting)
    engine = loaded.engine(max_slots=3, prefill_chunk=16)
    prompts = {"first": (30, 31, 32, 33), "older": tuple(range(40, 50)), "younger": tuple(range(60, 72))}
    for key in ("first", "gone", "older"):
        engine.admit(greedy(key, prompts.get(key, (1, 2))))
    engine.cancel("gone")
    engine.admit(greedy("younger", prompts["younger"]))  # in a slot before the older one
    events = run(engine)
    assert swaps == [(2, 1, 10)]
    assert {key: tokens(found) for key, found in events.items()} == {
        key: loaded.reference(prompt) for key, prompt in prompts.items()
    }


def test_slots_follow_from_the_budget(loaded):
    per_token = bytes_per_token(describe(loaded.model).layers, torch.float64)
    layer = loaded.engine()._cache._slot_layers[0]
    assert per_token == len(describe(loaded.model).layers) * (layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes)
    budget = 2 * 100 * per_token
    assert loaded.engine(context=100, kv_bytes=budget, max_slots=16).slots == 2
    assert loaded.engine(context=100, kv_bytes=budget - 1, max_slots=16).slots == 1
    assert loaded.engine(context=100, kv_bytes=budget, max_slots=1).slots == 1
    with pytest.raises(ModelError, match=r"does not hold one sequence of 100 tokens .*raise the budget"):
        loaded.engine(context=100, kv_bytes=budget // 2 - 1)
    engine = loaded.engine(context=100, kv_bytes=budget)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in engine._cache._slot_layers)
    assert held <= budget


def test_numbers_that_are_not_finite_do_not_reach_who_comes_after(loaded, monkeypatch):
    engine = loaded.engine(max_slots=2)
    forward = loaded.model.forward
    weight = loaded.model.get_input_embeddings().weight
    prompt = tuple(range(20, 60))

    @functools.wraps(forward)
    def poisoned(*args, **kwargs):
        kept = weight[511].clone()
        weight[511] = float("nan")
        try:
            return forward(*args, **kwargs)
        finally:
            weight[511] = kept

    monkeypatch.setattr(loaded.model, "forward", poisoned)
    engine.admit(greedy("good", prompt))
    engine.admit(greedy("bad", (*range(20, 70), 511)))
    events = run(engine)
    assert tokens(events["good"]) == loaded.reference(prompt)
    monkeypatch.undo()
    # A longer neighbour lets the short one's row reach over what the bad one left behind.
    longer = tuple(range(20, 100))
    for first, second in ((prompt, longer), (longer, prompt)):
        engine.admit(greedy("first", first))
        engine.admit(greedy("second", second))
        events = run(engine)
        assert tokens(events["first"]) == loaded.reference(first)
        assert tokens(events["second"]) == loaded.reference(second)


def test_admission_is_cheap(loaded):
    engine = loaded.engine(max_slots=64)
    began = time.perf_counter()
    for index in range(64):
        engine.admit(greedy(str(index), tuple(range(20, 200)), tuple(range(20, 30))))
    assert (time.perf_counter() - began) / 64 < 0.005
