"""What the commands have in common: where the server is, which cell is meant, how a failed connection reads.

async def command(nats: NatsOption = DEFAULT_NATS, cell: CellOption = DEFAULT_CELL) -> None:
    async with connected(nats, cell) as bus: ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from bus.contract import BusError, Unreachable
from bus.errors import UserError
from bus.subjects import valid_name

if TYPE_CHECKING:
    from bus.jetstream import JetStreamBus

DEFAULT_NATS = "nats://127.0.0.1:4222"
DEFAULT_CELL = "main"

NatsOption = Annotated[
    str, typer.Option("--nats", envvar="LONGSHORE_NATS", metavar="URL", help="The NATS server.", show_default=True)
]
CellOption = Annotated[
    str, typer.Option("--cell", envvar="LONGSHORE_CELL", metavar="NAME", help="The cell.", show_default=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Failure(UserError):
    """Something went wrong that is no mistake in the command itself."""

    exit_code = 1


def check_cell_name(cell: str) -> str:
    if not valid_name(cell):
        raise UserError(f"--cell {cell!r} is no name of a cell: use 1 to 63 letters, digits, '-' and '_'")
    return cell


@asynccontextmanager
async def connected(nats: str, cell: str, *, name: str = "longshore-cli") -> AsyncIterator[JetStreamBus]:
    """A bus for one command; whatever the bus raises meanwhile becomes one sentence."""
    from bus.jetstream import JetStreamBus

    check_cell_name(cell)
    try:
        bus = await JetStreamBus.connect(nats, cell, name=name)
    except Unreachable as error:
        raise Failure(str(error)) from None
    except ValueError as error:
        raise UserError(f"--nats {nats!r} is no address of a NATS server ({error}): write nats://HOST:PORT") from None
    try:
        yield bus
    except BusError as error:
        raise Failure(str(error)) from None
    finally:
        await bus.close()
