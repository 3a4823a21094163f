"""The configuration file: read, checked against all fields that there are, and shown with what else has a say."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bus.config_fields import LOGIN, SECTIONS, Field
from bus.config_options import CONFIG_VARIABLE, Configuration
from bus.credentials import ConnectionOptions
from bus.yaml_reader import ConfigurationError, Place, Value, read_yaml


def load_configuration(file: Path, fields: Iterable[Field]) -> Configuration:
    """Read and check a file against all fields that there are. Raises `ConfigurationError` that names the first
    problem, and has all of them."""
    values, places, problems = check_configuration(file, {one.path: one for one in fields})
    if problems:
        more = f" (`longshore config check {file}` shows {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigurationError(problems[0] + more)
    return Configuration(file, values, {path: str(place) for path, place in places.items()})


def check_configuration(file: Path, fields: Mapping[str, Field]) -> tuple[dict[str, Any], dict[str, Place], list[str]]:
    """Values and places by path, and what is wrong, in the order of the file. Raises `ConfigurationError` where it
    cannot be read at all."""
    root = read_yaml(file)
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    problems: list[str] = []

    def walk(value: Value, prefix: str) -> None:
        for name, item in value.content.items():
            path = f"{prefix}{name}"
            known = fields.get(path)
            if known is not None:
                take(known, item)
            elif not any(other.startswith(path + ".") for other in fields):
                problems.append(f"{item.key}: {_unknown(path, prefix, fields)}")
            elif isinstance(item.content, dict):
                walk(item, path + ".")
            elif item.content is not None:
                problems.append(f"{item.place}: {path} must be a section with fields, got {item.shown()}")

    def take(known: Field, item: Value) -> None:
        if item.content is None:
            return  # as if it were not there
        try:
            if known.many:
                items = item.content if isinstance(item.content, list) else [item]
                values[known.path] = [known.check(one.content) for one in items]
            else:
                values[known.path] = known.check(item.content)
            places[known.path] = item.place
        except ValueError as hint:
            got = "another value" if known.secret else item.shown()
            problems.append(f"{item.place}: {known.path} must be {known.wanted}, got {got}{hint}")

    if not isinstance(root.content, dict):
        raise ConfigurationError(f"{root.place}: a configuration has sections such as `control:`, this is {root.kind}")
    walk(root, "")
    return values, places, problems


def _unknown(path: str, prefix: str, fields: Mapping[str, Field]) -> str:
    name = path[len(prefix) :]
    known = dict.fromkeys(other[len(prefix) :].partition(".")[0] for other in fields if other.startswith(prefix))
    near = difflib.get_close_matches(name.replace("-", "_")[:64], known, 1)
    elsewhere = [other for other in fields if other.rpartition(".")[2] == name]
    shown = path if len(path) <= 80 else path[:77] + "..."
    if near:
        return f"unknown field {shown}: did you mean {prefix}{near[0]}?"
    if elsewhere:
        return f"unknown field {shown}: did you mean {elsewhere[0]}?"
    return f"unknown field {shown}: known are {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class Effective:
    """A field's value as its command will see it, and who says so: `default`, a variable, or a place in the file."""

    field: Field
    value: Any
    source: str

    def as_json(self) -> dict[str, Any]:
        return {"value": self.field.shown(self.value), "source": self.source, "variable": self.field.variable}


def effective(
    fields: Iterable[Field], configuration: Configuration | None, environment: Mapping[str, str]
) -> tuple[list[Effective], list[str]]:
    """Values with their sources, and what is wrong with variables."""
    found, problems = [], []
    login = ConnectionOptions.from_environment(environment)
    if configuration is not None:
        login = login.over(configuration.login)
    for one in fields:
        text = environment.get(one.variable, "")
        if text:
            try:
                found.append(Effective(one, one.from_text(text), one.variable))
            except ValueError:
                got = "another value" if one.secret else repr(text[:60])
                problems.append(f"{one.variable}: {one.path} must be {one.wanted}, got {got}")
        elif one.option.startswith(LOGIN) and not getattr(login, one.option.removeprefix(LOGIN)):
            found.append(Effective(one, one.default, "default"))  # who connects is one thing: the variables count
        elif configuration is not None and one.path in configuration.values:
            found.append(Effective(one, configuration.values[one.path], configuration.places[one.path]))
        else:
            found.append(Effective(one, one.default, "default"))
    return found, problems


def strange_variables(fields: Iterable[Field], environment: Mapping[str, str]) -> list[str]:
    """Sentences about variables that look like ours and are none."""
    known = {one.variable for one in fields} | {CONFIG_VARIABLE}
    told = []
    for name in sorted(environment):
        if name.startswith(tuple(f"LONGSHORE_{s.upper()}_" for s in (*SECTIONS, "nats", "log"))) and name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1, 0.8)
            told.append(f"{name} is no variable of a command{f': did you mean {near[0]}?' if near else ''}")
    return told


def open_secrets(file: Path, fields: Iterable[Field], values: Mapping[str, Any]) -> list[str]:
    """A sentence about secrets in a file that everybody on the machine may read."""
    told = [one.path for one in fields if one.secret and values.get(one.path)]
    if not told or not file.stat().st_mode & 0o077:
        return []
    return [f"{file} holds {' and '.join(told)}, and others than its owner may read it: chmod 600 {file}"]
