"""`longshore ledger status | snapshot | rotate | limit`: how full the ledger is, and what an operator does about it."""

from __future__ import annotations

import asyncio
import json as json_module
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from bus.jetstream import JetStreamBus

SNAPSHOT_SECONDS = 30.0


async def status(nats: NatsOption = DEFAULT_NATS, cell: CellOption = DEFAULT_CELL, json: JsonOption = False) -> None:
    """Show how full the streams of a cell are, and which snapshots a control could start from.

    Example: longshore ledger status --json
    """
    from bus.contract import Log
    from bus.snapshots import SnapshotStore, agrees

    async with connected(nats, cell) as bus:
        logs: dict[str, Log] = {"ledger": bus.ledger, "tokens": bus.tokens, "snapshots": bus.snapshots}
        streams = {name: await log.usage() for name, log in logs.items()}
        found = []
        for one in await SnapshotStore(bus.snapshots, bus.subjects).manifests():
            usable = one.position + 1 >= streams["ledger"].first_sequence and await agrees(bus.ledger, one)
            age = max(0, bus.wall() - one.written_at) // 1_000_000_000
            found.append({"position": one.position, "bytes": one.bytes, "facts": one.facts, "age_seconds": age,
                          "rules": one.rules, "usable": usable})  # fmt: skip
    rows = {
        name: {
            "messages": usage.messages, "bytes": usage.stored_bytes, "limit_bytes": usage.limit_bytes,
            "percent": usage.stored_bytes * 100 // usage.limit_bytes if usage.limit_bytes else 0,
            "first": usage.first_sequence, "last": usage.last_sequence,
        }
        for name, usage in streams.items()
    }  # fmt: skip
    if json:
        print(json_module.dumps({"cell": cell, "streams": rows, "snapshots": found}))
        return
    _show_status(rows, found)


def _show_status(rows: dict[str, dict[str, Any]], found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from bus.sizes import show_size

    console = Console()
    streams = Table("stream", "messages", "sequences", "size", "limit", "filled")
    for name, row in rows.items():
        limit = show_size(row["limit_bytes"]) if row["limit_bytes"] else "none"
        filled = f"{row['percent']} %" if row["limit_bytes"] else "-"
        sequences = f"{row['first']} to {row['last']}"
        streams.add_row(name, str(row["messages"]), sequences, show_size(row["bytes"]), limit, filled)
    console.print(streams)
    snapshots = Table("snapshot at", "size", "rule version", "age", "a control can start from it")
    for one in found:
        usable = "yes" if one["usable"] else "no: it belongs to another ledger, or its tail is gone"
        snapshots.add_row(
            str(one["position"]), show_size(one["bytes"]), str(one["rules"]), f"{one['age_seconds']} s", usable
        )
    console.print(snapshots)
    percent = rows["ledger"]["percent"]
    if percent >= 80:
        refused = "what must be said finds no room" if percent >= 99 else "new requests are refused"
        console.print(
            f"the ledger is filled to {percent} %: {refused}; `longshore ledger rotate --to DIR` drops what is old, "
            "`longshore ledger limit SIZE` gives it more"
        )


async def snapshot(nats: NatsOption = DEFAULT_NATS, cell: CellOption = DEFAULT_CELL, json: JsonOption = False) -> None:
    """Have a control take a snapshot now, and wait until it is stored.

    Example: longshore ledger snapshot
    """
    async with connected(nats, cell) as bus:
        position = await take_snapshot(bus, cell)
    print(json_module.dumps({"position": position}) if json else f"a snapshot at ledger sequence {position} is stored")


async def take_snapshot(bus: JetStreamBus, cell: str) -> int:
    """The ledger position of the newest snapshot, once a control has taken one (where there is anything new)."""
    from bus.contract import NoAnswer, NoResponders
    from bus.replies import Status, decode_reply
    from bus.snapshots import SnapshotStore

    store = SnapshotStore(bus.snapshots, bus.subjects)
    before = next(iter(await store.manifests()), None)
    try:
        reply = decode_reply((await bus.request(bus.subjects.admin("snapshot"), b"", timeout=5.0)).payload)
    except (NoAnswer, NoResponders):
        raise Failure(f"no control of cell {cell!r} answers: start one with `longshore control`") from None
    if not isinstance(reply, Status) or reply.status != "accepted":
        reason = reply.error.message if isinstance(reply, Status) and reply.error is not None else "it gave no reason"
        raise Failure(f"no snapshot can be taken now: {reason}")
    until = time.monotonic() + SNAPSHOT_SECONDS
    while time.monotonic() < until:
        newest = next(iter(await store.manifests()), None)
        if newest is not None and newest != before:
            return newest.position
        await asyncio.sleep(0.1)
    if before is None:
        raise Failure(f"no snapshot was stored within {SNAPSHOT_SECONDS:g} s: look at the controls' logs")
    return before.position


async def rotate(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where recordings go.", show_default=False)],
    keep: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="What is younger stays in the ledger.")] = 60.0,
    least: Annotated[
        int, typer.Option(min=0, max=100, metavar="PERCENT", help="Do nothing where less of the ledger would go.")
    ] = 0,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Make a generation: record the ledger's beginning, verify the recording, drop it from the ledger.

    The cell goes on meanwhile. Whatever interrupts this, run it again: nothing is dropped before the recording on the
    disk was replayed and found to say what the ledger did. Recordings name their cell and the sequences in them; the
    state in DIR/*.lssnap is what the next one begins with.

    Example: longshore ledger rotate --to /var/lib/longshore/generations
    """
    from actors.generations import rotate as make
    from actors.readback import Difference

    def say(text: str) -> None:
        if not json:
            print(text, file=sys.stderr)

    async with connected(nats, cell) as bus:
        try:
            made = await make(bus, cell, to, keep_seconds=keep, least_percent=least, say=say)
        except Difference as error:
            raise Failure(f"the recording does not say what this code computes, nothing was dropped: {error}") from None
        except OSError as error:
            raise UserError(f"{to} cannot be used: {error.strerror}; name another directory with --to") from None
    if json:
        import msgspec

        print(msgspec.json.encode(made).decode())
        return
    print(
        f"{made.recording}: sequences {made.first} to {made.last}, {made.verified} messages verified; "
        f"the ledger begins at {made.dropped + 1} now"
    )
    if made.held_back_by:
        print(
            f"request {made.held_back_by} has not ended and was accepted before {made.cut}: what comes behind it stays "
            "until it ends"
        )


async def limit(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Such as 4GiB.", show_default=False)],
    tokens: Annotated[bool, typer.Option("--tokens", help="Of the stream of tokens instead of the ledger.")] = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Give the ledger (or the stream of tokens) another limit. What is refused for want of room goes on by itself.

    Example: longshore ledger limit 4GiB
    """
    from bus.jetstream_api import call, stream_info
    from bus.sizes import parse_size, show_size

    wanted = parse_size(size, "SIZE")
    async with connected(nats, cell) as bus:
        stream = bus.subjects.tokens_stream if tokens else bus.subjects.ledger_stream
        info = await stream_info(bus.raw, stream)
        used = info["state"]["bytes"]
        if wanted <= used:
            raise UserError(f"{stream} holds {show_size(used)} already: give it more than that, not {size}")
        await call(bus.raw, f"STREAM.UPDATE.{stream}", info["config"] | {"max_bytes": wanted})
    if json:
        print(json_module.dumps({"stream": stream, "limit_bytes": wanted, "bytes": used}))
    else:
        print(f"{stream} may hold {show_size(wanted)} now; it holds {show_size(used)}")
