"""The commands of this room for checkpoints, and the half of `longshore pack` that knows nothing of engines.

What is heavy is imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from loaders.conversion import Examiner


def pack_and_tell(
    source: Path, destination: Path, json: bool, examiner: Examiner | None = None, *, as_stored: bool = False
) -> None:
    """What `longshore pack` does: packs, and says in one line what came of it."""
    import msgspec

    from loaders import CheckpointError, pack_checkpoint

    try:
        with _progress(f"Packing {source.name}", hidden=json) as report:
            manifest = pack_checkpoint(
                source, destination, progress=report, examiner=None if as_stored else examiner, as_stored=as_stored
            )
    except CheckpointError as error:
        _fail(str(error), json)
    if json:
        typer.echo(msgspec.json.encode(manifest).decode())
    else:
        typer.echo(
            f"Packed {manifest.architecture}: {manifest.parameters / 1e6:,.1f} million parameters, "
            f"{manifest.bytes / 1e9:.2f} GB, {manifest.dtype}, in {destination}"
        )


def verify(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A packed directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Check every byte of a packed checkpoint; name the damaged chunks and tensors, and exit with 1.

    Example: longshore verify ~/packed/qwen3
    """
    import msgspec

    from loaders import CheckpointError, verify_checkpoint

    try:
        with _progress(f"Verifying {path.name}", hidden=json) as report:
            result = verify_checkpoint(path, progress=report)
    except CheckpointError as error:
        _fail(str(error), json)
    if json:
        typer.echo(msgspec.json.encode(result).decode())
    else:
        typer.echo(
            f"{path} is whole: {result.chunks} chunks, {result.bytes / 1e9:.2f} GB in {result.seconds:.2f} s "
            f"({result.gigabytes_per_second:.1f} GB/s, {result.pages} pages)"
        )


def fetch(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A packed directory, or its http(s):// address.")],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DESTINATION", help="The packed directory; an older packed checkpoint there is replaced."
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Fetch a packed checkpoint from elsewhere, every chunk checked on its way; all of it or nothing.

    Called again after a failure it goes on where that one stopped, from any source that has the same weights.

    Example: longshore fetch https://models.example.org/qwen3 ~/packed/qwen3
    """
    import msgspec

    from loaders import CheckpointError, fetch_checkpoint

    try:
        with _progress(f"Fetching {source.rstrip('/').rpartition('/')[2]}", hidden=json) as report:
            result = fetch_checkpoint(source, destination, progress=report)
    except CheckpointError as error:
        _fail(str(error), json)
    if json:
        typer.echo(msgspec.json.encode(result).decode())
    else:
        kept = f", {result.kept_bytes / 1e9:.2f} GB of it had come before" if result.kept_bytes else ""
        what = f"Fetched {result.bytes / 1e9:.2f} GB{kept} in {result.seconds:.2f} s"
        typer.echo(f"{what} to {destination}; {result.advice}")


def load(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A packed directory, or a plain one with safetensors.")],
    verify: Annotated[bool, typer.Option(help="Check the chunks of a packed directory on their way.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Load a checkpoint into memory once, and say how long each stage took and which was the limit.

    Example: longshore load ~/packed/qwen3
    """
    import msgspec

    from loaders import CheckpointError, load_checkpoint

    try:
        with _progress(f"Loading {path.name}", hidden=json) as progress:
            loaded = load_checkpoint(path, verify=verify, progress=progress)
    except CheckpointError as error:
        _fail(str(error), json)
    report = loaded.report
    if json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    typer.echo(
        f"{len(loaded.tensors)} tensors, {report.bytes / 1e9:.2f} GB in {report.seconds:.2f} s: "
        f"{report.gigabytes_per_second:.2f} GB/s, read {report.way}, {'' if report.verified else 'not '}checked, "
        f"{'huge' if report.huge_pages else 'small'} pages"
    )
    for name, stage in report.stages.items():
        typer.echo(f"  {name}: {stage.seconds:.2f} s over {stage.threads} threads")
    typer.echo(f"  the limit was: {report.limit}{f' ({report.advice})' if report.advice else ''}")


def doctor_memory(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Where models lie, or are to lie.")] = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find out what this system grants for weights in memory, and what setting would be better.

    Example: longshore doctor memory --data /srv/longshore
    """
    import msgspec

    from loaders import CheckpointError
    from loaders.doctor import examine_memory

    try:
        report = examine_memory(data)
    except CheckpointError as error:
        _fail(str(error), json)
    if json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    for finding in report.findings:
        typer.echo(f"{'+' if finding.huge_pages else '-'} {finding.kind}: {finding.found}")
        if finding.advice:
            typer.echo(f"    better: {finding.advice}")
    typer.echo(f"{'+' if report.direct_reads else '-'} direct reads: {'work' if report.direct_reads else 'not'} here")
    typer.echo(f"weights are kept in: {report.best}")


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr where a person watches; None otherwise."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _fail(sentence: str, json: bool) -> NoReturn:
    """One sentence on stderr (with --json also an object with `error` on stdout), exit code 1."""
    if json:
        import msgspec

        typer.echo(msgspec.json.encode({"error": sentence}).decode())
    typer.echo(sentence, err=True)
    raise typer.Exit(1)
