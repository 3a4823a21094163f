"""What the tests of the engine have in common: prompts, runs with joins and leaves, and answers of `generate`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from models.architecture import describe
from models.contract import Engine, Sampling, SequenceStart, TokenEvent
from models.engine import SlotEngine
from models.instance import load_model

ANSWER = 32


class Loaded:
    """One model of transformers, from which any number of engines and reference answers are made."""

    def __init__(self, source: Any) -> None:
        """From a directory, or from a model itself."""
        self.model = load_model(source, None) if isinstance(source, Path) else source
        self.model.generation_config.eos_token_id = None
        self.vocabulary = self.model.config.vocab_size
        self.architecture = describe(self.model)
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def engine(self, **settings: Any) -> SlotEngine:
        """An engine of four slots and a context of 256; tokens read as " <id>"."""
        settings = {
            "kv_bytes": 2**40,
            "context": 256,
            "max_slots": 4,
            "prefill_chunk": 16,
            "idle_chunks": 1,
            "eos": (),
        } | settings
        return SlotEngine(self.model, self.architecture, _decode, **settings)

    def prompts(self, seed: int, count: int, longest: int = 70) -> list[tuple[int, ...]]:
        """Random prompts of 1 to `longest` tokens."""
        rng = random.Random(seed)
        return [tuple(rng.randrange(8, self.vocabulary) for _ in range(rng.randint(1, longest))) for _ in range(count)]

    def reference(self, prompt: tuple[int, ...]) -> list[int]:
        """What `generate` answers to this prompt alone, greedily."""
        if prompt not in self._answers:
            tokens = torch.tensor([prompt])
            output = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=ANSWER,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
            self._answers[prompt] = output[0, len(prompt) :].tolist()
        return self._answers[prompt]


def _decode(tokens: list[int]) -> str:
    return "".join(f" {token}" for token in tokens)


def greedy(key: str, prompt: tuple[int, ...], generated: tuple[int, ...] = ()) -> SequenceStart:
    """A greedy start of ANSWER tokens."""
    return SequenceStart(key, prompt, generated, Sampling(max_tokens=ANSWER))


def run(engine: Engine) -> dict[str, list[TokenEvent]]:
    """Step until nothing is active; the events of every sequence."""
    events: dict[str, list[TokenEvent]] = {}
    while engine.active():
        for event in engine.step():
            events.setdefault(event.key, []).append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    """The tokens, after a check that positions have no hole and only the last event has an end."""
    first = events[0].position
    assert [event.position for event in events] == list(range(first, first + len(events)))
    assert all(event.end is None for event in events[:-1])
    return [event.token for event in events]


def run_with_traffic(engine: SlotEngine, prompts: list[tuple[int, ...]], seed: int) -> dict[str, list[int]]:
    """Answers to `prompts`, which join at random steps, while bystanders join, end early or are cancelled."""
    rng = random.Random(seed)
    waiting = [greedy(f"watched-{index}", prompt) for index, prompt in enumerate(prompts)]
    events: dict[str, list[TokenEvent]] = {}
    bystanders: list[str] = []
    steps = 0
    while waiting or engine.active():
        steps += 1
        assert steps < 5000
        if waiting and engine.active() < engine.slots and rng.random() < 0.4:
            engine.admit(waiting.pop())
        if waiting and engine.active() < engine.slots and rng.random() < 0.3:
            prompt = tuple(rng.randrange(8, 500) for _ in range(rng.randint(1, 40)))
            key = f"bystander-{steps}"
            engine.admit(SequenceStart(key, prompt, (), Sampling(max_tokens=rng.randint(1, 12))))
            bystanders.append(key)
        if bystanders and rng.random() < 0.1:
            engine.cancel(bystanders.pop(rng.randrange(len(bystanders))))
        for event in engine.step():
            events.setdefault(event.key, []).append(event)
    return {key: tokens(found) for key, found in events.items() if key.startswith("watched")}
