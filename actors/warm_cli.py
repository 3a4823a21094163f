"""`longshore model warm`: a model is brought to DRAM before requests come."""

from __future__ import annotations

import asyncio
import json as json_module
import sys
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from bus.contract import Bus
    from bus.messages import ModelWarmed, WarmModel
    from bus.subjects import Subjects

ANSWER_SECONDS = 10.0
"""For control to say where the model is brought, or that it cannot be."""


async def warm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model's name in the cell.")],
    server: Annotated[
        str, typer.Option(metavar="SERVER", help="Bring it there; else where it is in memory soonest.")
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Return when it lies in DRAM.")] = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Bring a model to DRAM before requests come, through the SSD where it lies elsewhere.

    It makes room by the rules by which a start does, goes behind every load that somebody waits for, and is not kept:
    what is wanted more may take its place. Once in DRAM its first request waits for the attach alone.

    Example: longshore model warm llama-a
    Example: longshore model warm qwen3 --server s2 --wait
    """
    from bus.answer import RequestFailed
    from bus.client import Client
    from bus.messages import WarmModel

    try:
        async with connected(nats, cell) as bus:
            fact = await Client(bus, cell).warm_model(name, server)
            told = _told(bus, bus.subjects, fact)
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    where, found = await anext(told)
                if isinstance(found, WarmModel) and wait:
                    with _shown(found, where, hidden=json):
                        where, found = await anext(told)
            except TimeoutError:
                raise Failure(f"no control said what becomes of {name}: `longshore status` shows the cell") from None
            finally:
                await told.aclose()
    except RequestFailed as failure:
        if failure.code in ("unknown_model", "bad_request"):
            raise UserError(failure.message) from None
        raise Failure(failure.message) from None
    _say(found, where, json)


def _say(found: WarmModel | ModelWarmed, where: str, json: bool) -> None:
    from bus.messages import ModelWarmed
    from bus.sentences import sentence

    done = isinstance(found, ModelWarmed)
    reason = found.reason if isinstance(found, ModelWarmed) else ""
    if json:
        print(
            json_module.dumps({"model": found.model, "server": where, "in_dram": done and not reason, "reason": reason})
        )
        if reason:
            sys.exit(1)
    elif reason:
        raise Failure(f"{found.model} was not brought to DRAM: {reason}")
    else:
        print(sentence(found, "placement", f"store/{where}"))


async def _told(bus: Bus, subjects: Subjects, fact: int) -> AsyncGenerator[tuple[str, WarmModel | ModelWarmed]]:
    """What the cell says of this wish, in order, and of which server: at most two messages."""
    from bus.messages import ModelWarmed, WarmModel, decode_said, decode_said_body
    from bus.subjects import SaidSubject

    kinds = [subjects.said("*", "*", kind) for kind in ("model.warm", "model.warmed")]
    reader = await bus.ledger.read(kinds, start=fact)
    try:
        while True:
            for record in await reader.batch():
                subject, found = subjects.parse(record.subject), decode_said_body(decode_said(record.payload).body)
                if not isinstance(found, WarmModel | ModelWarmed) or found.asked != fact:
                    continue
                if isinstance(found, ModelWarmed):
                    yield found.server, found
                    return
                assert isinstance(subject, SaidSubject)
                yield subject.receiver.removeprefix("store/"), found
    finally:
        await reader.close()


def _shown(order: WarmModel, where: str, *, hidden: bool) -> AbstractContextManager[Any]:
    """For people at a terminal: what is under way, and for how long."""
    if hidden or not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from bus.phrases import duration, tier_name

    text = f"{order.model}: {tier_name(order.tier)} to DRAM of {where}, about {duration(order.ready_ns)}"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task(text, total=None)
    return progress
