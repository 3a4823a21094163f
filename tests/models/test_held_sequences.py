"""Sequences that an engine follows while another one decodes them: what comes after their release is what the other
would have said, however their tokens came in, and whoever joined and left meanwhile. In float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from engine_support import ANSWER, Loaded, greedy, run

from models.contract import AdmissionRefused, Sampling, SequenceStart, TokenEvent

SHAPES = {
    "llama": {},
    "mixtral": {},
    "mistral": {"sliding_window": 20},
}
SHAPED = Sampling(
    max_tokens=ANSWER,
    temperature=0.9,
    top_p=0.95,
    seed=5,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logprobs=2,
)


@pytest.fixture(scope="module")
def loaded(sample_directory):
    made = {}

    def load(arch):
        if arch not in made:
            made[arch] = Loaded(sample_directory(arch, "float64", **SHAPES[arch]))
        return made[arch]

    return load


def undisturbed(model: Loaded, starts: list[SequenceStart]) -> dict[str, list[TokenEvent]]:
    found = {}
    for start in starts:
        engine = model.engine()
        engine.admit(start)
        found |= run(engine)
    return found


def followed(model: Loaded, starts: list[SequenceStart], expected, seed: int, chunk: int):
    """Each start held from a random point of its answer, extended in random pieces, released at a random point."""
    rng = random.Random(seed)
    engine = model.engine(max_slots=6, prefill_chunk=chunk)
    waiting, holding = list(starts), {}
    events: dict[str, list[TokenEvent]] = {}
    released_at: dict[str, int] = {}
    steps = 0
    while waiting or holding or engine.active():
        steps += 1
        assert steps < 5000
        if waiting and engine.active() < engine.slots and rng.random() < 0.5:
            start = waiting.pop()
            answer = [event.token for event in expected[start.key]]
            known = rng.randrange(len(answer) // 2)
            engine.admit(replace(start, generated=tuple(answer[:known]), held=True))
            holding[start.key] = (answer, known, rng.randint(known, len(answer) - 1))
        if engine.active() < engine.slots and rng.random() < 0.15 and (waiting or holding):
            engine.admit(greedy(f"passer-by {steps}", tuple(range(8, 8 + rng.randint(1, 60)))))
        for key, (answer, known, until) in list(holding.items()):
            piece = rng.randint(0, min(5, until - known))
            if piece and rng.random() < 0.6:
                engine.extend(key, answer[known : known + piece])
                known += piece
                holding[key] = answer, known, until
            # Whether what is known is computed by then or not.
            if known == until and rng.random() < 0.5:
                engine.release(key)
                released_at[key] = known
                del holding[key]
        for event in engine.step():
            assert event.key not in holding, "nothing is emitted before the release"
            events.setdefault(event.key, []).append(event)
        passers = [key for key in events if key.startswith("passer-by")]
        if passers and rng.random() < 0.1:
            engine.cancel(rng.choice(passers))
    return events, released_at


@pytest.mark.parametrize(("arch", "chunk"), [("llama", 16), ("mixtral", 5), ("mistral", 64)])
def test_a_held_sequence_goes_on_as_if_undisturbed(loaded, arch, chunk):
    model = loaded(arch)
    shared = tuple(random.Random(9).randrange(8, model.vocabulary) for _ in range(45))
    prompts = [shared + prompt for prompt in model.prompts(seed=1, count=3, longest=20)]
    prompts += [prompts[0], *model.prompts(seed=2, count=2)]
    starts = [greedy(f"plain {index}", prompt) for index, prompt in enumerate(prompts)]
    starts += [SequenceStart(f"shaped {index}", prompt, (), SHAPED) for index, prompt in enumerate(prompts[:3])]
    expected = undisturbed(model, starts)
    plain = [[event.token for event in expected[f"plain {index}"]] for index in range(len(prompts))]
    stop = (f" {plain[1][20]} {plain[1][21]}",)
    stopped = SequenceStart("stopped", prompts[1], (), Sampling(max_tokens=ANSWER, stop=stop))
    expected |= undisturbed(model, [stopped])
    assert expected["stopped"][-1].end == "stop"
    starts.append(stopped)
    events, released_at = followed(model, starts, expected, seed=chunk, chunk=chunk)
    for start in starts:
        at = released_at[start.key]
        rest, said = expected[start.key][at:], events[start.key]
        assert [(e.position, e.token, e.text, e.end) for e in said] == [
            (e.position, e.token, e.text, e.end) for e in rest
        ], start.key
        for one, other in zip(said, rest, strict=True):
            assert (one.logprobs is None) == (other.logprobs is None) == (start.sampling.logprobs < 0)
            if one.logprobs is not None and other.logprobs is not None:
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-6)
                assert [a.token for a in one.logprobs.alternatives] == [a.token for a in other.logprobs.alternatives]


def test_who_is_up_to_date_answers_without_a_forward_pass(loaded):
    model = loaded("llama")
    start = greedy("one", model.prompts(seed=3, count=1)[0])
    answer = [event.token for event in undisturbed(model, [start])["one"]]
    engine = model.engine()
    engine.admit(replace(start, held=True))
    for known, token in enumerate(answer[:3]):
        while engine.busy():
            assert engine.step() == []
        assert not engine.left("one")
        if known < 2:
            engine.extend("one", [token])
    passes = []
    hook = engine._model.register_forward_hook(lambda *_: passes.append(1))
    engine.release("one")
    first = engine.step()
    assert not passes, "its logits were there"
    second = engine.step()
    hook.remove()
    assert [event.token for event in (*first, *second)] == answer[2:4]
    assert len(passes) == 1


@pytest.mark.parametrize("slots", [1, 4])
def test_a_prompt_that_was_foreseen_is_answered_as_any_other(loaded, slots):
    model = loaded("llama")
    one, other = tuple(range(8, 48)), model.prompts(seed=4, count=1, longest=60)[0]
    shared = one[: len(one) // 2] + other
    for start in (
        greedy("one", one),
        SequenceStart("shaped", one, (), SHAPED),
        greedy("other", other),
        greedy("shared", shared),
        greedy("part", one[:-1]),
        replace(greedy("again", one), generated=tuple(model.reference(one)[:3])),
    ):
        expected = undisturbed(model, [start])[start.key]
        for computed in (0, 1, 99):
            engine = model.engine(max_slots=slots)
            engine.foresee(one)
            assert not engine.active()
            for _ in range(computed):
                assert engine.step() == []
            assert engine.busy() is (computed < 99)
            engine.admit(start)
            assert engine.active() == 1
            said = run(engine)[start.key]
            assert [(e.position, e.token, e.text, e.end) for e in said] == [
                (e.position, e.token, e.text, e.end) for e in expected
            ]
            assert engine._rows == [None] * slots


def test_what_was_foreseen_costs_no_second_prefill_and_no_slot(loaded):
    model = loaded("llama")
    prompt = model.prompts(seed=6, count=1)[0]
    engine = model.engine(max_slots=2)
    engine.foresee(prompt)
    while engine.busy():
        assert engine.step() == []
    passes = []
    hook = engine._model.register_forward_hook(lambda *_: passes.append(1))
    engine.admit(greedy("one", prompt))
    (first,) = engine.step()
    hook.remove()
    assert not passes and first.token == model.reference(prompt)[0]
    engine.admit(greedy("two", prompt))
    with pytest.raises(AdmissionRefused):
        engine.admit(greedy("three", prompt))
