"""Real servers that run the very files which `longshore nats-config` writes."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from bus.credentials import ConnectionOptions
from bus.lifeline import ending_with_parent
from bus.server import find_binary


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class ConfiguredServer:
    """`nats-server -c FILE`; what it says goes to a log beside the file."""

    def __init__(self, config: Path, port: int) -> None:
        self.config = config
        self.port = port
        self.log = config.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(find_binary()), "-c", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=ending_with_parent(),
            )
        limit = time.monotonic() + 10
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as line:
                    if line.recv(4) == b"INFO":
                        return
            except OSError:
                pass
            assert self._process.poll() is None and time.monotonic() < limit, self.log.read_text()
            time.sleep(0.01)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def variables(file: Path) -> dict[str, str]:
    """What a shell would have after `. FILE`."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def login(folder: Path, user: str) -> ConnectionOptions:
    return ConnectionOptions.from_environment(variables(folder / f"{user}.env"))
