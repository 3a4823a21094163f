"""`longshore node`: one server of a cell. What is heavy is imported inside the function."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bus.errors import UserError
from bus.options import (
    DEFAULT_CELL,
    DEFAULT_NATS,
    CellOption,
    Failure,
    HealthOption,
    LogJsonOption,
    NatsOption,
    check_cell_name,
    connection,
)

DEFAULT_DATA = Path("data")
DEFAULT_SLOTS = 16
WORKERS_SHARE = 0.4
DRAM_SHARE = 0.4
"""Of this server's memory, where nothing else is said: for all its workers, and for its storage tier."""
CUDA_SHARE = 0.9


def node(
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    server: Annotated[str, typer.Option(metavar="NAME", help="This server's name, unique in the cell.")] = "s1",
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Packed models lie in DIR/models (see `longshore model add`).")
    ] = DEFAULT_DATA,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Worker processes, one per device.")] = 1,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Weights and KV cache of each worker, such as 2GB; by default a share.")
    ] = "",
    dram: Annotated[
        str, typer.Option(metavar="SIZE", help="Models kept in memory on this server; by default a share.")
    ] = "",
    ssd: Annotated[
        str,
        typer.Option(metavar="SIZE", help="What packed models may take of this server's disk; no bound by default."),
    ] = "",
    serve_models: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Let other servers fetch packed models there, by http, without login."),
    ] = "",
    dram_tier: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Where they lie: auto, page-cache, shared-memory, or a directory in a tmpfs (see `doctor memory`).",
        ),
    ] = "auto",
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Sequences of one model at once.")] = DEFAULT_SLOTS,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where models compute.")] = "cpu",
    threads: Annotated[
        int, typer.Option(min=0, max=1024, help="Threads of each worker's steps; 0: cores divided by workers.")
    ] = 0,
    context: Annotated[
        int, typer.Option(min=2, max=1_048_576, metavar="TOKENS", help="Longest sequence, prompt and answer together.")
    ] = 4096,
    health: HealthOption = "",
    log_json: LogJsonOption = False,
    catch_up: Annotated[
        bool,
        typer.Option("--catch-up/--no-catch-up", hidden=True, help="No: what moves here stops first; for benches."),
    ] = True,
    start_early: Annotated[
        bool,
        typer.Option("--start-early/--no-start-early", hidden=True, help="No: models begin when all is in DRAM."),
    ] = True,
) -> None:
    """Run one server of a cell: its storage tiers and its workers, restarted when they die.

    Example: longshore node --nats nats://10.0.0.5:4222 --server s2 --workers 2 --data /srv/longshore --memory 16GB
    """
    check_cell_name(cell)
    _check_server(server)
    _check_device(device, workers)

    import uvloop

    from actors.node import NodeOptions, run_node
    from bus.contract import BusError
    from bus.logs import configure_logs
    from bus.sizes import parse_size

    options = NodeOptions(
        nats=connection(nats),
        cell=cell,
        server=server,
        data=data.absolute(),
        workers=workers,
        memory_bytes=parse_size(memory, "--memory") if memory else _memory_of_worker(device, workers),
        dram_bytes=parse_size(dram, "--dram") if dram else int(_memory_of_server() * DRAM_SHARE),
        dram_tier=dram_tier,
        slots=slots,
        device=device,
        threads=threads or max(1, len(os.sched_getaffinity(0)) // workers),
        context=context,
        log_json=log_json,
        health=health,
        ssd_bytes=parse_size(ssd, "--ssd") if ssd else 0,
        serve_models=serve_models,
        catch_up=catch_up,
        start_early=start_early,
    )
    _make_models_directory(options.models)
    configure_logs(as_json=log_json, process=f"node {server}")
    try:
        uvloop.run(run_node(options))
    except BusError as error:
        raise Failure(str(error)) from None
    except ValueError as error:
        raise UserError(f"--nats {nats!r} is no address of a NATS server ({error}): write nats://HOST:PORT") from None


def _check_server(server: str) -> None:
    from bus.subjects import valid_name

    if not valid_name(server):
        raise UserError(f"--server {server!r} is no name of a server: use 1 to 63 letters, digits, '-' and '_'")


def _check_device(device: str, workers: int) -> None:
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device!r} is not known: use cpu or cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no usable CUDA device here, use --device cpu")
        if torch.cuda.device_count() < workers:
            raise UserError(
                f"--workers {workers}: there are {torch.cuda.device_count()} CUDA devices, and a worker takes one each"
            )


def _make_models_directory(models: Path) -> None:
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the data directory {models.parent} cannot be used: {error.strerror}; name another with --data"
        ) from None


def _memory_of_server() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_of_worker(device: str, workers: int) -> int:
    if device == "cuda":
        import torch

        smallest = min(torch.cuda.get_device_properties(index).total_memory for index in range(workers))
        return int(smallest * CUDA_SHARE)
    return int(_memory_of_server() * WORKERS_SHARE) // workers
