"""Packed models in a directory of this server; the page cache above them is the DRAM tier.

A directory per model, named by the escaped name of the model. What is brought to DRAM is checked byte by byte, so a
model counts as lying there only when this process has checked it and every page is still resident: pages that merely
happen to be cached were verified by nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path

from actors.store_driver import StorageFailed
from bus.messages import HeldModel, ModelCard
from bus.subjects import escape_model, unescape_model
from loaders import CheckpointError, Manifest, populate_checkpoint, read_manifest, release_checkpoint, resident_bytes

DEFAULT_CONTEXT = 4096
"""The most tokens, prompt and answer together, that a sequence gets unless told otherwise."""

logger = logging.getLogger("longshore.driver")


class LocalStorage:
    """Obeys `actors.store_driver.Storage`. `context_limit` bounds the context that a model is run with."""

    def __init__(self, directory: Path, *, context_limit: int = DEFAULT_CONTEXT) -> None:
        self._directory = directory
        self._context_limit = context_limit
        self._checked: dict[str, str] = {}

    async def scan(self) -> tuple[HeldModel, ...]:
        return await asyncio.to_thread(self._scan)

    async def load(self, model: str, digest: str) -> int:
        return await asyncio.to_thread(self._load, model, digest)

    async def evict(self, model: str) -> None:
        await asyncio.to_thread(self._evict, model)

    async def find(self, model: str) -> ModelCard:
        return await asyncio.to_thread(self._card, model)

    async def delete(self, model: str) -> None:
        await asyncio.to_thread(self._delete, model)

    # ---- in a thread ------------------------------------------------------------------------------------------

    def _path(self, model: str) -> Path:
        return self._directory / escape_model(model)

    def _scan(self) -> tuple[HeldModel, ...]:
        try:
            entries = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return ()
        found = []
        for path in entries:
            if path.name.startswith(".") or not path.is_dir():
                continue
            try:
                model = unescape_model(path.name)
                card = self._card(model)
                resident = resident_bytes(path) >= card.weight_bytes
            except (StorageFailed, CheckpointError, OSError, ValueError) as error:
                logger.warning("%s is left out: %s", path, error)
                continue
            checked = self._checked.get(model) == card.digest
            found.append(HeldModel(card, "dram" if checked and resident else "ssd"))
        return tuple(found)

    def _card(self, model: str) -> ModelCard:
        path = self._path(model)
        if not path.is_dir():
            raise StorageFailed(f"{model} does not lie on this server: add it to {self._directory}", gone=True)
        try:
            return self._describe(model, path, read_manifest(path))
        except (CheckpointError, OSError) as error:
            raise StorageFailed(str(error), gone=True) from error

    def _describe(self, model: str, path: Path, manifest: Manifest) -> ModelCard:
        if manifest.kind == "stored":
            raise CheckpointError(
                f"{path} was packed as stored, which nobody here can run; pack it without --as-stored"
            )
        return ModelCard(
            model=model,
            digest=manifest.digest,
            weight_bytes=manifest.bytes,
            context=min(manifest.context or self._context_limit, self._context_limit),
            kv_bytes_per_token=max(1, manifest.kv_bytes_per_token),
            vocabulary=max(1, manifest.vocab_size),
            architecture=manifest.architecture[:128],
            chat=_has_chat_template(path, manifest),
            kind="encoder" if manifest.kind == "encoder" else "decoder",
        )

    def _load(self, model: str, digest: str) -> int:
        card = self._card(model)
        if card.digest != digest:
            raise StorageFailed(f"the weights of {model} on this server are not the ones that were placed", gone=True)
        try:
            report = populate_checkpoint(self._path(model), verify=True)
        except CheckpointError as error:
            raise StorageFailed(str(error), gone=True) from error
        except OSError as error:
            raise StorageFailed(f"{model} cannot be read: {error.strerror or error}") from error
        self._checked[model] = card.digest
        return report.bytes

    def _evict(self, model: str) -> None:
        self._checked.pop(model, None)
        try:
            release_checkpoint(self._path(model))
        except (CheckpointError, OSError) as error:
            logger.warning("%s could not be let go from DRAM: %s", model, error)

    def _delete(self, model: str) -> None:
        path = self._path(model)
        self._checked.pop(model, None)
        if not path.is_dir():
            raise StorageFailed(f"{model} does not lie on this server", gone=True)
        # A name that no scan takes for a model: a crash in between leaves nothing that looks whole.
        doomed = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except OSError as error:
            raise StorageFailed(f"{model} cannot be deleted: {error.strerror or error}") from error
        shutil.rmtree(doomed, ignore_errors=True)


def _has_chat_template(path: Path, manifest: Manifest) -> bool:
    if "chat_template.jinja" in manifest.files:
        return True
    try:
        return bool(json.loads((path / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
