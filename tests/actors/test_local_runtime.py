"""The machinery of a worker on packed models: what is prepared is used for the very packing that it was made of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.local_runtime import LocalRuntime
from bus.messages import Generation
from loaders import pack_checkpoint, read_manifest
from models.contract import SequenceStart
from models.instance import Prepared
from models.sample import make_sample


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[LocalRuntime]:
    made = LocalRuntime(tmp_path / "models")
    yield made
    made.close()


def pack(folder: Path, seed: int) -> str:
    """Pack a model named `m`; its digest."""
    make_sample(folder / f"sample-{seed}", arch="llama", parameters=400_000, seed=seed)
    shutil.rmtree(folder / "models" / "m", ignore_errors=True)
    pack_checkpoint(folder / f"sample-{seed}", folder / "models" / "m")
    return read_manifest(folder / "models" / "m").digest


def weights_are_mapped() -> bool:
    return "/models/m/model.safetensors" in Path("/proc/self/maps").read_text()


async def answer(runtime: LocalRuntime, digest: str, prepared: Prepared | None = None) -> list[int]:
    """Attach, ask, detach; what was `prepared` is what computes. Nothing of it is left, though `engine` is."""
    engine = await runtime.attach("m", digest, slots=2, kv_bytes=1 << 22, context=64)
    assert weights_are_mapped() and (prepared is None or not prepared.model.lm_head.weight.is_meta)
    prompt = await runtime.encode("m", Generation(8, prompt="The harbour", temperature=0.0))
    engine.admit(SequenceStart("r/1", prompt.prompt, (), prompt.sampling))
    tokens = []
    while engine.active():
        for result in await runtime.step([("m", engine)]):
            assert not result.error
            tokens += [event.token for event in result.events]
    await runtime.detach("m")
    assert not weights_are_mapped()
    return tokens


async def test_a_prepared_model_answers_as_any_other_and_a_new_packing_is_prepared_anew(
    runtime: LocalRuntime, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    assert not runtime._prepare_one()
    first = pack(tmp_path, 1)
    undisturbed = await answer(runtime, first)
    assert runtime._prepare_one() and not runtime._prepare_one()
    assert not weights_are_mapped()
    assert await answer(runtime, first, runtime._prepared["m"][1]) == undisturbed
    assert "m" not in runtime._prepared
    assert runtime._prepare_one()
    second = pack(tmp_path, 2)
    changed = await answer(runtime, second)
    assert changed != undisturbed
    assert runtime._prepare_one() and await answer(runtime, second) == changed


async def test_what_cannot_be_prepared_is_tried_once(runtime: LocalRuntime, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    pack(tmp_path, 1)
    (tmp_path / "models" / "m" / "tokenizer.json").write_text("no tokenizer")
    assert runtime._prepare_one() and not runtime._prepare_one()
    assert not runtime._prepared
