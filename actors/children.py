"""Child processes of `longshore up` and `longshore demo`: started, watched, ended in order, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from bus.lifeline import ending_with_parent

STOP_SECONDS = 10.0


class Child:
    """One `longshore ...` process (or another module of ours). Its output goes to a log file.

    `environment` is added to this process's: what must not stand on a command line.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        log: Path,
        *,
        module: str = "bus.main",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.module = module
        self.name = name
        self.arguments = arguments
        self.log = log
        self.environment = dict(environment or {})
        self.process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    async def start(self) -> None:
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.module,
                *self.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=ending_with_parent(),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            )

    async def wait(self) -> int:
        assert self.process is not None
        return await self.process.wait()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL for what does not end in time."""
        if self.process is None or self.process.returncode is not None:
            return
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.process.wait()

    def last_words(self, lines: int = 5) -> str:
        """The end of its log since its start, for a sentence that says why it is gone."""
        try:
            text = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])
