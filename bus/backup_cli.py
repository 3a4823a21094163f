"""`longshore backup` and `longshore restore`: a whole cell in one file, and back onto an empty NATS."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from bus.backup import Contents, Progress


async def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists.")] = False,
    as_json: JsonOption = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
) -> None:
    """Copy all streams of a cell into one file while it runs: the ledger, tokens, submissions, snapshots.

    Checkpoints and configuration files are no part of it.

    Example: longshore backup cell-main.lsbak
    """
    from bus.backup import write_backup

    began = time.monotonic()
    async with connected(nats, cell) as bus:
        with _shown(as_json) as progress:
            contents = await write_backup(file, bus, force=force, progress=progress)
    _say(file, contents, "backed up", time.monotonic() - began, as_json)


async def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `longshore backup` wrote.", show_default=False)],
    replicas: Annotated[
        int, typer.Option(min=0, max=5, help="Copies of each stream in a cluster; 0: as they were.")
    ] = 0,
    as_json: JsonOption = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
) -> None:
    """Make the streams of a backup on a NATS server that has none of this cell. Then start the cell as ever.

    The file is read to its end first: of a damaged one nothing is restored. Sequences and times stay as they are, so
    tokens that are older than the retention of results are gone at once.

    Example: longshore restore cell-main.lsbak --nats nats://10.0.0.7:4222
    """
    from bus.backup import read_contents, restore_backup

    read_contents(file)  # nobody should wait for a connection to hear that the file is damaged
    began = time.monotonic()
    async with connected(nats, cell) as bus:
        with _shown(as_json) as progress:
            contents = await restore_backup(file, bus, replicas=replicas, progress=progress)
    _say(file, contents, "restored", time.monotonic() - began, as_json)


@contextmanager
def _shown(as_json: bool) -> Iterator[Progress | None]:
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.status import Status

    with Status("", console=Console(stderr=True)) as line:
        yield lambda stream, done: line.update(f"{stream}: {done / 1e6:.1f} MB")


def _say(file: Path, contents: Contents, done: str, seconds: float, as_json: bool) -> None:
    streams: list[dict[str, Any]] = [
        {
            "stream": part.name,
            "messages": part.messages,
            "first": part.state.get("first_seq", 0),
            "last": part.state.get("last_seq", 0),
            "bytes": part.length,
        }
        for part in contents.streams
    ]
    if as_json:
        head = {"file": str(file), "cell": contents.cell, "taken_at": contents.taken_at, "seconds": round(seconds, 3)}
        print(json.dumps(head | {"streams": streams}))
        return
    for one in streams:
        print(
            f"{done} {one['stream']}: {one['messages']} messages, {one['first']} to {one['last']}, "
            f"{one['bytes'] / 1e6:.1f} MB"
        )
    print(f"{file}: cell {contents.cell} {done} in {seconds:.1f} s")
