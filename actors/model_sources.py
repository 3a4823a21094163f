"""Where a model that does not lie on this server is had from: a directory, an http address, or another server."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from actors.stopping import Stop
from actors.store_driver import StorageFailed
from loaders import CheckpointError, Manifest
from loaders.arrival import Announcement
from loaders.errors import DestinationBusy, DiskFull, NoRoom
from loaders.fetch import Fetch, Filling, look_at_source, read_companion
from loaders.reading import read_bounded
from loaders.remote import open_source

SOURCE_NAME = "longshore-source.json"
"""Beside the weights of what was fetched: where it can be had again."""
_SOURCE_LIMIT_BYTES = 1 << 14
_ADDRESS_LIMIT = 2000
_TEMPLATE_LIMIT_BYTES = 4 << 20

logger = logging.getLogger("longshore.driver")


def check_address(address: str) -> str:
    """`address` where it may be that of a packed checkpoint. Raises CheckpointError with one sentence."""
    if not address.isprintable() or len(address) > _ADDRESS_LIMIT:
        raise CheckpointError(f"an address has at most {_ADDRESS_LIMIT} printable characters")
    if "://" not in address and not Path(address).is_absolute():
        raise CheckpointError(f"{address!r} is no place to fetch from: give an absolute directory, http:// or https://")
    return address


def find_at_source(address: str, stop: Stop) -> tuple[Manifest, bool]:
    """The manifest there, which its weights agree with, and whether the model has a chat template."""
    try:
        source = open_source(check_address(address), hurry=True)
        with stop.interrupting(source.cancel):
            manifest = look_at_source(source)
            chat = "chat_template.jinja" in manifest.files
            stated = manifest.files.get("tokenizer_config.json")
            if not chat and stated is not None and stated.bytes <= _TEMPLATE_LIMIT_BYTES:
                chat = _says_template(read_companion(source, manifest, "tokenizer_config.json"))
            return manifest, chat
    except CheckpointError as error:
        raise StorageFailed(str(error)) from error
    except OSError as error:
        raise StorageFailed(f"{address} cannot be read: {error.strerror or error}") from error


def fetch_model(
    model: str,
    destination: Path,
    digest: str,
    sources: tuple[str, ...],
    before: Callable[[], None],
    stop: Stop,
    filling: Filling | None,
    telling: Callable[[], AbstractContextManager[Announcement]],
    adopt: Callable[[], bool],
    *,
    told_of_file: bool,
) -> bool:
    """Fetch it from the first of the sources that gives these very weights, whole or not at all; what `adopt` says.

    Each source goes on where the one before it stopped, and is told of by an announcement of its own. `filling` and
    `told_of_file`: see `loaders.fetch.Fetch`. Without `filling` it comes to the SSD alone, past the page cache.

    Raises `StorageFailed`, which says what was wrong with each, `DestinationBusy`, or `Stopped`.
    """
    beside = {SOURCE_NAME: json.dumps({"source": sources[-1]}).encode()}
    tried = list(dict.fromkeys(sources))
    troubles = []
    for address in tried:
        stop.check()
        try:
            source = open_source(check_address(address), hurry=address != tried[-1])
            with telling() as told:
                fetch = Fetch(
                    source,
                    destination,
                    digest=digest,
                    before=before,
                    beside=beside,
                    keep_in_memory=filling is not None,
                    filling=filling,
                    told=told,
                    told_of_file=told_of_file,
                )

                def interrupt(fetch: Fetch = fetch) -> None:
                    fetch.cancel(keep=stop.later)

                with stop.interrupting(interrupt):
                    report = fetch.run()
                adopted = adopt()
                if not adopted:
                    told.end(whole=False)
            logger.info(
                "%s came from %s at %.2f GB/s, %.0f MB of it had come before",
                model,
                address,
                report.gigabytes_per_second,
                report.kept_bytes / 1e6,
            )
            return adopted
        except DestinationBusy:
            raise
        except (DiskFull, NoRoom) as full:
            raise StorageFailed(f"{model} cannot be fetched: {full}") from full
        except (CheckpointError, OSError) as error:
            stop.check()
            troubles.append(f"from {address}: {error}")
            logger.warning("%s does not come from %s: %s", model, address, error)
    raise StorageFailed(f"{model} cannot be fetched {'; '.join(troubles)}")


def read_source(directory: Path) -> str:
    """Where the packed model in this directory came from; empty where nothing says so."""
    try:
        if not (directory / SOURCE_NAME).exists():
            return ""
        content = json.loads(read_bounded(directory / SOURCE_NAME, _SOURCE_LIMIT_BYTES))
        return check_address(content["source"])
    except (CheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is passed over: %s", directory / SOURCE_NAME, error)
        return ""


def _says_template(content: bytes) -> bool:
    try:
        return bool(json.loads(content).get("chat_template"))
    except (ValueError, AttributeError, RecursionError):
        return False
