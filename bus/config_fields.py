"""The fields of the configuration: they are the options of the commands, so that there is one list of them.

Section `control` of the file has the options of `longshore control`, with `_` for `-`, and their types, ranges and
help. So a new option of a command is a field of the file, and a variable (LONGSHORE_CONTROL_<OPTION>), without a line
here. Options that several commands share have one place (`SHARED`).
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.models import OptionInfo

from bus.credentials import VARIABLES, ConnectionOptions, CredentialError
from bus.errors import UserError
from bus.sizes import parse_size
from bus.subjects import valid_name

SECTIONS = ("control", "node", "up", "gateway")
"""Commands with a section of their own."""

SHARED = {"cell": "cell", "nats": "nats.url", "log_json": "log.json"}
"""Options that several commands have, and their one place in the file."""

LOGIN = "nats_"
"""Options that begin so are those of `bus.options.with_login`: fields of section `nats`, for every command alike."""

_SECRET = re.compile(r"(^|[._])(password|token|secret|api_keys?)\Z")
_HIDDEN = "********"
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]*):([0-9]{1,5})\Z")


@dataclass(frozen=True, slots=True)
class Field:
    """One value: where it stands in the file, the option and the variable that say the same, and what it may be."""

    path: str
    option: str
    kind: type
    default: Any
    variable: str
    metavar: str = ""
    low: float | None = None
    high: float | None = None
    many: bool = False
    help: str = ""

    @property
    def secret(self) -> bool:
        return self.kind is str and _SECRET.search(self.path) is not None

    def shown(self, value: Any) -> Any:
        """A value as it may be shown to anybody, in JSON."""
        if self.secret and value:
            return _HIDDEN
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, str) and "@" in value:
            return re.sub(r"(?<=//)[^/]*@", "", value)
        return value

    @property
    def wanted(self) -> str:
        """What it must be, for a sentence."""
        low, high = self.low, self.high
        span = ""
        if low is not None and high is not None:
            span = f" from {low:g} to {high:g}"
        elif low is not None:
            span = f" of at least {low:g}"
        elif high is not None:
            span = f" of at most {high:g}"
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
        what = _KINDS[self.metavar][0] if self.metavar in _KINDS else names[self.kind] + span
        if "|" in self.metavar:
            what = "one of " + ", ".join(self.metavar.split("|"))
        return f"a list, each {what}" if self.many else what

    def check(self, content: Any) -> Any:
        """The value as its command takes it. Raises ValueError with what is wrong beyond its type, or nothing."""
        kind = self.kind
        if kind is Path and isinstance(content, str) and content and "\0" not in content:
            return Path(content)
        if kind is bool and isinstance(content, bool):
            return content
        number = isinstance(content, (int, float)) and not isinstance(content, bool) and math.isfinite(content)
        if kind in (int, float) and number and (kind is float or isinstance(content, int)) and self._within(content):
            return kind(content)
        if kind is str:
            if self.metavar == "SIZE" and isinstance(content, int) and not isinstance(content, bool):
                content = str(content)
            if isinstance(content, str) and (content == self.default or self._fits(content)):
                return content
            if not isinstance(content, str) and self.metavar not in _KINDS:
                raise ValueError("; put it in quotes")
        raise ValueError

    def _within(self, number: float) -> bool:
        return (self.low is None or number >= self.low) and (self.high is None or number <= self.high)

    def _fits(self, text: str) -> bool:
        if "\0" in text:
            return False
        if "|" in self.metavar:
            return text in self.metavar.split("|")
        return self.metavar not in _KINDS or _KINDS[self.metavar][1](text)

    def from_text(self, text: str) -> Any:
        """The value that a variable of the environment says. Raises ValueError."""
        if self.many:
            return [self._one(word) for word in text.split()]
        return self._one(text)

    def _one(self, text: str) -> Any:
        if self.kind is bool:
            return _truth(text)
        return self.check(self.kind(text) if self.kind in (int, float) else text)


def _truth(text: str) -> bool:
    word = text.strip().lower()
    if word in ("1", "true", "t", "yes", "y", "on"):
        return True
    if word in ("0", "false", "f", "no", "n", "off"):
        return False
    raise ValueError


def _is_size(text: str) -> bool:
    try:
        parse_size(text, "")
    except UserError:
        return False
    return True


def _is_host_port(text: str) -> bool:
    match = _HOST_PORT.match(text)
    return match is not None and int(match.group(2)) < 65536


def _is_address(text: str) -> bool:
    try:
        return bool(ConnectionOptions(url=text).servers)
    except CredentialError:
        return False


_KINDS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "SIZE": ("a size such as 500MB or 2GiB", _is_size),
    "NAME": ("1 to 63 letters, digits, '-' and '_'", valid_name),
    "URL": ("the address of a NATS server, such as nats://10.0.0.5:4222", _is_address),
    "HOST:PORT": ("an address such as 127.0.0.1:8080", _is_host_port),
}
"""What a text with this metavar must be, and whether one is."""


def options_of(function: Callable[..., Any]) -> dict[str, tuple[Any, OptionInfo, Any]]:
    """The options of a command by their parameter: type, what typer knows of it, default."""
    found = {}
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, parameter.annotation)
        info = next((one for one in typing.get_args(hint)[1:] if isinstance(one, OptionInfo)), None)
        if info is not None and not info.hidden:
            wanted = parameter.default is inspect.Parameter.empty
            found[name] = (typing.get_args(hint)[0], info, None if wanted else parameter.default)
    return found


def flags_of(name: str, info: OptionInfo) -> list[str]:
    """The flags of an option, whose parameter has this name."""
    said = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str) and one.startswith("-")]
    return [flag for one in said for flag in one.split("/")] or [f"--{name.replace('_', '-')}"]


def fields_of(command: str, function: Callable[..., Any]) -> list[Field]:
    """The fields that a command takes: of its own section, and shared ones."""
    options = options_of(function)
    found = [
        _field(command, name, kind, info, default)
        for name, (kind, info, default) in options.items()
        if name in SHARED or (command in SECTIONS and not name.startswith(LOGIN))
    ]
    return found + (login_fields() if "nats" in options else [])


def login_fields() -> list[Field]:
    """What stands in section `nats` beside the address. Its options reach a process by the environment."""
    names = [name for name in VARIABLES if name != "url"]
    return [Field(f"nats.{name}", LOGIN + name, str, "", VARIABLES[name]) for name in names]


def _field(command: str, name: str, kind: Any, info: OptionInfo, default: Any) -> Field:
    many = typing.get_origin(kind) is list
    arms = [arm for arm in typing.get_args(kind) if arm is not types.NoneType] if typing.get_args(kind) else [kind]
    if len(arms) == 1 and typing.get_origin(arms[0]) is list:
        many, arms = True, list(typing.get_args(arms[0]))
    path = SHARED.get(name, f"{command}.{flags_of(name, info)[0].lstrip('-').replace('-', '_')}")
    given = info.envvar if isinstance(info.envvar, str) else (info.envvar or [""])[0]
    return Field(
        path,
        name,
        arms[0] if arms[0] in (bool, int, float, Path) else str,
        default,
        given or "LONGSHORE_" + path.upper().replace(".", "_"),
        info.metavar or "",
        info.min,
        info.max,
        many,
        info.help or "",
    )
