"""How `longshore --help` is ordered: by what somebody wants to do. A command that is named nowhere comes last."""

from __future__ import annotations

PANELS = {
    "Ask": ("ask", "embed"),
    "Run a cell": ("up", "control", "node", "gateway", "config", "nats-config"),
    "Models": ("model", "pack", "verify", "fetch", "load"),
    "See what happens, and why": ("status", "tail", "why", "record", "replay"),
    "Keep it going": (
        "migrate",
        "drain",
        "rolling-restart",
        "dead",
        "ledger",
        "backup",
        "restore",
        "rules",
        "difference",
    ),
    "Try and measure": ("demo", "chaos", "bench", "doctor"),
}

GROUPS = {
    "bench": "Measure on this machine, beside what people use.",
    "chaos": "The same code in virtual time, while everything breaks.",
    "config": "The configuration file: check it, and show what is in force.",
    "dead": "Requests under which workers died.",
    "difference": "When a control's decisions differ from the ledger.",
    "doctor": "What this machine grants.",
    "ledger": "How full the ledger is, and what makes room in it.",
    "model": "Models of a cell.",
}

EPILOG = "Begin with: longshore up · then: longshore model add NAME DIR · then: longshore ask NAME 'prompt'"


def panel_of(command: str) -> str | None:
    """Where a command or a group stands; None for one that is named nowhere."""
    return next((panel for panel, commands in PANELS.items() if command in commands), None)


def place_of(command: str) -> tuple[int, int, str]:
    """The order of a top-level name."""
    for number, commands in enumerate(PANELS.values()):
        if command in commands:
            return number, commands.index(command), command
    return len(PANELS), 0, command
