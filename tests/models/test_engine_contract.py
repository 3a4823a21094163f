"""What `models.contract.Engine` promises, asked of the real engine and of the stub alike."""

from __future__ import annotations

import random

import pytest
from engine_support import Loaded, run, tokens

from models.contract import NO_TOKEN, AdmissionRefused, Sampling, SequenceStart
from models.stub import StubEngine


@pytest.fixture(scope="module")
def loaded(sample_directory):
    return Loaded(sample_directory("llama"))


@pytest.fixture(params=["real", "stub"])
def make(request, loaded):
    """A function that makes an engine: slots 3, context 96, prefill chunk 8, vocabulary 512."""

    def build(eos=()):
        if request.param == "stub":
            return StubEngine(slots=3, context=96, vocabulary=512, prefill_chunk=8, eos=frozenset(eos))
        return loaded.engine(max_slots=3, context=96, prefill_chunk=8, eos=eos)

    return build


def start(key="a", prompt=(20, 21, 22), generated=(), **sampling):
    return SequenceStart(key, tuple(prompt), tuple(generated), Sampling(**({"max_tokens": 12} | sampling)))


def answer(engine, first):
    engine.admit(first)
    return run(engine)[first.key]


def test_an_idle_engine_has_nothing_to_say(make):
    engine = make()
    assert (engine.slots, engine.context, engine.active()) == (3, 96, 0)
    assert engine.step() == []


def test_an_answer_has_every_position_once_and_ends(make):
    events = answer(make(), start())
    assert [event.position for event in events] == list(range(12))
    assert [event.end for event in events] == [None] * 11 + ["length"]
    assert all(event.text for event in events)


def test_admission_computes_nothing_and_first_token_comes_with_the_last_chunk(make):
    engine = make()
    engine.admit(start(prompt=range(20, 40)))
    assert engine.active() == 1
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.3, "top_k": 40, "seed": -1},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "min_tokens": 6, "logit_bias": ((20, -9.0), (30, 2.0))},
    ],
)
def test_an_answer_goes_on_from_any_position(make, sampling):
    whole = answer(make(), start(**sampling))
    for cut in range(1, 12):
        generated = [event.token for event in whole[:cut]]
        assert answer(make(), start(generated=generated, **sampling)) == whole[cut:]


def test_stop_strings_end_an_answer_and_are_not_shown(make):
    whole = answer(make(), start())
    text = "".join(event.text for event in whole)
    middle = text.index(whole[5].text.strip()[-1], len("".join(event.text for event in whole[:5])))
    stop = text[middle - 3 : middle + 4]
    stopped = answer(make(), start(stop=(stop,)))
    assert stopped[-1].end == "stop"
    assert "".join(event.text for event in stopped) == text[: text.index(stop)]
    for cut in range(1, len(stopped)):
        generated = [event.token for event in stopped[:cut]]
        assert answer(make(), start(generated=generated, stop=(stop,))) == stopped[cut:]


def test_end_of_sequence_is_a_position_without_text(make):
    whole = answer(make(), start())
    fourth = whole[3].token
    at = [event.token for event in whole].index(fourth)
    ended = answer(make(eos=(fourth,)), start())
    assert ended[:-1] == whole[:at]
    assert (ended[-1].token, ended[-1].text, ended[-1].end) == (fourth, "", "stop")


def test_stop_tokens_end_an_answer_beside_the_end_of_sequence(make):
    whole = answer(make(), start())
    said = [event.token for event in whole]
    ends = (said[8], said[3])
    at = min(said.index(token) for token in ends)
    for engine, first in [(make(), start(stop_tokens=ends)), (make(eos=ends[:1]), start(stop_tokens=ends[1:]))]:
        ended = answer(engine, first)
        assert ended[:-1] == whole[:at]
        assert (ended[-1].token, ended[-1].text, ended[-1].end) == (said[at], "", "stop")


def test_nothing_ends_an_answer_before_its_least_length(make):
    whole = answer(make(), start())
    said = [event.token for event in whole]
    ended = answer(make(eos=(said[1],)), start(min_tokens=5, stop_tokens=(said[2],)))
    assert len(ended) >= 5
    assert not {said[1], said[2]} & {event.token for event in ended[:5]}
    stop = (whole[2].text.strip(),)
    assert len(answer(make(), start(stop=stop))) == 3
    assert "".join(event.text for event in answer(make(), start(stop=stop, min_tokens=4))[:4]) == "".join(
        event.text for event in whole[:4]
    )
    assert len(answer(make(), start(stop=stop, min_tokens=3))) == 3


@pytest.mark.parametrize("wanted", [0, 3])
def test_logprobs_come_with_each_token_and_from_any_position(make, wanted):
    plain = answer(make(), start(temperature=0.9, seed=5))
    whole = answer(make(), start(temperature=0.9, seed=5, logprobs=wanted))
    assert [(e.token, e.text) for e in whole] == [(e.token, e.text) for e in plain]
    assert all(event.logprobs is None for event in plain)
    for event in whole:
        assert event.logprobs.logprob < 0 and len(event.logprobs.alternatives) == wanted
        for other in event.logprobs.alternatives:
            assert other.token != event.token or (other.logprob, other.text) == (event.logprobs.logprob, event.text)
        likeliest = [other.logprob for other in event.logprobs.alternatives]
        assert likeliest == sorted(likeliest, reverse=True)
    for cut in (1, 6, 11):
        generated = [event.token for event in whole[:cut]]
        rest = answer(make(), start(generated=generated, temperature=0.9, seed=5, logprobs=wanted))
        for event, expected in zip(rest, whole[cut:], strict=True):
            assert event.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=3e-6)
            assert [(o.token, o.text) for o in event.logprobs.alternatives] == [
                (o.token, o.text) for o in expected.logprobs.alternatives
            ]
    ended = answer(make(), start(generated=[event.token for event in whole], logprobs=wanted))
    assert [event.logprobs for event in ended] == [None]


