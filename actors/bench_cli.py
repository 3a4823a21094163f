"""`longshore bench bus | replay | restart | start`: figures of this room, each as a table and as JSON."""

from __future__ import annotations

import json as json_module
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.options import Failure, JsonOption


def bench_replay(
    messages: Annotated[int, typer.Option(min=1000, help="Messages in the recording.")] = 100_000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often it is verified; the median counts.")] = 5,
    json: JsonOption = False,
) -> None:
    """How many messages per second a replay reads and verifies.

    Example: longshore bench replay --json
    """
    from actors.bench_replay import bench_replay as measure

    found = measure(messages, rounds) | {"python": platform.python_version(), "reach": {"derived_per_second": 50_000}}
    if json:
        print(json_module.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("recording", "read", "verified", "derived messages verified", "reach", title="bench replay")
    table.add_row(
        f"{found['messages']:,} messages, {found['facts']:,} of them facts",
        f"{found['read_per_second']:,}/s",
        f"{found['messages_per_second']:,}/s in all ({found['verified_seconds']} s)",
        f"{found['derived_per_second']:,}/s",
        "50,000/s",
    )
    Console().print(table)


def bench_bus(
    rate: Annotated[float, typer.Option(min=1, max=10_000, help="Requests per second, stub engine.")] = 100.0,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="How long each setting is measured.")] = 20.0,
    max_tokens: Annotated[int, typer.Option(min=1, max=1000, help="Tokens per answer.")] = 4,
    real: Annotated[bool, typer.Option("--real/--no-real", help="Measure the real engine, too.")] = True,
    json: JsonOption = False,
) -> None:
    """Time from publishing a request to its first chunk, with fsync always and with the server's default.

    Example: longshore bench bus --seconds 10 --json
    """
    import uvloop

    from bus.contract import BusError

    try:
        found = uvloop.run(_bench_bus(rate, seconds, max_tokens, real))
    except BusError as error:
        raise Failure(str(error)) from None
    if json:
        print(json_module.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "setting", "requests", "first chunk p50", "p90", "p99", "max", "reach", title="bench bus (milliseconds)"
    )
    for name, row in found["settings"].items():
        spread = row["first_chunk_ms"]
        reach = "p50 3, p99 10" if name == "stub, fsync always" else "-"
        table.add_row(name, str(row["requests"]), *(f"{spread[k]:.2f}" for k in ("p50", "p90", "p99", "max")), reach)
    Console().print(table)
    for name, row in found["settings"].items():
        if "primitives_ms" in row:
            parts = row["primitives_ms"]
            print(
                f"{name}: at this pace a bare request and reply takes {parts['request_reply']} ms, a bare append "
                f"{parts['append']} ms; one of the first and three of the second are {parts['chain']} ms, "
                f"p50 is {row['p50_over_chain']} of that"
            )
    print(f"one write and fsync of 512 bytes takes {found['fsync_ms']} ms (median)")


async def _bench_bus(rate: float, seconds: float, max_tokens: int, real: bool) -> dict[str, Any]:
    from actors.bench_bus import bench_real, bench_stub, probe_fsync

    settings: dict[str, Any] = {}
    for name, fsync in (("stub, fsync always", True), ("stub, default", False)):
        settings[name] = await bench_stub(fsync=fsync, rate=rate, seconds=seconds, max_tokens=max_tokens)
    if real:
        found = await bench_real(fsync=True, seconds=seconds, max_tokens=max_tokens, parameters=8_000_000)
        settings["real engine, 8 million parameters, fsync always"] = found
    return {"rate": rate, "fsync_ms": await probe_fsync(), "settings": settings, "python": platform.python_version()}


def bench_restart(
    messages: Annotated[int, typer.Option(min=1000, help="Messages in the ledger before the snapshot.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Starts from the snapshot; the median counts.")] = 5,
    json: JsonOption = False,
) -> None:
    """How long a control takes to start behind a long ledger: from its beginning, and from a snapshot with the longest
    tail that a running cell leaves behind one.

    Example: longshore bench restart --messages 100000
    """
    import uvloop
    from rich.console import Console

    from actors.bench_restart import bench_restart as measure
    from bus.contract import BusError

    console = Console(stderr=True, highlight=False)
    try:
        found = uvloop.run(measure(messages, rounds, console.print))
    except BusError as error:
        raise Failure(str(error)) from None
    found |= {"python": platform.python_version(), "reach": {"start_seconds": 5.0}}
    if json:
        print(json_module.dumps(found))
        return
    from rich.table import Table

    table = Table("start of a control", "seconds", "reach", title="bench restart")
    table.add_row("of an empty cell", f"{found['empty_start_seconds']}", "-")
    table.add_row(f"from the beginning of {found['messages']:,} messages", f"{found['from_beginning_seconds']}", "-")
    what = f"from a snapshot of {found['snapshot_bytes'] / 1e6:.1f} MB, {found['tail_messages']:,} messages behind it"
    spread = f"{found['start_seconds']} ({found['min_start_seconds']} to {found['max_start_seconds']})"
    table.add_row(what, spread, "5")
    Console().print(table)
    size = f"{found['captured_bytes'] / 1e6:.1f} MB"
    print(f"to take a snapshot of {size}, a control stops for {found['capture_pause_ms']} ms")


