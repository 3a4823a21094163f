"""The real storage under the store driver: what lies in the directory, checked before it counts as being in DRAM."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from packed_sample import pack_sample

from actors.local_storage import LocalStorage
from actors.store_driver import StorageFailed, StoreDriver
from bus.messages import (
    DeleteModel,
    EvictModel,
    FindModel,
    LoadFailed,
    LoadModel,
    ModelDeleted,
    ModelEvicted,
    ModelFound,
    ModelLoaded,
    ModelMissing,
    StoreStarted,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("storage") / "models"
    pack_sample(models, "meta/tiny-1.0")
    return models


@pytest.fixture
def models(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed models that a test may damage."""
    import shutil

    return Path(shutil.copytree(packed, tmp_path / "models"))


async def test_a_model_is_found_loaded_evicted_and_deleted(models: Path) -> None:
    driver = StoreDriver("s1", dram_bytes=1 << 30, storage=LocalStorage(models, context_limit=256))
    found = await driver.obey(FindModel("meta/tiny-1.0"))
    assert isinstance(found, ModelFound)
    card = found.card
    assert (card.model, card.context, card.architecture, card.chat) == ("meta/tiny-1.0", 256, "LlamaForCausalLM", True)
    loaded = await driver.obey(LoadModel(card.model, card.digest))
    assert isinstance(loaded, ModelLoaded)
    assert loaded.loaded_bytes == card.weight_bytes
    assert loaded.duration_ns > 0
    started = await driver.open()
    assert isinstance(started, StoreStarted)
    assert [(held.card, held.tier) for held in started.models] == [(card, "dram")]
    assert await driver.obey(EvictModel(card.model, "room")) == ModelEvicted(card.model)
    started = await driver.open()
    assert isinstance(started, StoreStarted)
    assert started.models[0].tier == "ssd"
    kept = await driver.obey(DeleteModel(card.model, "another digest"))
    assert isinstance(kept, ModelMissing) and "other weights" in kept.reason
    assert await driver.obey(DeleteModel(card.model, card.digest)) == ModelDeleted(card.model)
    assert list(models.iterdir()) == []
    assert isinstance(await driver.obey(FindModel(card.model)), ModelMissing)
    assert isinstance(await driver.obey(DeleteModel(card.model)), ModelMissing)


async def test_what_nobody_checked_does_not_count_as_being_in_dram(models: Path) -> None:
    """The pages of a file that was just written are all resident."""
    (held,) = await LocalStorage(models).scan()
    assert held.tier == "ssd"


async def test_a_flipped_bit_is_refused(models: Path) -> None:
    storage = LocalStorage(models)
    driver = StoreDriver("s1", dram_bytes=1 << 30, storage=storage)
    card = (await storage.find("meta/tiny-1.0")).card
    weights = models / "meta=2Ftiny-1=2E0" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    failed = await driver.obey(LoadModel(card.model, card.digest))
    assert isinstance(failed, LoadFailed)
    assert failed.gone
    assert "damaged" in failed.reason


async def test_other_weights_than_those_placed_are_refused(models: Path) -> None:
    with pytest.raises(StorageFailed, match="not the ones that were placed"):
        await LocalStorage(models).load("meta/tiny-1.0", "0" * 64)


async def test_what_is_no_packed_model_is_left_out(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    (models / "empty").mkdir()
    (models / "not=escaped").mkdir()
    (models / ".hidden").mkdir()
    (models / "file").write_text("x")
    bad = models / "bad"
    bad.mkdir()
    (bad / "longshore.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        found = await LocalStorage(models).scan()
    assert [held.card.model for held in found] == ["meta/tiny-1.0"]
    assert len(caplog.records) == 3


async def test_no_directory_is_no_models(tmp_path: Path) -> None:
    assert await LocalStorage(tmp_path / "absent").scan() == ()