def test_a_bias_bars_a_token(make):
    said = [event.token for event in answer(make(), start())]
    barred = answer(make(), start(logit_bias=tuple(sorted((token, -100.0) for token in set(said)))))
    assert not set(said) & {event.token for event in barred}


def test_what_had_ended_already_says_so_without_a_token(make):
    whole = answer(make(), start())
    everything = [event.token for event in whole]
    for engine, first, end in [
        (make(), start(generated=everything), "length"),
        (make(eos=(everything[-1],)), start(generated=everything, max_tokens=90), "stop"),
        (make(), start(generated=everything, max_tokens=90, stop=(whole[-1].text.strip(),)), "stop"),
        (make(), start(prompt=range(20, 110), generated=everything[:6], max_tokens=90), "length"),
    ]:
        (event,) = answer(engine, first)
        assert (event.token, event.position, event.text, event.end) == (NO_TOKEN, len(first.generated), "", end)
        assert engine.active() == 0


def test_the_context_ends_an_answer(make):
    events = answer(make(), start(prompt=range(20, 110), max_tokens=90))
    assert len(events) == 6
    assert events[-1].end == "length"


def test_cancel_frees_the_slot_at_any_moment(make):
    for steps in range(6):
        engine = make()
        engine.admit(start("a", prompt=range(20, 40)))
        engine.admit(start("b"))
        for _ in range(steps):
            engine.step()
        assert engine.cancel("a")
        assert not engine.cancel("a")
        assert engine.active() == 1
        engine.admit(start("c", prompt=range(50, 60)))
        engine.admit(start("a", prompt=range(20, 40)))
        events = run(engine)
        for key, prompt in (("c", range(50, 60)), ("a", range(20, 40))):
            assert events[key] == answer(make(), start(key, prompt=prompt))


def test_an_answer_does_not_depend_on_its_neighbours(make):
    alone = {
        str(seed): answer(make(), start(str(seed), prompt=range(20 + seed, 30 + 2 * seed), temperature=0.8, seed=seed))
        for seed in range(9)
    }
    engine = make()
    rng = random.Random(2)
    waiting = [
        start(key, prompt=range(20 + int(key), 30 + 2 * int(key)), temperature=0.8, seed=int(key)) for key in alone
    ]
    seen = {key: [] for key in alone}
    while waiting or engine.active():
        if waiting and engine.active() < engine.slots and rng.random() < 0.5:
            engine.admit(waiting.pop())
        for event in engine.step():
            seen[event.key].append(event)
    assert seen == alone


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (start(prompt=()), "empty"),
        (start(prompt=[20] * 96), "shorten"),
        (start(prompt=[20] * 90, generated=[20] * 7), "longer context"),
        (start(prompt=(20, 512)), "512"),
        (start(prompt=(-1,)), "-1"),
        (start(generated=(600,)), "600"),
        (start(max_tokens=0), "max_tokens"),
        (start(temperature=-0.5), "temperature"),
        (start(temperature=float("nan")), "temperature"),
        (start(top_p=0.0), "top_p"),
        (start(top_k=-1), "top_k"),
        (start(stop=("",)), "stop string"),
        (start(min_tokens=-1), "min_tokens"),
        (start(logprobs=21), "logprobs"),
        (start(stop_tokens=(512,)), "512"),
        (start(repetition_penalty=0.0), "repetition_penalty"),
        (start(repetition_penalty=float("nan")), "repetition_penalty"),
        (start(presence_penalty=float("inf")), "presence_penalty"),
        (start(frequency_penalty=float("nan")), "frequency_penalty"),
        (start(logit_bias=((512, 1.0),)), "512"),
        (start(logit_bias=((5, float("nan")),)), "logit_bias"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_sentence(make, first, words):
    engine = make()
    with pytest.raises(AdmissionRefused) as refused:
        engine.admit(first)
    message = str(refused.value)
    assert words in message
    assert message.endswith(".")
    assert "\n" not in message
    assert engine.active() == 0


def test_a_key_that_is_here_and_a_sequence_too_many_are_refused(make):
    engine = make()
    for key in "abc":
        engine.admit(start(key))
    with pytest.raises(AdmissionRefused, match="All 3 KV slots are taken"):
        engine.admit(start("d"))
    engine.cancel("b")
    with pytest.raises(AdmissionRefused, match="'a' is here already"):
        engine.admit(start("a"))
    engine.admit(start("d"))
    assert sorted(run(engine)) == ["a", "c", "d"]


def test_no_sequence_has_two_events_in_a_step(make):
    engine = make()
    for key in "abc":
        engine.admit(start(key))
    while engine.active():
        keys = [event.key for event in engine.step()]
        assert len(keys) == len(set(keys))


def test_answers_depend_on_the_seed(make):
    answers = {tuple(tokens(answer(make(), start(temperature=1.5, seed=seed)))) for seed in range(4)}
    assert len(answers) == 4
