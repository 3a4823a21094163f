"""The program `longshore`: gathers the commands of all rooms and shows errors as sentences.

A command is an entry point of the group `longshore.commands`: `name = module:function`, or `group.name` for one that
belongs to others. Only what was asked for is imported; `--help` imports all command modules, so these keep heavy
imports inside their functions. A function may be a coroutine function: it then runs in an event loop.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

from bus.config_options import Configuration, configured, file_argument, takes_configuration
from bus.errors import UserError
from bus.help import EPILOG, GROUPS, panel_of, place_of
from bus.options import with_login

GROUP = "longshore.commands"
TRACEBACK_VARIABLE = "LONGSHORE_TRACEBACK"
INTERRUPTED = 130
BROKEN_PIPE = 141

# Rooms above this one may have errors of a kind of their own; known by name, because nothing is imported from there.
_SENTENCES = frozenset({"CheckpointError", "ModelError"})


def main(arguments: Sequence[str] | None = None, points: Iterable[EntryPoint] | None = None) -> NoReturn:
    """Run one command and exit. `arguments` without the program's name, `points` instead of the installed ones."""
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    found = list(entry_points(group=GROUP) if points is None else points)
    code = 0
    try:
        code = run(chosen, found)
    except BaseException as error:
        code = exit_code_of(error)
    _finish(code)


def run(arguments: list[str], points: list[EntryPoint]) -> int:
    """Build the application that these arguments need, run it, and return its exit code."""
    import typer

    app = typer.Typer(
        name="longshore",
        help="Serve many large language models from few GPUs; every decision is a message.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def _longshore() -> None:  # makes even a single command a subcommand
        pass

    groups: dict[str, typer.Typer] = {}
    needed = _needed(arguments, points)
    for point in needed:
        group, _, name = point.name.rpartition(".")
        target = app
        function = _load(point)
        if takes_configuration(point.name, function):
            configuration = _configuration(arguments, points) if len(needed) == 1 else None
            function = configured(point.name, function, configuration)
        if group:
            if group not in groups:
                groups[group] = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
                about = f"{GROUPS.get(group, '')} Commands: {_members(points, group)}.".strip()
                app.add_typer(groups[group], name=group, help=about, rich_help_panel=panel_of(group))
            target = groups[group]
        target.command(name, rich_help_panel=None if group else panel_of(name))(function)
    command = typer.main.get_command(app)
    # Exit codes come back as SystemExit; usage errors print their own sentence.
    command.main(args=arguments, prog_name="longshore")
    return 0


def _configuration(arguments: list[str], points: list[EntryPoint]) -> Configuration | None:
    """What the file says that `--config` or the environment names, checked as a whole. Raises `UserError`."""
    file = file_argument(arguments, os.environ)
    if file is None or {"--help", "-h"} & set(arguments):
        return None
    from bus.config_fields import SECTIONS, fields_of
    from bus.config_file import load_configuration

    sections = [point for point in points if point.name in SECTIONS]
    return load_configuration(file, [one for point in sections for one in fields_of(point.name, point.load())])


def _needed(arguments: list[str], points: list[EntryPoint]) -> list[EntryPoint]:
    """The entry points to import: those under the first words, or all where these name none."""
    ordered = sorted(points, key=lambda point: (place_of(point.name.partition(".")[0]), point.name))
    words = [argument for argument in arguments[:2] if not argument.startswith("-")]
    for candidate in (".".join(words), words[0] if words else ""):
        exact = [point for point in ordered if candidate and point.name == candidate]
        if exact:
            return exact
    if words:
        return [point for point in ordered if point.name.startswith(words[0] + ".")] or ordered
    return ordered


def _members(points: list[EntryPoint], group: str) -> str:
    prefix = group + "."
    return ", ".join(sorted(point.name.removeprefix(prefix) for point in points if point.name.startswith(prefix)))


def _load(point: EntryPoint) -> Callable[..., Any]:
    """The command's function; where it cannot be imported, one that says so, and the other commands work."""
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        reason = str(error)

        def missing() -> NoReturn:
            raise UserError(f"`longshore {point.name.replace('.', ' ')}` is not available: {reason}")

        missing.__doc__ = f"Not available: {reason}."
        return missing
    if not inspect.iscoroutinefunction(function):
        return with_login(function)

    @functools.wraps(function)
    def synchronous(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(function(*args, **kwargs))

    return with_login(synchronous)


def exit_code_of(error: BaseException) -> int:
    """The program's exit code for an error, once it has been told on stderr as its kind deserves."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        raise error
    if isinstance(error, UserError):
        print(f"longshore: {error}", file=sys.stderr)
        return error.exit_code
    if any(kind.__name__ in _SENTENCES for kind in type(error).__mro__):
        print(f"longshore: {error}", file=sys.stderr)
        return UserError.exit_code
    print(
        f"longshore: an error of the program itself, {type(error).__name__}: {error} "
        f"(run it again with {TRACEBACK_VARIABLE}=1 to see where)",
        file=sys.stderr,
    )
    return 1


def _finish(code: int) -> NoReturn:
    """Exit, without a complaint about a reader of our output that went away."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end; what it flushes then must not be the broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or BROKEN_PIPE
    sys.exit(code)


if __name__ == "__main__":
    main()
