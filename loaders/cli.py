"""`longshore verify`, and the half of `longshore pack` that knows nothing of engines. What is heavy is imported when a
command runs, so that `--help` is quick.
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


def pack_and_tell(source: Path, destination: Path, json: bool, examiner: Examiner | None = None) -> None:
    """What `longshore pack` does: packs, and says in one line what came of it."""
    import msgspec

    from loaders import CheckpointError, pack_checkpoint

    try:
        with _progress(f"Packing {source.name}", hidden=json) as report:
            manifest = pack_checkpoint(source, destination, progress=report, examiner=examiner)
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
    path: Annotated[Path, typer.Argument(help="A packed directory.")],
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
