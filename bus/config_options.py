"""How a configuration reaches a command: what the file says becomes the defaults of its options.

flag  ▸  environment  ▸  file  ▸  default            what stands further left counts
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.config_fields import LOGIN, SECTIONS, SHARED, fields_of, options_of
from bus.credentials import VARIABLES, ConnectionOptions

CONFIG_VARIABLE = "LONGSHORE_CONFIG"


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a file says, checked, by path; and where it says so."""

    file: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def login(self) -> ConnectionOptions:
        """Who connects, and how the line is protected, as far as the file says so."""
        return ConnectionOptions(**{name: self.values.get(f"nats.{name}", "") for name in VARIABLES})


_active: ContextVar[Path | None] = ContextVar("configuration file", default=None)


def active_file() -> Path | None:
    """The configuration file that the command which runs was given; for those who start others."""
    return _active.get()


def file_argument(arguments: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """The file that `--config` or the environment names."""
    chosen = environment.get(CONFIG_VARIABLE, "")
    for i, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == "--config" and i + 1 < len(arguments):
            chosen = arguments[i + 1]
        elif argument.startswith("--config="):
            chosen = argument.partition("=")[2]
    return Path(chosen) if chosen else None


def takes_configuration(command: str, function: Callable[..., Any]) -> bool:
    return command in SECTIONS or any(name in SHARED for name in options_of(function) if name != "log_json")


def configured(command: str, function: Callable[..., Any], configuration: Configuration | None) -> Callable[..., Any]:
    """The command with `--config`, a variable for each option, and what the file says as its defaults."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    known = {one.option: one for one in fields_of(command, function)}
    parameters = []
    for name, parameter in signature.parameters.items():
        one = known.get(name)
        if one is not None and not name.startswith(LOGIN):
            kind, info, _ = options_of(function)[name]
            info = copy.copy(info)
            if not info.envvar:
                info.envvar, info.show_envvar = one.variable, False
            hints[name] = Annotated[kind, info]
            if configuration is not None and one.path in configuration.values:
                parameter = parameter.replace(default=configuration.values[one.path])
        # By keyword, as one that must be given may stand behind one that the file has given by now.
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, hints.get(name, parameter.annotation)
        parameters.append(parameter.replace(kind=kind, annotation=annotation))
    hints["config"] = Annotated[
        str,
        typer.Option(
            "--config", envvar=CONFIG_VARIABLE, metavar="FILE", show_default=False, help=_config_help(command)
        ),
    ]
    parameters.append(
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default="", annotation=hints["config"])
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("config", None)
        if configuration is not None and "nats" in known:
            said = ConnectionOptions.from_environment(os.environ)
            os.environ.update(said.over(configuration.login).variables())
        _active.set(configuration.file.absolute() if configuration is not None else None)
        return function(*args, **kwargs)

    functools.update_wrapper(run, function)
    del run.__wrapped__  # type: ignore[attr-defined]
    run.__annotations__ = hints
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _config_help(command: str) -> str:
    if command not in SECTIONS:
        return "YAML file with cell and nats; see `longshore config`."
    return (
        f"YAML file with these options in its section `{command}`; flags and variables "
        f"(LONGSHORE_{command.upper()}_<OPTION>) come before it. See `longshore config`."
    )
