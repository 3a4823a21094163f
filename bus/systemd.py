"""What systemd wants to hear from a service of `Type=notify`: that it is ready, that it lives, that it stops.

The protocol is one datagram of `NAME=value` lines to the socket that NOTIFY_SOCKET names (sd_notify(3)). Elsewhere the
variable is missing and nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


class Systemd:
    """`watchdog_seconds` is how long it waits for a sign of life; 0 where it does not."""

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        self.address = address
        self.watchdog_seconds = watchdog_seconds
        self._told_ready = False
        self._told_alive = 0.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Systemd:
        """What the environment says, if it is meant for this process."""
        given = os.environ if environment is None else environment
        micros = given.get("WATCHDOG_USEC", "")
        mine = given.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        return cls(given.get("NOTIFY_SOCKET", ""), int(micros) / 1e6 if mine and micros.isdigit() else 0.0)

    def ready(self) -> None:
        """Said once; again where it did not get through."""
        if not self._told_ready:
            self._told_ready = self._send("READY=1")

    def status(self, sentence: str) -> None:
        """One line, shown by `systemctl status`."""
        self._send("STATUS=" + " ".join(sentence.split())[:500])

    def alive(self) -> None:
        """Call it as often as you like: it is sent four times in the time that systemd waits."""
        now = time.monotonic()
        if self.watchdog_seconds and now - self._told_alive >= self.watchdog_seconds / 4:
            self._told_alive = now
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def _send(self, message: str) -> bool:
        """Whether it got through."""
        if not self.address:
            return True
        path = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.setblocking(False)
            to.sendto(message.encode(), path)
            return True
        return False
