"""`longshore demo`: shows the story of `actors.demo` while it happens."""

from __future__ import annotations

import asyncio
import json as json_module
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.errors import UserError
from bus.options import Failure, JsonOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from actors.demo import Story

EVENTS_SHOWN = 12


def demo(
    json: JsonOption = False,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="FILE", help="Keep the recording for `longshore replay`.")
    ] = None,
) -> None:
    """Play the main job on this machine: loads, evictions, a worker killed in mid-answer, a verified replay.

    Needs nothing but this program: it makes its models, starts its own NATS server, and leaves nothing behind.

    Example: longshore demo --record demo.lsrec && longshore replay demo.lsrec --verify
    """
    from bus.contract import BusError

    if record is not None and record.exists():
        raise UserError(f"{record} exists already: name another file for --record")
    with tempfile.TemporaryDirectory(prefix="longshore-demo-") as folder:
        data = Path(folder)
        try:
            found = asyncio.run(_show(data, json, record or data / "demo.lsrec"))
        except BusError as error:
            raise Failure(str(error)) from None
    if json:
        print(json_module.dumps(found))
    if found["divergences"] or found["finished"] != found["requests"] or found["positions_lost"]:
        raise typer.Exit(1)


async def _show(data: Path, as_json: bool, recording: Path) -> dict[str, Any]:
    from rich.console import Console

    from actors.demo import Story, run_demo

    story = Story()
    console = Console(stderr=as_json)
    if not console.is_terminal:
        printed = 0

        def lines() -> None:
            nonlocal printed
            for event in story.events[printed:]:
                print(event, file=sys.stderr if as_json else sys.stdout, flush=True)
            printed = len(story.events)

        story.on_change = lines
        found = await run_demo(data, story, recording=recording)
    else:
        from rich.live import Live

        with Live(console=console, refresh_per_second=10, get_renderable=lambda: _picture(story)):
            found = await run_demo(data, story, recording=recording)
    if not as_json:
        _tell(console, story, found)
    return found


def _picture(story: Story) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "no", "model", "worker", "start from", "TTFT", "tokens", "tok/s", "attempt", "end", "text", expand=True
    )
    for asked in story.asked[-32:]:
        table.add_row(
            str(asked.number),
            asked.model,
            asked.worker or "-",
            asked.tier or "waiting",
            f"{asked.ttft_ms:.0f} ms" if asked.first else "-",
            f"{asked.positions}/{asked.max_tokens}",
            f"{asked.tokens_per_second:.0f}" if asked.positions > 1 else "-",
            str(asked.attempts or "-"),
            asked.end or "-",
            Text(asked.text[-30:].replace("\n", " "), no_wrap=True, overflow="ellipsis"),
        )
    events = [Text(event, no_wrap=True, overflow="ellipsis", style="dim") for event in story.events[-EVENTS_SHOWN:]]
    return Group(Text(story.stage, style="bold"), *([table] if story.asked else []), *events)


def _tell(console: Any, story: Story, found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("instance start", "worker", "weights from", "start-up time")
    for start in found["instance_starts"]:
        table.add_row(start["model"], start["worker"], start["tier"], f"{start['start_ms']:.0f} ms")
    console.print(table)
    tiers = ", ".join(f"{count} from {tier}" for tier, count in found["starts_by_tier"].items())
    ttft = found["ttft_ms"]
    console.print(f"{found['finished']} of {found['requests']} requests finished ({tiers})")
    console.print(
        f"TTFT p50 {ttft['p50']:.0f} ms, p99 {ttft['p99']:.0f} ms; {found['tokens_per_second']:.0f} tokens/s per answer"
    )
    console.print(
        f"killed {found['killed_worker']} with {found['answers_on_killed_worker']} answers under way: "
        f"{found['answers_moved']} went on elsewhere; positions lost {found['positions_lost']}, "
        f"repeated {found['positions_repeated']}"
    )
    if found["divergences"]:
        console.print(f"replay found a difference: {found['difference']}", style="bold red")
    else:
        console.print(
            f"replayed the ledger: {found['decisions_verified']} decisions verified, 0 divergences; "
            f"{found['seconds']:.0f} s in all",
            style="bold green",
        )