def bench_start(
    sizes: Annotated[str, typer.Option(metavar="SIZE[,SIZE]", help="Bytes of weights, in bfloat16.")] = "1GB,6GB",
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Starts per size; the median counts.")] = 5,
    threads: Annotated[
        int, typer.Option(min=0, max=1024, help="Threads of the worker; 0: the default. 1 is steadier beside others.")
    ] = 0,
    cold: Annotated[bool, typer.Option("--cold", help="Start from the SSD, begun during and after the load.")] = False,
    dram_tier: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="With --cold, where it is brought, as `node` takes it: page-cache and so on."
        ),
    ] = "auto",
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Where the models are made; needs twice their size.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """How long a start from DRAM takes on an idle worker: a request's first chunk, beside that of the same request on
    the running instance, and beside `from_pretrained`.

    With `--cold` it lies on the SSD alone, dropped from the page cache, and the prompt has 120 words: a request's first
    chunk where the worker begins while the model is brought to DRAM, beside that where it begins afterwards, in turn.

    Example: longshore bench start --sizes 1GB
    Example: longshore bench start --cold --sizes 2GB --dram-tier page-cache --json
    """
    import tempfile

    import uvloop
    from rich.console import Console

    from actors.bench_cold_start import bench_cold_start
    from actors.bench_start import bench_start as measure
    from bus.contract import BusError
    from bus.errors import UserError
    from bus.sizes import parse_size

    if dram_tier != "auto" and not cold:
        raise UserError("--dram-tier is for --cold: without it the model is in DRAM before anything is measured")
    console = Console(stderr=True, highlight=False)
    found = []
    for size in sizes.split(","):
        parameters = parse_size(size, "--sizes") // 2
        with tempfile.TemporaryDirectory(prefix="longshore-bench-", dir=folder) as name:
            try:
                if cold:
                    work = bench_cold_start(parameters, rounds, threads, dram_tier, Path(name), console.print)
                else:
                    work = measure(parameters, rounds, threads, Path(name), console.print)
                found.append(uvloop.run(work))
            except BusError as error:
                raise Failure(str(error)) from None
            except TimeoutError:
                raise Failure("a request of the bench was not answered in time: the machine may be too busy") from None
    if cold:
        if json:
            print(json_module.dumps({"sizes": found, "python": platform.python_version()}))
        else:
            _print_cold(found)
        return
    if json:
        print(json_module.dumps({"sizes": found, "python": platform.python_version(), "reach": {"start_ms": 60}}))
        return
    from rich.table import Table

    table = Table(
        "weights", "first chunk", "on the running instance", "start costs", "reach", "waits for the start",
        "usable after", "from_pretrained, first call", "second", "pages mapped",
        title="bench start (milliseconds, medians)",
    )  # fmt: skip
    for one in found:
        start = one["start"]
        pages = f"{start['mapped_share']:.0%}, {start['huge_share']:.0%} of them huge"
        shown = [start["first_chunk_ms"], start["attached_first_chunk_ms"], start["start_ms"]]
        waits = start["waited_ms"] - start["attached_waited_ms"]
        others = [waits, start["usable_at_ms"], one["pretrained_first_ms"], one["pretrained_second_ms"]]
        table.add_row(
            f"{one['bytes'] / 1e9:.2f} GB", *(f"{ms:.1f}" for ms in shown), "60", *(f"{ms:.1f}" for ms in others), pages
        )
    Console().print(table)


def _print_cold(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "weights", "DRAM tier", "prompt", "begun", "first chunk", "range", "load", "prefill after it",
        title="bench start --cold (milliseconds, medians)",
    )  # fmt: skip
    for one in found:
        of_model = (f"{one['bytes'] / 1e9:.2f} GB", one["dram_tier"], f"{one['prompt_tokens']} tokens")
        for way, row in one["ways"].items():
            spread = f"{row['first_chunk_min_ms']:.0f} to {row['first_chunk_max_ms']:.0f}"
            shown = (f"{row[name]:.0f}" for name in ("load_ms", "prefill_ms"))
            table.add_row(*of_model, way, f"{row['first_chunk_ms']:.0f}", spread, *shown)
    Console().print(table)
    same = all(one["tokens_equal"] for one in found)
    print("every start of a size gave the same tokens" if same else "NOT every start of a size gave the same tokens")
