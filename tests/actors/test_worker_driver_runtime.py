"""The real machinery under the worker driver: a tiny packed model, its engine, tokenizer and texts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from packed_sample import pack_sample

from actors.local_runtime import LocalRuntime
from actors.worker_runtime import AttachRefused, PromptRefused
from bus.messages import ChatMessage, Generation
from loaders import read_manifest
from models.contract import Engine, Sampling, SequenceStart


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runtime") / "models"
    pack_sample(directory, "tiny")
    return directory


async def attached(models: Path) -> tuple[LocalRuntime, Engine]:
    runtime = LocalRuntime(models)
    digest = read_manifest(models / "tiny").digest
    return runtime, await runtime.attach("tiny", digest, slots=4, kv_bytes=1 << 26, context=256)


async def run(runtime: LocalRuntime, engine: Engine, start: SequenceStart) -> tuple[list[int], list[str]]:
    engine.admit(start)
    tokens, texts = [], []
    while engine.active():
        for result in await runtime.step([("tiny", engine)]):
            assert not result.error
            for event in result.events:
                if event.token >= 0:
                    tokens.append(event.token)
                    texts.append(event.text)
    return tokens, texts


async def test_texts_of_earlier_tokens_are_what_was_shown(models: Path) -> None:
    """A reader that joins after a hand-over sees the same pieces as one that was there from the beginning."""
    runtime, engine = await attached(models)
    more = {"min_tokens": 3, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "stop_tokens": (7,)}
    generation = Generation(60, prompt="The ship", temperature=0.9, seed=5, stop=("zzz",), **more)
    encoded = await runtime.encode("tiny", generation)
    start = SequenceStart("a", encoded.prompt, (), encoded.sampling)
    tokens, texts = await run(runtime, engine, start)
    assert len(set(tokens)) > 10
    for cut in (1, 7, len(tokens) - 1):
        moved = SequenceStart("b", encoded.prompt, tuple(tokens[:cut]), encoded.sampling)
        assert list(await runtime.texts("tiny", moved)) == texts[:cut]
        rest, rest_texts = await run(runtime, engine, moved)
        assert (tokens[:cut] + rest, texts[:cut] + rest_texts) == (tokens, texts)
    await runtime.reset()
    runtime.close()


async def test_defaults_come_from_the_model(models: Path) -> None:
    runtime, engine = await attached(models)
    assert engine.context == 256
    said_nothing = (await runtime.encode("tiny", Generation(5, prompt="x"))).sampling
    said = (await runtime.encode("tiny", Generation(5, prompt="x", temperature=0.0, top_p=0.5, top_k=3))).sampling
    assert (said.temperature, said.top_p, said.top_k) == (0.0, 0.5, 3)
    assert said_nothing.temperature >= 0
    assert 0 < said_nothing.top_p <= 1
    assert said_nothing.top_k >= 0
    chat = await runtime.encode("tiny", Generation(5, messages=(ChatMessage("user", "hello"),)))
    tokens = await runtime.encode("tiny", Generation(5, tokens=(3, 4, 5)))
    assert len(chat.prompt) > 1
    assert tokens.prompt == (3, 4, 5)
    runtime.close()


async def test_refusals_are_one_sentence(models: Path) -> None:
    runtime, _ = await attached(models)
    with pytest.raises(AttachRefused, match="not the ones that were placed"):
        await runtime.attach("tiny", "0" * 64, slots=1, kv_bytes=1 << 26, context=64)
    with pytest.raises(AttachRefused, match="there is no directory"):
        await runtime.attach("absent", "0" * 64, slots=1, kv_bytes=1 << 26, context=64)
    with pytest.raises(AttachRefused, match="KV budget"):
        digest = read_manifest(models / "tiny").digest
        await runtime.attach("tiny", digest, slots=1, kv_bytes=10, context=64)
    runtime._instances["tiny"].tokenizer.chat_template = None
    with pytest.raises(PromptRefused, match="no chat template"):
        await runtime.encode("tiny", Generation(5, messages=(ChatMessage("nobody", "hello"),)))
    runtime.close()


async def test_cancelled_sequences_free_their_slots(models: Path) -> None:
    runtime, engine = await attached(models)
    for key in "abcd":
        engine.admit(SequenceStart(key, (5, 6, 7), (), Sampling(max_tokens=50)))
    await runtime.step([("tiny", engine)])
    await runtime.cancel([(engine, "a"), (engine, "c")])
    assert engine.active() == 2
    assert await run(runtime, engine, SequenceStart("e", (9,), (), Sampling(max_tokens=3)))
    await runtime.detach("tiny")
    with pytest.raises(AttachRefused, match="not attached"):
        await runtime.encode("tiny", Generation(5, prompt="x"))
    runtime.close()


async def test_a_thread_that_hangs_is_given_up(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.local_runtime.RESET_SECONDS", 0.05)
    given_up: list[bool] = []
    runtime = LocalRuntime(models, give_up=lambda: given_up.append(True))
    hang = threading.Event()
    runtime._computing.submit(hang.wait)
    with pytest.raises(TimeoutError):
        await runtime.reset()
    hang.set()
    assert given_up
    await runtime.reset()
    runtime.close()
