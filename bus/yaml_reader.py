"""A YAML file as plain values, each with the place where it stands. What a configuration needs, and no more of YAML.

Refused, in one sentence with line and column: more than 64 KiB, more than 16 levels, anchors and aliases (a few lines
of them may stand for gigabytes), tags, several documents, a key that stands twice, anything but text as a key, and what
is no YAML at all. Nothing is ever constructed but texts, numbers, truth values, lists and mappings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bus.errors import UserError

SIZE_LIMIT_BYTES = 64 * 1024
DEPTH_LIMIT = 16
SHOWN_CHARACTERS = 60


class ConfigurationError(UserError):
    """What is wrong in a file: `file:line:column: sentence`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar, a list of `Value` or a dict of text to `Value`; `key` is where its key stands (itself without one)."""

    content: Any
    place: Place
    key: Place

    @property
    def kind(self) -> str:
        content = self.content
        names = {bool: "true/false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}
        return names.get(type(content), "a list" if isinstance(content, list) else "a mapping")

    def shown(self) -> str:
        """Fit for a sentence: one short line."""
        if isinstance(self.content, (dict, list)):
            return self.kind
        text = ("true" if self.content else "false") if isinstance(self.content, bool) else repr(self.content)
        return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def read_yaml(path: Path) -> Value:
    """The one document of a file; an empty file is an empty mapping. Raises `ConfigurationError`."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"the configuration {path} cannot be read: {error.strerror or error}") from None
    if len(data) > SIZE_LIMIT_BYTES:
        raise ConfigurationError(f"the configuration {path} has over {SIZE_LIMIT_BYTES} bytes: is it another file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}:{line}:1: the file is not UTF-8 here") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Value:
    """See `read_yaml`; `file` is what places name."""
    start = Place(file, 1, 1)
    try:
        node = _Checked(text, file).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(file, mark) if mark is not None else start
        problem = error.problem or error.context or "no YAML"
        if "found another document" in problem:
            problem = "a second document begins: a configuration is one"
        raise ConfigurationError(f"{place}: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigurationError(f"{file}:{line}:1: {_printable(error.character)} may not stand in YAML") from None
    if node is None:
        return Value({}, start, start)
    return _value(node, file, _place(file, node.start_mark))


class _Checked(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that stops at what is refused, before it makes anything of it."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self._file = file
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(self._file, event.start_mark, "aliases (*name) are not taken: write the value out")
        if getattr(event, "anchor", None):
            _refuse(self._file, event.start_mark, "anchors (&name) are not taken")
        if getattr(event, "tag", None) is not None:
            _refuse(self._file, event.start_mark, "tags (!name) are not taken")
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            _refuse(self._file, event.start_mark, f"this is nested more than {DEPTH_LIMIT} levels deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _value(node: yaml.Node, file: str, key: Place) -> Value:
    place = _place(file, node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return Value(_scalar(node, file), place, key)
    if isinstance(node, yaml.SequenceNode):
        return Value([_value(item, file, _place(file, item.start_mark)) for item in node.value], place, key)
    found: dict[str, Value] = {}
    for key_node, value_node in node.value:
        at = _place(file, key_node.start_mark)
        name = _scalar(key_node, file) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(name, str):
            _refuse(file, key_node.start_mark, "a key must be a text (put it in quotes if it is one)")
        if name in found:
            first = found[name].key.line
            _refuse(file, key_node.start_mark, f"{name} stands here a second time, after line {first}")
        found[name] = _value(value_node, file, at)
    return Value(found, place, key)


def _scalar(node: yaml.ScalarNode, file: str) -> Any:
    tag = node.tag.rpartition(":")[2]
    if tag not in ("str", "int", "float", "bool", "null"):
        return node.value  # what YAML takes for a date and the like is a text here
    try:
        return getattr(_constructor, f"construct_yaml_{tag}")(node)
    except (ValueError, OverflowError):  # such as a number with more digits than Python reads
        _refuse(file, node.start_mark, "this number cannot be read")


_constructor: Any = yaml.constructor.SafeConstructor()


def _place(file: str, mark: yaml.Mark) -> Place:
    return Place(file, mark.line + 1, mark.column + 1)


def _refuse(file: str, mark: yaml.Mark, problem: str) -> NoReturn:
    raise ConfigurationError(f"{_place(file, mark)}: {problem}")


def _printable(character: Any) -> str:
    return f"the character {character:#x}" if isinstance(character, int) else "this character"
