"""Commands of this room: control, up, status, replay. What is heavy is imported inside the functions."""

from __future__ import annotations

import asyncio
import contextlib
import json as json_module
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.config_options import active_file
from bus.errors import UserError
from bus.options import (
    DEFAULT_CELL,
    DEFAULT_NATS,
    CellOption,
    Failure,
    HealthOption,
    JsonOption,
    LogJsonOption,
    NatsOption,
    check_cell_name,
    connected,
    connection,
)

DataOption = Annotated[Path, typer.Option("--data", metavar="DIR", help="Where streams, packed models and logs live.")]
DEFAULT_DATA = Path("data")


def control(
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    silence: Annotated[
        float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="A driver that is silent for so long is lost.")
    ] = 1.0,
    queue_limit: Annotated[int, typer.Option(min=1, help="Requests that may wait for a slot, over all models.")] = 1000,
    retention: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="How long results of ended requests are kept.")
    ] = 3600,
    ledger_limit: Annotated[str, typer.Option(metavar="SIZE", help="Limit of the ledger's stream.")] = "1GiB",
    replicas: Annotated[
        int, typer.Option(min=1, max=5, help="Servers of a NATS cluster that hold each stream: 3 in production.")
    ] = 1,
    snapshot_facts: Annotated[
        int, typer.Option(min=1, metavar="FACTS", help="Facts between two snapshots, at the least.")
    ] = 5000,
    generations: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Where recordings of the ledger's beginning go before it is dropped; without it nothing is dropped.",
        ),
    ] = "",
    rotate_at: Annotated[
        int, typer.Option(min=1, max=79, metavar="PERCENT", help="With --generations: at how much of its limit.")
    ] = 60,
    rotate_keep: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="With --generations: what is younger stays in the ledger.")
    ] = 60.0,
    health: HealthOption = "",
    log_json: LogJsonOption = False,
    known_rules: Annotated[
        str, typer.Option("--known-rules", hidden=True, help="Follow these rule versions only, to try an upgrade: 1,2")
    ] = "",
) -> None:
    """Run one control: a replica of the cell that decides, answers clients and watches drivers.

    Start as many as you like; one leads, the others take over within a fraction of a second.

    Example: longshore control --nats nats://10.0.0.5:4222 --cell main
    """
    from actors.control_process import ControlOptions, run_control
    from bus.logs import configure_logs
    from bus.sizes import parse_size

    check_cell_name(cell)
    configure_logs(as_json=log_json, process="control")
    options = ControlOptions(
        connection(nats),
        cell,
        silence,
        parse_size(ledger_limit, "--ledger-limit"),
        retention,
        queue_limit,
        snapshot_facts=snapshot_facts,
        known_rules=_known_rules(known_rules),
        health=health,
        generations=generations,
        rotate_percent=rotate_at,
        rotate_keep_seconds=rotate_keep,
        replicas=replicas,
    )
    _run(run_control(options))


def _known_rules(text: str) -> tuple[int, ...]:
    from actors.rules import KNOWN_RULES

    wanted = tuple(int(one) for one in text.split(",") if one.strip().isdigit()) if text else KNOWN_RULES
    if not wanted or any(one not in KNOWN_RULES for one in wanted):
        raise UserError(f"--known-rules {text!r}: this program knows {', '.join(map(str, KNOWN_RULES))}")
    return wanted


def up(
    data: DataOption = DEFAULT_DATA,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Servers, each a node process.")] = 2,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Workers per server, one process per device.")] = 2,
    controls: Annotated[int, typer.Option(min=1, max=9, help="Control processes.")] = 1,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="What workers compute on.")] = "cpu",
    nats: Annotated[
        str, typer.Option("--nats", metavar="URL", help="Use this NATS server instead of an embedded one.")
    ] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the embedded server; 0 takes a free one.")
    ] = 4222,
    cell: CellOption = DEFAULT_CELL,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Device memory of each worker.")] = "",
    dram: Annotated[str, typer.Option(metavar="SIZE", help="DRAM budget of each server for checkpoints.")] = "",
    dram_tier: Annotated[
        str, typer.Option(metavar="KIND", help="Where they lie: auto, page-cache, shared-memory, or /DIRECTORY.")
    ] = "auto",
    slots: Annotated[int, typer.Option(min=0, max=1024, help="Sequences per instance at most; 0: the default.")] = 0,
    fsync: Annotated[bool, typer.Option("--fsync", help="The embedded server fsyncs every message.")] = False,
    log_json: LogJsonOption = False,
) -> None:
    """Start a whole cell on this machine and keep it up until SIGTERM or Ctrl-C.

    Example: longshore up --nodes 2 --workers 2 --data ./data
    """
    from actors.up import UpOptions
    from bus.credentials import ConnectionOptions
    from bus.sizes import parse_size

    check_cell_name(cell)
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device!r}: use cpu or cuda")
    for size, option in ((memory, "--memory"), (dram, "--dram")):
        if size:
            parse_size(size, option)
    options = UpOptions(
        data=data.absolute(),
        cell=cell,
        nodes=nodes,
        workers=workers,
        controls=controls,
        device=device,
        nats=connection(nats) if nats else ConnectionOptions(),
        port=port,
        fsync_always=fsync,
        memory=memory,
        dram=dram,
        dram_tier=dram_tier,
        slots=slots,
        config=active_file(),
        log_json=log_json,
    )
    _run(_up(options))


