"""An HTTP server for one directory that does ranges right, and can be told to misbehave; and a real nginx."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Misbehave = Callable[["Handler", str, int], bool]
"""Called with the handler, the file name, and the number of the request; True: it has answered in its own way."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        with self.server.lock:
            number = self.server.requests
            self.server.requests += 1
        self.server.seen.append((name, self.headers.get("Range", "")))
        if self.server.misbehave is not None and self.server.misbehave(self, name, number):
            return
        path = self.server.directory / name
        if not path.is_file():
            self.answer(404, b"not here")
            return
        self.give(path)

    def give(self, path: Path, *, ranges: bool = True, etag: str = "", cut: int | None = None) -> None:
        """The file or the part asked for; `cut` closes the connection after so many bytes."""
        content = path.read_bytes()
        asked = self.headers.get("Range") if ranges else None
        headers = {"ETag": etag or f'"{path.stat().st_mtime_ns}-{len(content)}"'}
        status = 200
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            content, status = content[begin:end], 206
        self.answer(status, content, headers, cut)

    def answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        return


class RangeServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, directory: Path, misbehave: Misbehave | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.misbehave = misbehave
        self.lock = threading.Lock()
        self.requests = 0
        self.seen: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that went away in the middle is what some tests want


@contextmanager
def range_server(directory: Path, misbehave: Misbehave | None = None) -> Iterator[RangeServer]:
    server = RangeServer(directory, misbehave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def find_nginx() -> str | None:
    return shutil.which("nginx") or ("/usr/sbin/nginx" if Path("/usr/sbin/nginx").exists() else None)


@contextmanager
def nginx(directory: Path, folder: Path) -> Iterator[str]:
    """A real nginx that serves `directory`; its address. `folder` is for its own files."""
    binary = find_nginx()
    assert binary is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (folder / name).mkdir(parents=True)
    config = folder / "nginx.conf"
    temporary = "".join(
        f"{kind}_temp_path {folder / name};\n"
        for kind, name in (("client_body", "body"), *((n, n) for n in ("proxy", "fastcgi", "uwsgi", "scgi")))
    )
    config.write_text(
        f"daemon off;\nuser root;\npid {folder / 'nginx.pid'};\nerror_log {folder / 'error.log'};\n"
        "events { worker_connections 128; }\n"
        f"http {{\naccess_log off;\nsendfile on;\n{temporary}"
        f"server {{ listen 127.0.0.1:{port}; root {directory}; }}\n}}\n"
    )
    process = subprocess.Popen([binary, "-c", str(config), "-p", str(folder)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "error.log").read_text()
                time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=10)
