"""Whether a command line that stands somewhere is one that the program takes."""

from __future__ import annotations

from importlib.metadata import entry_points

from bus.config_fields import flags_of, options_of
from bus.options import with_login

POINTS = {point.name: point for point in entry_points(group="longshore.commands")}


def command_of(words: list[str]) -> str:
    """The entry point that the first words name."""
    name = next((one for one in (".".join(words[:2]), words[0]) if one in POINTS), None)
    assert name is not None, f"no command: {words}"
    return name


def check_command(words: list[str]) -> None:
    """Words behind `longshore`: a command, with flags that it has."""
    name = command_of(words)
    declared = {"--config", "--help"}
    for option, (_, info, _) in options_of(with_login(POINTS[name].load())).items():
        declared |= set(flags_of(option, info))
    for word in words[1:]:
        if word.startswith("-") and len(word) > 1:
            assert word.partition("=")[0] in declared, f"longshore {name.replace('.', ' ')} has no {word}"
