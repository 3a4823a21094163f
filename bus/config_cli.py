"""`longshore config check` and `longshore config show`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.config_options import CONFIG_VARIABLE
from bus.errors import UserError
from bus.options import JsonOption

if TYPE_CHECKING:
    from bus.config_fields import Field
    from bus.config_file import Effective

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The configuration.", show_default=False)]


def check(file: FileArgument, as_json: JsonOption = False) -> None:
    """Check a configuration file, and the environment with it; every problem is told with its line and column.

    Nothing is started and no server is asked. The exit code is 2 where something is wrong.

    Example: longshore config check /etc/longshore/longshore.yaml
    """
    from bus.config_file import check_configuration, effective, open_secrets, strange_variables
    from bus.yaml_reader import ConfigurationError

    fields = _unique(all_fields())
    values: dict[str, Any] = {}
    try:
        values, _, problems = check_configuration(file, {one.path: one for one in fields})
        problems += effective(fields, None, os.environ)[1]
    except ConfigurationError as error:
        problems = [str(error)]
    remarks = strange_variables(fields, os.environ) + open_secrets(file, fields, values)
    if as_json:
        print(json.dumps({"file": str(file), "fields": len(values), "problems": problems, "remarks": remarks}))
    else:
        for line in [*problems, *remarks]:
            typer.echo(line, err=True)
        if not problems:
            print(f"{file}: {len(values)} fields, all in order")
    if problems:
        raise typer.Exit(UserError.exit_code)


def show(
    command: Annotated[
        str, typer.Argument(metavar="[COMMAND]", help="control, node, up or gateway alone.", show_default=False)
    ] = "",
    config: Annotated[
        str, typer.Option("--config", envvar=CONFIG_VARIABLE, metavar="FILE", help="The configuration file.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Show what is in force for each command, and who says so: a line of the file, a variable, or the default.

    Flags come before all of that and are not known here. Secrets are not shown.

    Example: longshore config show node --config longshore.yaml
    """
    from bus.config_file import effective, load_configuration, strange_variables
    from bus.yaml_reader import ConfigurationError

    fields = all_fields()
    if command and command not in fields:
        raise UserError(f"{command!r} has no section in a configuration: use one of {', '.join(fields)}")
    configuration = load_configuration(Path(config), _unique(fields)) if config else None
    chosen = {name: found for name, found in fields.items() if command in ("", name)}
    rows, problems = {}, []
    for name, found in chosen.items():
        rows[name], wrong = effective(found, configuration, os.environ)
        problems += wrong
    if problems:
        raise ConfigurationError("\n".join(dict.fromkeys(problems)))
    if as_json:
        shown = {name: {one.field.path: one.as_json() for one in found} for name, found in rows.items()}
        print(json.dumps(shown))
        return
    _print(rows)
    for remark in strange_variables(_unique(fields), os.environ):
        typer.echo(remark, err=True)


def _print(rows: dict[str, list[Effective]]) -> None:
    lines = [("command", "field", "value", "from")]
    for name, found in rows.items():
        for one in found:
            value = one.field.shown(one.value)
            text = json.dumps(value) if isinstance(value, (bool, list)) else "" if value is None else str(value)
            lines.append((name, one.field.path, text or "-", one.source))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        print("  ".join([*(text.ljust(width) for text, width in zip(line[:3], widths, strict=True)), line[3]]))


def all_fields() -> dict[str, list[Field]]:
    """The fields of every command that has a section."""
    from bus.config_fields import SECTIONS, fields_of

    points = {point.name: point for point in entry_points(group="longshore.commands") if point.name in SECTIONS}
    return {name: fields_of(name, points[name].load()) for name in SECTIONS if name in points}


def _unique(fields: dict[str, list[Field]] | Iterable[Field]) -> list[Field]:
    """Each path once; of shared ones, the first command's."""
    found: dict[str, Field] = {}
    for one in (one for many in fields.values() for one in many) if isinstance(fields, dict) else fields:
        found.setdefault(one.path, one)
    return list(found.values())
