"""Packed models in a directory of this server, where they come from, and the DRAM tier above them.

A directory per model, named by the escaped name of the model. What is brought to DRAM is checked byte by byte, and a
model counts as lying there only while its tier (`loaders.dram_tier`) says so. What does not lie here is fetched from
the first source that gives it; SSD and DRAM are filled on the way.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from actors.known_models import KnownModels
from actors.model_sources import fetch_model, find_at_source, read_source
from actors.stopping import Stop, Stopped, in_thread
from actors.store_driver import Loaded, StorageFailed
from bus.messages import HeldModel, ModelCard, Tier
from bus.subjects import escape_model, unescape_model
from loaders import CheckpointError, Manifest, read_manifest
from loaders.arrival import Announcement, arrival_path
from loaders.arrival import remove_leftovers as remove_leftovers_of_arrivals
from loaders.dram_tier import DramTier
from loaders.errors import DestinationBusy, NoRoom
from loaders.page_cache_tier import PageCacheTier
from loaders.precedence import Precedence
from loaders.storage import partials_in, remove_leftovers, remove_partial

DEFAULT_CONTEXT = 4096
"""The most tokens, prompt and answer together, that a sequence gets unless told otherwise."""
THREADS = 32
"""Loads, looks and deletions under way at once; each of them mostly waits."""
BUSY_SECONDS = 0.05
"""So often is looked whether another process, which brings the same model to the same directory, is done."""

logger = logging.getLogger("longshore.driver")


class LocalStorage:
    """Obeys `actors.store_driver.Storage`. `context_limit` bounds the context that a model is run with.

    `tier` is the page cache, without a memory of what another process brought there, unless another one is given.
    `arrivals` is a folder of its own, where workers find what is on its way (`loaders.arrival`); None: nobody is told.
    """

    def __init__(
        self,
        directory: Path,
        *,
        context_limit: int = DEFAULT_CONTEXT,
        tier: DramTier | None = None,
        arrivals: Path | None = None,
    ) -> None:
        self._directory = directory
        self._arrivals = arrivals
        if arrivals is not None:
            remove_leftovers_of_arrivals(arrivals)
        self._context_limit = context_limit
        self._tier: DramTier = tier or PageCacheTier(None)
        self._precedence = Precedence()
        self._known = KnownModels()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")

    async def scan(self) -> tuple[HeldModel, ...]:
        return await in_thread(self._threads, lambda stop: self._scan())

    async def load(
        self, model: str, digest: str, sources: tuple[str, ...] = (), urgent: bool = True, streamed: bool = False
    ) -> Loaded:
        return await in_thread(self._threads, lambda stop: self._load(model, digest, sources, urgent, streamed, stop))

    async def evict(self, model: str, tier: Tier = "dram") -> None:
        await in_thread(self._threads, lambda stop: self._evict(model, tier))

    async def find(self, model: str, source: str = "") -> HeldModel:
        return await in_thread(self._threads, lambda stop: self._find(model, source, stop))

    async def delete(self, model: str) -> None:
        await in_thread(self._threads, lambda stop: self._delete(model))

    async def forget_partial(self, model: str) -> None:
        self._known.remove(model)
        await in_thread(self._threads, lambda stop: remove_partial(self._path(model)))

    async def look_after(self) -> str:
        """Once: what was pushed out of DRAM unasked is brought back, and said. What does not lie there any more, or is
        something else on the SSD, as a sentence, else empty."""
        try:
            found = await in_thread(self._threads, lambda stop: self._tier.look_after())
        except (CheckpointError, OSError) as error:
            logger.warning("what lies in DRAM cannot be looked after: %s", error)
            return ""
        for said in found.said:
            logger.warning("%s", said)
        names = ", ".join(path.name for path in found.lost)
        if names:
            return f"not in DRAM any more, though nobody evicted it: {names}"
        return await in_thread(self._threads, lambda stop: self._known.differences(self._digest))

    # ---- in a thread: what there is ---------------------------------------------------------------------------

    def _path(self, model: str) -> Path:
        return self._directory / escape_model(model)

    def _scan(self) -> tuple[HeldModel, ...]:
        try:
            entries = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise StorageFailed(f"{self._directory} cannot be read: {error.strerror or error}") from error
        remove_leftovers(self._directory)
        found = []
        for path in entries:
            if path.name.startswith(".") or not path.is_dir():
                if path.name.endswith(_DELETED):
                    shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                model = unescape_model(path.name)
                card = self._card(model)
                in_dram = self._tier.holds(path)
            except (StorageFailed, CheckpointError, OSError, ValueError) as error:
                logger.warning("%s is left out: %s", path, error)
                continue
            found.append(HeldModel(card, "dram" if in_dram else "ssd", read_source(path)))
        try:
            self._tier.forget_others([self._path(held.card.model) for held in found])
        except (CheckpointError, OSError) as error:
            logger.warning("what nobody needs any more could not be let go from DRAM: %s", error)
        self._known.found({held.card.model: held.card.digest for held in found})
        return tuple(found)

    def _digest(self, model: str) -> str:
        try:
            return self._card(model).digest
        except StorageFailed:
            return ""

    def _find(self, model: str, source: str, stop: Stop) -> HeldModel:
        path = self._path(model)
        if path.is_dir() or not source:
            card = self._card(model)
            self._known.add(model, card.digest)
            return HeldModel(card, "ssd", read_source(path))
        manifest, chat = find_at_source(source, stop)
        return HeldModel(self._describe(model, source, manifest, chat), "remote", source)

    def _card(self, model: str) -> ModelCard:
        path = self._path(model)
        if not path.is_dir():
            raise StorageFailed(f"{model} does not lie on this server: add it to {self._directory}", gone=True)
        try:
            manifest = read_manifest(path)
        except (CheckpointError, OSError) as error:
            raise StorageFailed(str(error), gone=True) from error
        return self._describe(model, str(path), manifest, _has_chat_template(path, manifest))

    def _describe(self, model: str, where: str, manifest: Manifest, chat: bool) -> ModelCard:
        if manifest.kind == "stored":
            reason = f"{where} was packed as stored, which nobody here can run; pack it without --as-stored"
            raise StorageFailed(reason, gone=True)
        return ModelCard(
            model=model,
            digest=manifest.digest,
            weight_bytes=manifest.bytes,
            context=min(manifest.context or self._context_limit, self._context_limit),
            kv_bytes_per_token=max(1, manifest.kv_bytes_per_token),
            vocabulary=max(1, manifest.vocab_size),
            architecture=manifest.architecture[:128],
            chat=chat,
            kind="encoder" if manifest.kind == "encoder" else "decoder",
        )

    # ---- in a thread: remote ▸ SSD ▸ DRAM ---------------------------------------------------------------------

    def _load(
        self, model: str, digest: str, sources: tuple[str, ...], urgent: bool, streamed: bool, stop: Stop
    ) -> Loaded:
        while True:
            stop.check()
            try:
                if not self._path(model).is_dir() and sources:
                    loaded = self._load_from_sources(model, digest, sources, urgent, stop, streamed=streamed)
                elif streamed:
                    loaded = self._see_on_ssd(model, digest)
                else:
                    loaded = self._load_from_ssd(model, digest, sources, urgent, stop)
                self._known.add(model, digest)
                return loaded
            except DestinationBusy:
                # Servers that share a directory, as those of `longshore up` do: afterwards it lies here.
                stop.wait(BUSY_SECONDS)

    def _see_on_ssd(self, model: str, digest: str) -> Loaded:
        """Of what is streamed nothing is to be brought: workers read it from the SSD themselves, and check it then."""
        return Loaded(self._card_of(model, digest).weight_bytes, "ssd", read_source(self._path(model)), 0.0)

    def _card_of(self, model: str, digest: str) -> ModelCard:
        """Its card, if it is the very model that was placed."""
        card = self._card(model)
        if card.digest != digest:
            raise StorageFailed(f"the weights of {model} on this server are not the ones that were placed", gone=True)
        return card

    def _load_from_ssd(self, model: str, digest: str, sources: tuple[str, ...], urgent: bool, stop: Stop) -> Loaded:
        card = self._card_of(model, digest)
        began = time.monotonic()
        try:
            with self._precedence.turn("disk", urgent=urgent) as turn, self._told(model, digest) as told:
                self._tier.bring(self._path(model), before=lambda: _wait(turn.wait, stop), told=told)
        except NoRoom as error:
            raise StorageFailed(str(error)) from error
        except CheckpointError as error:
            known = read_source(self._path(model))
            sources = sources or ((known,) if known else ())
            if not sources:
                raise StorageFailed(str(error), gone=True) from error
            logger.warning("%s is fetched again: %s", model, error)
            return self._load_from_sources(model, digest, sources, urgent, stop)
        except OSError as error:
            raise StorageFailed(f"{model} cannot be read: {error.strerror or error}") from error
        return Loaded(
            card.weight_bytes, "ssd", "", time.monotonic() - began - turn.waited_seconds if turn.moved else 0.0
        )

    @contextmanager
    def _told(self, model: str, digest: str) -> Iterator[Announcement]:
        """Workers hear how far a load has come while the block lasts, and how it ended."""
        path = arrival_path(self._arrivals, escape_model(model)) if self._arrivals is not None else None
        told, whole = Announcement(path, digest), False
        try:
            yield told
            whole = True
        finally:
            told.end(whole=whole)

    def _load_from_sources(
        self, model: str, digest: str, sources: tuple[str, ...], urgent: bool, stop: Stop, *, streamed: bool = False
    ) -> Loaded:
        """`streamed`: to the SSD alone, past the page cache, and nobody hears of it before it is there."""
        path = self._path(model)
        self._remove_partials_but(path)
        began = time.monotonic()
        try:
            with self._precedence.turn("network", urgent=urgent) as turn:
                before = functools.partial(_wait, turn.wait, stop)
                adopted = fetch_model(
                    model,
                    path,
                    digest,
                    sources,
                    before,
                    stop,
                    None if streamed else self._tier.filling,
                    functools.partial(_untold if streamed else self._told, model, digest),
                    (lambda: True) if streamed else functools.partial(self._tier.adopt, path),
                    told_of_file=not streamed and self._tier.weights_root is None,
                )
        except Stopped:
            if not stop.later:
                remove_partial(path)
            raise
        card = self._card(model)
        seconds = time.monotonic() - began - turn.waited_seconds
        if not adopted:
            seconds += self._load_from_ssd(model, digest, (), urgent, stop).seconds or 0.0
        return Loaded(card.weight_bytes, "remote", sources[-1], seconds)

    def _remove_partials_but(self, path: Path) -> None:
        """What broke off stands in room that the deciding half takes for free: it goes before another model comes."""
        for other in partials_in(self._directory):
            if other != path:
                remove_partial(other)

    # ---- in a thread: letting go ------------------------------------------------------------------------------

    def _evict(self, model: str, tier: Tier) -> None:
        self._let_go_from_dram(model)
        if tier == "ssd":
            self._known.remove(model)
            remove_partial(self._path(model))
        if not self._path(model).is_dir():
            return
        if tier == "ssd":
            try:
                self._delete(model)
            except StorageFailed as failed:
                logger.warning("%s could not be let go from the SSD: %s", model, failed)

    def _let_go_from_dram(self, model: str) -> None:
        try:
            self._tier.release(self._path(model))
        except (CheckpointError, OSError) as error:
            logger.warning("%s could not be let go from DRAM: %s", model, error)

    def _delete(self, model: str) -> None:
        path = self._path(model)
        self._known.remove(model)
        remove_partial(path)
        if not path.is_dir():
            raise StorageFailed(f"{model} does not lie on this server", gone=True)
        self._let_go_from_dram(model)
        # A name that no scan takes for a model: a crash in between leaves nothing that looks whole.
        doomed = path.with_name(f".{path.name}{_DELETED}")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except OSError as error:
            raise StorageFailed(f"{model} cannot be deleted: {error.strerror or error}") from error
        shutil.rmtree(doomed, ignore_errors=True)


_DELETED = ".deleted"


@contextmanager
def _untold(model: str, digest: str) -> Iterator[Announcement]:
    """What comes to the SSD alone is nothing that a worker could begin with."""
    yield Announcement(None, digest)


def _wait(turn: Callable[[Callable[[], bool]], None], stop: Stop) -> None:
    turn(stop.asked)
    stop.check()


def _has_chat_template(path: Path, manifest: Manifest) -> bool:
    if "chat_template.jinja" in manifest.files:
        return True
    try:
        return bool(json.loads((path / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
