"""What may go wrong on the in-memory bus: hooks that are asked once per operation. The default is that nothing does.

A fault here is always one that a real server and network can produce too, so that code which survives these needs no
mercy from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bus.contract import Record


@dataclass(frozen=True, slots=True)
class AppendFate:
    """What becomes of one append."""

    delay: float = 0.0
    """Seconds until it reaches the server; what the same connection sends later waits behind it."""
    stored: bool = True
    """False: lost on the way, and nobody answers."""
    acknowledged: bool = True
    """False: the answer is lost, the caller gets `NoAnswer`."""
    acknowledgement_delay: float = 0.0
    """Seconds from storing to the answer's arrival."""
    repeated: bool = False
    """True: stored twice, as a repetition is that the dedupe window forgot. Not where a last sequence is expected."""


FINE = AppendFate()


class Faults(Protocol):
    """The faults of one connection. `log` is `ledger` or `tokens`."""

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        """Asked when an append is sent."""
        ...

    def deliver(self, log: str, record: Record) -> float:
        """Asked when a record is stored that a reader of this connection wants: seconds until that reader sees it."""
        ...

    def core(self, subject: str) -> float | None:
        """Asked when this connection publishes a core message: seconds until it arrives, None where it is lost."""
        ...


class NoFaults:
    """Everything arrives at once."""

    def append(self, log: str, subject: str, message_id: str) -> AppendFate:
        return FINE

    def deliver(self, log: str, record: Record) -> float:
        return 0.0

    def core(self, subject: str) -> float | None:
        return 0.0
