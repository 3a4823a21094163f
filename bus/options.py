"""What the commands have in common: where the server is, which cell is meant, how a failed connection reads.

async def command(nats: NatsOption = DEFAULT_NATS, cell: CellOption = DEFAULT_CELL) -> None:
    async with connected(nats, cell) as bus: ...
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.contract import BusError, Unreachable
from bus.credentials import DEFAULT_URL, FLAGS, VARIABLES, ConnectionOptions, CredentialError, flag
from bus.errors import UserError
from bus.subjects import valid_name

if TYPE_CHECKING:
    from bus.jetstream import JetStreamBus

DEFAULT_NATS = DEFAULT_URL
DEFAULT_CELL = "main"

NatsOption = Annotated[
    str,
    typer.Option(
        "--nats",
        envvar=VARIABLES["url"],
        metavar="URL",
        help="The NATS server, or several of a cluster with commas.",
        show_default=True,
    ),
]
"""A command with a parameter of this type gets `--nats-user`, `--nats-creds`, ... as well (`with_login`)."""
CellOption = Annotated[
    str, typer.Option("--cell", envvar="LONGSHORE_CELL", metavar="NAME", help="The cell.", show_default=True)
]
LogJsonOption = Annotated[bool, typer.Option("--log-json", help="Log JSON lines instead of text.")]
HealthOption = Annotated[
    str,
    typer.Option(
        "--health", metavar="HOST:PORT", help="Answer /livez and /readyz over HTTP there.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Failure(UserError):
    """Something went wrong that is no mistake in the command itself."""

    exit_code = 1


def check_cell_name(cell: str) -> str:
    if not valid_name(cell):
        raise UserError(f"--cell {cell!r} is no name of a cell: use 1 to 63 letters, digits, '-' and '_'")
    return cell


_HELP = {
    "user": ("NAME", "User of the NATS server; its password by --nats-password-file or the environment."),
    "password_file": ("FILE", "File with the user's password."),
    "nkey": ("FILE", "File with the seed of an nkey."),
    "creds": ("FILE", "File with a JWT and its nkey's seed."),
    "ca": ("FILE", "Certificates of the authority that the server's one comes from; implies TLS."),
    "cert": ("FILE", "Certificate of this side."),
    "key": ("FILE", "Key of this side's certificate."),
    "inbox": ("PREFIX", "What subjects of answers begin with, where the server allows this user no other one."),
}


def with_login(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option for everything that may be said about the connection, if it has `--nats`.

    What the options say goes into the environment of this process: from there `connection` and child processes take it.
    """
    signature = inspect.signature(command)
    if "nats" not in signature.parameters:
        return command

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = ConnectionOptions(**{name: kwargs.pop(f"nats_{name}") or "" for name in FLAGS})
        if given != ConnectionOptions():
            os.environ.update(given.over(ConnectionOptions.from_environment(os.environ)).variables())
        return command(*args, **kwargs)

    added = [
        inspect.Parameter(
            f"nats_{name}",
            inspect.Parameter.KEYWORD_ONLY,
            default="",
            annotation=Annotated[
                str,
                typer.Option(
                    flag(name), metavar=_HELP[name][0], help=f"{_HELP[name][1]} Or {VARIABLES[name]}.",
                    show_default=False, rich_help_panel="Connection",
                ),
            ],
        )
        for name in FLAGS
    ]  # fmt: skip
    hints = inspect.get_annotations(command, eval_str=True)
    kept = [one.replace(annotation=hints.get(one.name, one.annotation)) for one in signature.parameters.values()]
    wrapped.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = hints | {one.name: one.annotation for one in added}
    return wrapped


def connection(nats: str) -> ConnectionOptions:
    """All about the connection of a command: its address and what the environment says."""
    return ConnectionOptions.from_environment(os.environ, url=nats)


@asynccontextmanager
async def connected(nats: str, cell: str, *, name: str = "longshore-cli") -> AsyncIterator[JetStreamBus]:
    """A bus for one command; whatever the bus raises meanwhile becomes one sentence."""
    from bus.jetstream import JetStreamBus

    check_cell_name(cell)
    try:
        bus = await JetStreamBus.connect(connection(nats), cell, name=name)
    except CredentialError:
        raise
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
