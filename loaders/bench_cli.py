"""`longshore bench load`: this room's figures, as a table or as JSON. What is heavy is imported when it runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loaders.errors import CheckpointError

if TYPE_CHECKING:
    from loaders.bench_load import LoadBench

PARTS = ("load", "attach", "http", "together", "first-token")
ABLATION = (
    "safe_open + copy",
    "safetensors load_file",
    "longshore, one thread, buffered, small pages",
    "longshore, one thread, direct, small pages",
    "longshore, direct, small pages",
    "longshore, fresh memory",
    "longshore, pool, checked afterwards",
    "longshore, pool",
)
STEPS = (
    "by tensor",
    "by tensor, mapped",
    "in bulk: one thread, 8 MiB at once",
    "direct, past the page cache",
    "8 threads",
    "huge pages",
    "memory faulted in before",
    "pipeline: each piece checked while others are read",
)
"""What each of ABLATION adds to the one before it."""
TRAPS = (
    "Dropping the page cache leaves the cache of a virtual machine's host: every file was read once before, for every "
    "loader alike.",
    "Memory that lay idle goes back to the host: as much as the model needs was touched and freed before each run.",
    "The disk is probed before and after each run by direct reads of the loader's own files into as much memory on "
    "huge pages: 4 KiB pages and small rings say something else of the same disk.",
)


def bench_load(
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where checkpoints are made and kept for the next time.")
    ] = Path("/tmp/longshore-bench"),
    size: Annotated[
        list[float] | None, typer.Option("--size", metavar="GB", help="Size of the weights; may be given twice.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=100, help="Runs of each loader.")] = 5,
    loader: Annotated[
        list[str] | None, typer.Option("--loader", metavar="NAME", help="Only this one; may be given several times.")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option("--part", metavar="NAME", help=f"Only this part: {', '.join(PARTS)}.")
    ] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Show what each step brings instead.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Leave out the runs from the page cache.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loading beside what people use: each load in a fresh process, the disk probed around it.

    Peers are measured where they are installed (`pip install 'longshore[bench]'`).

    Example: longshore bench load --size 2 --size 6 --runs 5
    """
    import msgspec

    sizes = [int(one * 1e9) for one in size or [2.0]]
    parts = part or (["load"] if ablation or loader else list(PARTS))
    if unknown := [one for one in parts if one not in PARTS]:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    from loaders.bench_loaders import LOADERS

    if unknown := [one for one in loader or () if one not in LOADERS]:
        raise typer.BadParameter(f"there is no loader {unknown[0]!r}: choose of {', '.join(map(repr, LOADERS))}")
    chosen = list(ABLATION) if ablation else loader
    from loaders.bench_machine import describe_machine

    answer: dict[str, Any] = {"machine": describe_machine(folder), "runs": runs}
    measured: dict[str, dict[str, Any]] = {}
    try:
        with _telling() as tell:
            for count in sizes:
                measured[f"{count / 1e9:g} GB"] = _measure(folder, count, runs, chosen, parts, not cold, tell)
    except CheckpointError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if json:
        for found in measured.values():
            found["figures"] = [msgspec.structs.asdict(one) | {"reached": one.reached} for one in found["figures"]]
        typer.echo(msgspec.json.encode(answer | measured).decode())
        return
    for name, found in measured.items():
        _show(name, found, ablation=ablation)


def _measure(
    folder: Path,
    count: int,
    runs: int,
    loaders: list[str] | None,
    parts: list[str],
    warm_too: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    from loaders import bench_load, bench_parts, bench_summary
    from loaders.bench_loaders import LOADERS

    found: dict[str, Any] = {}
    if "load" in parts:
        chosen = loaders or [name for name, loader in LOADERS.items() if not loader.step]
        found["load"] = bench_load.bench_load(folder, count, loaders=chosen, runs=runs, warm_too=warm_too, tell=tell)
    if "attach" in parts:
        found["attach"] = bench_parts.bench_attach(folder, count, runs=runs, tell=tell)
    if {"http", "together", "first-token"} & set(parts):
        packed = bench_load.prepare_paths(folder, count, ["longshore, pool"], tell).packed
        if "http" in parts:
            found["http"] = bench_parts.bench_fetch(folder, packed, runs=runs, tell=tell)
        if "together" in parts:
            second = bench_load.prepare_paths(folder, count * 3 // 4, ["longshore, pool"], tell).packed
            found["together"] = bench_parts.bench_together(packed, second, runs=runs, tell=tell)
        if "first-token" in parts:
            found["first-token"] = bench_parts.bench_first_token(packed, runs=runs, tell=tell)
    found["figures"] = bench_summary.summarise(found)
    return found


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """What is at work now, on stderr: one line that changes for a person, lines for a file."""
    if not sys.stderr.isatty():
        yield lambda sentence: typer.echo(sentence, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def _show(name: str, measured: dict[str, Any], *, ablation: bool) -> None:
    from statistics import median

    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "load" in measured:
        bench = measured["load"]
        console.print(_load_table(name, bench, steps=ablation))
        for loader, reason in bench.failed.items():
            console.print(f"{loader}: {reason}; left out")
        for trap in TRAPS:
            console.print(trap)
    if "attach" in measured:
        table = Table(title=f"{name}: DRAM to usable parameters, milliseconds")
        for heading in ("memory", "tensors", "views", "every page touched"):
            table.add_column(heading, justify="left" if heading == "memory" else "right")
        for row in measured["attach"]:
            table.add_row(row.memory, str(row.tensors), f"{median(row.views_ms):.0f}", f"{median(row.touched_ms):.0f}")
        console.print(table)
    if "http" in measured and measured["http"] is None:
        console.print("http: nginx and curl are not both installed here")
    if (row := measured.get("http")) is not None:
        console.print(f"http: {median(row.ours):.2f} GB/s, curl {median(row.curl):.2f} GB/s")
    if (row := measured.get("first-token")) is not None:
        console.print(
            f"first token, {row.prompt_tokens} tokens in, load {row.load_seconds:.2f} s, prefill "
            f"{row.prefill_seconds:.2f} s: {median(row.after):.2f} s after the load, {median(row.during):.2f} s during"
        )
    for figure in measured["figures"]:
        console.print(str(figure), highlight=False)


def _load_table(name: str, bench: LoadBench, *, steps: bool) -> Any:
    from rich.table import Table

    table = Table(title=f"{name} from disk into memory, medians; {bench.dropped}")
    for heading in ("loader", "version", "cold GB/s", "share of the disk", "warm GB/s", "equal"):
        table.add_column(heading, justify="left" if heading in ("loader", "version") else "right")
    if steps:
        table.add_column("step")
    told = dict(zip(ABLATION, STEPS, strict=True))
    for row in bench.rows:
        cold = [run.gigabytes_per_second for run in row.cold]
        table.add_row(
            row.loader,
            row.version,
            f"{row.median('cold'):.2f} ({min(cold):.2f}-{max(cold):.2f})",
            f"{row.median('share'):.2f}",
            f"{row.median('warm'):.1f}" if row.warm else "-",
            "yes" if row.equal else "NO",
            *([told.get(row.loader, "")] if steps else []),
        )
    return table
