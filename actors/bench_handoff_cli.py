"""`longshore bench handoff`: the gap that the reader of a moved answer sees."""

from __future__ import annotations

import json as json_module
import platform
from typing import Annotated, Any

import typer

from bus.errors import UserError
from bus.options import Failure, JsonOption

REACH_STEPS = 3.0
REACH_BYTES = 8192
LONGEST = 2048


def bench_handoff(
    contexts: Annotated[
        str, typer.Option(metavar="TOKENS[,TOKENS]", help="Prompt lengths, 16 to 2048 tokens each.")
    ] = "128,512,1024,2048",
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Moves per length and way.")] = 3,
    size: Annotated[str, typer.Option(metavar="PARAMETERS", help="Of the sample model, such as 60M.")] = "60M",
    json: JsonOption = False,
) -> None:
    """The longest gap that the reader of a moved answer sees, in steps of the answer, beside stop and recompute.

    One thread per worker. Everything that stands in the ledger for a move is counted as its hand-off messages.

    Example: longshore bench handoff --contexts 128,2048 --rounds 1 --json
    """
    import uvloop
    from rich.console import Console

    from actors.bench_handoff import bench_handoff as measure
    from bus.contract import BusError
    from bus.sizes import parse_size

    lengths = _lengths(contexts)
    console = Console(stderr=True, highlight=False)
    try:
        found = uvloop.run(measure(lengths, rounds, parse_size(size, "--size"), console.print))
    except BusError as error:
        raise Failure(str(error)) from None
    except TimeoutError:
        raise Failure("an answer of the bench did not move in time: the machine may be too busy") from None
    found |= {"python": platform.python_version(), "reach": {"steps": REACH_STEPS, "bytes_per_1000": REACH_BYTES}}
    found["reached"] = all(row["steps_max"] <= REACH_STEPS for row in found["moved"])
    if json:
        print(json_module.dumps(found))
        return
    _print(found)


def _lengths(text: str) -> list[int]:
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(16 <= one <= LONGEST for one in found):
        raise UserError(f"--contexts {text!r}: give numbers of tokens from 16 to {LONGEST}, separated by commas")
    return found


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "context", "way", "gap median", "max", "step meanwhile", "gap in steps", "max", "reach", "step before",
        "move", "catch-up rounds", "tokens in them", "ledger bytes", title="bench handoff (milliseconds)",
    )  # fmt: skip
    for pair in zip(found["moved"], found["recomputed"], strict=True):
        for way, row in zip(("moved", "stop and recompute"), pair, strict=True):
            gap = row["gap_ms"]
            table.add_row(
                str(row["context"]), way, f"{gap['median']:.1f}", f"{gap['max']:.1f}", f"{row['step_ms']:.1f}",
                f"{row['steps']:.2f}", f"{row['steps_max']:.2f}", f"{REACH_STEPS:g}" if way == "moved" else "-",
                f"{row['calm_step_ms']:.1f}", f"{row['move_ms']:.0f}", str(row["catch_up_rounds"]),
                str(row["caught_up_tokens"]), str(row["ledger_bytes"]),
            )  # fmt: skip
    Console().print(table)
