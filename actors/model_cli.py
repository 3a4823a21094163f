"""`longshore model add | list | rm`: which models a cell has. What is heavy is imported inside the functions."""

from __future__ import annotations

import asyncio
import json as json_module
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.admission import EngineExaminer
from actors.cli import DEFAULT_DATA, DataOption
from bus.contract import BusError
from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected
from bus.subjects import MODEL_NAME_LIMIT, escape_model

if TYPE_CHECKING:
    from bus.client import Client

GONE_SECONDS = 30.0

ModelArgument = Annotated[str, typer.Argument(metavar="NAME", help="The model's name in the cell.")]


def _check_name(name: str) -> str:
    if not 1 <= len(name) <= MODEL_NAME_LIMIT or not name.isprintable():
        raise UserError(f"{name!r} is no name of a model: use 1 to {MODEL_NAME_LIMIT} printable characters")
    if (length := len(escape_model(name))) > MODEL_NAME_LIMIT:
        raise UserError(
            f"{name!r} takes {length} characters as a subject token ({escape_model(name)[:12]}…): "
            f"use a shorter name, at most {MODEL_NAME_LIMIT}"
        )
    return name


async def add(
    name: ModelArgument,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A checkpoint in Hugging Face layout.")
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="ADDRESS",
            help="Instead: a packed checkpoint that servers fetch when they need it, http(s):// or a directory.",
        ),
    ] = "",
    data: DataOption = DEFAULT_DATA,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Pack a checkpoint into the data directory and tell the cell, if one runs; or tell it from where to fetch one.

    All or nothing: an interrupted add leaves what was there before. With --from nothing is packed or fetched now: a
    server that needs the model fetches it, and every byte is checked.

    Example: longshore model add llama-a ./samples/llama-a
    Example: longshore model add qwen3 --from http://models.example:8080/qwen3
    """
    from loaders import pack_checkpoint

    _check_name(name)
    if source or directory is None:
        if source and directory is not None:
            raise UserError("give either a directory to pack or --from with where it is fetched, not both")
        if not source:
            raise UserError("give the directory of a checkpoint to pack, or --from with where a packed one is fetched")
        await _add_from(name, source, nats, cell, json)
        return
    destination = data / "models" / escape_model(name)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the data directory {data} cannot be used: {error.strerror}; name another with --data"
        ) from None
    manifest = await asyncio.to_thread(
        pack_checkpoint,
        directory,
        destination,
        progress=_progress(name, json),
        examiner=EngineExaminer(directory),
    )
    told = await _tell(nats, cell, name, manifest.digest)
    if json:
        print(json_module.dumps({"model": name, "bytes": manifest.bytes, "digest": manifest.digest, "served": told}))
    else:
        where = f"cell {cell} serves it" if told else f"no cell {cell} at {nats}: it is found when one starts on {data}"
        millions = manifest.parameters / 1e6
        print(f"packed {name}: {manifest.architecture}, {millions:.1f} million parameters, {manifest.dtype}; {where}")


async def _add_from(name: str, address: str, nats: str, cell: str, json: bool) -> None:
    from actors.model_sources import check_address, find_at_source
    from actors.stopping import Stop
    from actors.store_driver import StorageFailed
    from bus.answer import RequestFailed
    from bus.client import Client
    from loaders import CheckpointError

    if "://" not in address:
        address = str(Path(address).absolute())
    elif address.startswith("file://"):
        address = "/" + address.removeprefix("file://").lstrip("/")
    try:
        manifest, _ = await asyncio.to_thread(find_at_source, check_address(address), Stop())
    except (CheckpointError, StorageFailed) as error:
        raise UserError(f"--from: {error}") from None
    if manifest.kind == "stored":
        raise UserError(f"--from: {address} was packed as stored, which no server can run")
    try:
        async with connected(nats, cell) as bus:
            client = Client(bus, cell)
            await client.add_model(name, address)
            known = await _until(client, lambda models: _is_known(models, name, manifest.digest), 10.0)
    except RequestFailed as failure:
        raise Failure(failure.message) from None
    if not known:
        raise Failure(
            f"no server of cell {cell} took {name} from {address}: see that its servers reach that address, that none "
            f"of them holds another {name}, and the log of a node"
        )
    if json:
        print(json_module.dumps({"model": name, "bytes": manifest.bytes, "digest": manifest.digest, "served": True}))
    else:
        millions = manifest.parameters / 1e6
        print(
            f"added {name}: {manifest.architecture}, {millions:.1f} million parameters, {manifest.dtype}; "
            f"cell {cell} fetches it from {address} when it is needed"
        )


def _is_known(models: list[dict[str, Any]], name: str, digest: str) -> bool:
    return any(one["model"] == name and one["digest"] == digest and one["servers"] for one in models)


def pack(
    source: Annotated[Path, typer.Argument(help="A Hugging Face directory: config.json, tokenizer, weights.")],
    destination: Annotated[
        Path, typer.Argument(help="The packed directory; an older packed checkpoint there is replaced.")
    ],
    as_stored: Annotated[
        bool,
        typer.Option("--as-stored", help="Keep names and dtypes, fp8 included; to be loaded, not to be run."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON object.")] = False,
) -> None:
    """Pack a Hugging Face checkpoint, so that it loads at the speed of the hardware.

    All or nothing: whatever interrupts it, the destination holds the old checkpoint or the new one. What the engine
    cannot run is refused, unless it is packed as stored.

    Example: longshore pack ~/models/Qwen3-0.6B ~/packed/qwen3
    """
    from loaders.cli import pack_and_tell

    pack_and_tell(source, destination, json, EngineExaminer(source), as_stored=as_stored)


def _progress(name: str, hidden: bool) -> Callable[[int, int], None] | None:
    """A bar on stderr for people at a terminal; nothing for programs."""
    import sys

    if hidden or not sys.stderr.isatty():
        return None
    from rich.progress import Progress

    bar = Progress(transient=True)
    task = bar.add_task(f"packing {name}", total=None)
    bar.start()

    def report(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return report


async def _tell(nats: str, cell: str, name: str, digest: str) -> bool:
    """Whether a running cell knows these very bytes now; False where no cell runs."""
    from bus.client import Client

    try:
        async with connected(nats, cell) as bus:
            client = Client(bus, cell)
            await client.add_model(name)
            if await _until(
                client, lambda models: any(m["model"] == name and m["digest"] == digest for m in models), 10.0
            ):
                return True
            if any(m["model"] == name and m["instances"] for m in await client.models()):
                raise Failure(
                    f"{name} is packed, but a worker still runs what was there before, and new requests get that: "
                    f"`longshore model rm {name}`, then add it again"
                )
            raise Failure(
                f"the cell did not find {name}: its nodes look in the models directory of their own --data; "
                "pack it there, or start a node with this --data"
            )
    except (Failure, BusError) as error:
        if "did not find" in str(error) or "is packed, but" in str(error):
            raise
        return False
    except Exception as error:
        from bus.answer import RequestFailed

        if isinstance(error, RequestFailed):
            return False
        raise


async def _until(client: Client, reached: Callable[[list[dict[str, Any]]], bool], seconds: float) -> bool:
    loop = asyncio.get_running_loop()
    limit = loop.time() + seconds
    while not reached(await client.models()):
        if loop.time() > limit:
            return False
        await asyncio.sleep(0.1)
    return True


async def list_models(
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Show the models of a running cell, and where each lies.

    Example: longshore model list --json
    """
    from bus.answer import RequestFailed
    from bus.client import Client

    try:
        async with connected(nats, cell) as bus:
            models = [model for model in await Client(bus, cell).models() if not model["removed"]]
    except RequestFailed as failure:
        raise Failure(failure.message) from None
    if json:
        print(json_module.dumps(models))
        return
    from rich.console import Console
    from rich.table import Table

    from bus.sizes import show_size

    table = Table("model", "architecture", "size", "context", "tiers", "running on")
    for model in models:
        tiers = ", ".join(f"{server} {tier}" for server, tier in model["servers"].items())
        architecture = model.get("architecture", "")
        running = ", ".join(model["instances"]) or "-"
        size = show_size(model["weight_bytes"])
        table.add_row(model["model"], architecture, size, str(model["context"]), tiers, running)
    Console().print(table)


async def remove(
    name: ModelArgument,
    data: DataOption = DEFAULT_DATA,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Remove a model: no new requests, running ones finish, then its packed files are deleted.

    Example: longshore model rm llama-a
    """
    from bus.answer import RequestFailed
    from bus.client import Client

    _check_name(name)
    gone = False
    try:
        async with connected(nats, cell) as bus:
            client = Client(bus, cell)
            await client.remove_model(name)
            gone = await _until(client, lambda models: all(m["model"] != name for m in models), GONE_SECONDS)
    except RequestFailed as failure:
        if failure.code == "unknown_model":
            raise UserError(failure.message) from None
        raise Failure(failure.message) from None
    except Failure:
        packed = data / "models" / escape_model(name)
        if not packed.is_dir():
            raise UserError(f"no cell answers at {nats}, and there is no packed model {name!r} in {data}") from None
        await asyncio.to_thread(shutil.rmtree, packed)
        gone = True
    if json:
        print(json_module.dumps({"model": name, "removed": gone}))
    else:
        print(f"removed {name}" if gone else f"{name} takes no new requests and goes as soon as its running ones end")