async def _up(options: Any) -> None:
    from rich.console import Console

    from actors.up import CellProcesses
    from bus.jetstream import JetStreamBus

    console = Console(stderr=True)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    stop = asyncio.ensure_future(ending.wait())

    async def keep() -> None:
        async with CellProcesses(options) as cell:
            console.print(f"NATS at {cell.url}; logs in {options.data / 'logs'}")
            bus = await JetStreamBus.connect(cell.connection, options.cell, name="longshore-up", create=True)
            try:
                with console.status("starting workers"):
                    status = await cell.ready(bus)
            finally:
                await bus.close()
            models = ", ".join(status["models"]) or "none yet (longshore model add NAME DIR)"
            console.print(f"cell {options.cell} is up: {_workers(len(status['workers']))}, models: {models}")
            example = f"--nats {cell.url}" if cell.url != DEFAULT_NATS else ""
            example += f" --cell {options.cell}" if options.cell != DEFAULT_CELL else ""
            console.print(f"ask it:   longshore ask MODEL 'prompt' {example}\nwatch it: longshore tail {example}")
            await cell.watch(console.print)

    work = asyncio.ensure_future(keep())
    await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        console.print("stopping")
        work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


async def status(nats: NatsOption = DEFAULT_NATS, cell: CellOption = DEFAULT_CELL, json: JsonOption = False) -> None:
    """Show the cell: servers, workers, what runs where, how many requests there are.

    Example: longshore status --json
    """
    from actors.rules_cli import described, sentence_of
    from actors.up import cell_status
    from bus.service import instances

    async with connected(nats, cell) as bus:
        found, controls = await asyncio.gather(cell_status(bus, cell), instances(bus, cell))
    if found is None and controls:
        raise Failure(f"no control of cell {cell!r} takes part: {'; '.join(map(sentence_of, controls))}")
    if found is None:
        raise Failure(
            f"no control of cell {cell!r} answers at {nats}: start one with `longshore up` or `longshore control`"
        )
    found["controls"] = [described(one) for one in controls]
    if json:
        print(json_module.dumps(found))
        return
    _print_status(found)


def _print_status(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from bus.sizes import show_size

    console = Console()
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(found["requests"].items())) or "none"
    where = f"at ledger sequence {found['position']}, rule version {found['rules']}"
    console.print(f"cell {found['cell']} {where}; requests: {counts}")
    for name, stream in found.get("streams", {}).items():
        if stream["percent"] >= 80:
            room = (
                "see `longshore ledger status`" if name == "ledger" else "old pages expire, or give it a larger limit"
            )
            console.print(f"the stream of the {name} is filled to {stream['percent']} % of its limit: {room}")
    for control in found["controls"]:
        why = f": {control['reason']}" if control["reason"] else ""
        console.print(f"control {control['id']} (process {control['process']}) is {control['state'] or 'there'}{why}")
    servers = Table("server", "up", "DRAM", "models")
    for name, server in found["servers"].items():
        held = ", ".join(f"{model} ({tier})" for model, tier in server["models"].items())
        dram = f"{show_size(server['dram_used_bytes'])} of {show_size(server['dram_bytes'])}"
        dram += f" ({server['dram_tier']})" if server["dram_tier"] else ""
        servers.add_row(name, "yes" if server["up"] else "no", dram, held or "-")
    console.print(servers)
    workers = Table("worker", "device", "process", "memory", "free", "instances")
    for name, worker in found["workers"].items():
        running = ", ".join(
            f"{model} {one['status']} {one['active']}/{one['slots']}" for model, one in worker["instances"].items()
        )
        sizes = show_size(worker["memory_bytes"]), show_size(worker["free_bytes"])
        workers.add_row(name, worker["device"], str(worker["process"]), *sizes, running or "-")
    console.print(workers)
    for model, times in found.get("moves", {}).items():
        line = f"{times['ns_per_token'] / 1e6:.3g} ms per token and {times['fixed_ns'] / 1e6:.3g} ms"
        many = f"{times['moves']} move{'s' if times['moves'] > 1 else ''} of {model}"
        console.print(f"{many} so far: {line}, off by {times['error_ns'] / 1e6:.3g} ms on average")


async def replay(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A recording; the live ledger without it.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every recorded message with what this code computes.")
    ] = False,
    at: Annotated[int, typer.Option("--at", min=0, metavar="SEQ", help="Show the cell after this sequence.")] = 0,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Run the cell over recorded facts: verify its decisions (the default), or show its state at a sequence.

    The first difference is named by sequence, message and field; the exit code is then 1.

    Example: longshore replay incident.lsrec --verify
    Example: longshore replay incident.lsrec --at 1200 --json
    """
    from actors.replay import Verdict
    from actors.replaying import describe_state, replay_live, replay_recording

    if file is not None:
        answer: Any = replay_recording(file, verify=verify or not at, at=at)
    else:
        async with connected(nats, cell) as bus:
            answer = await replay_live(bus, cell, verify=verify or not at, at=at)
    verdict, found = answer
    if found is not None:
        shown = describe_state(found)
        print(json_module.dumps(shown) if json else json_module.dumps(shown, indent=2))
    if verdict is None:
        return
    assert isinstance(verdict, Verdict)
    if json:
        import msgspec

        print(msgspec.json.encode(verdict).decode())
    elif verdict.difference is None:
        begin = f"from the snapshot at {verdict.snapshot} " if verdict.snapshot else ""
        pending = f", {verdict.pending} not yet written at its end" if verdict.pending else ""
        print(
            f"verified: {verdict.verified} messages derived from {verdict.facts} facts are what this code computes, "
            f"{begin}up to ledger sequence {verdict.last_sequence}{pending}"
        )
    else:
        print(f"difference at {verdict.sentence}")
    if verdict.difference is not None:
        raise typer.Exit(1)


def _run(work: Any) -> None:
    """Run on uvloop where there is one; the bus's errors become one sentence."""
    from bus.contract import BusError

    try:
        import uvloop

        uvloop.run(work)
    except ImportError:
        asyncio.run(work)
    except BusError as error:
        raise Failure(str(error)) from None
