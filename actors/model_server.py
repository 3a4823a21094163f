"""Other servers fetch this server's packed models here: http, read-only, by ranges.

    GET /<escaped model>/<file>       one of the files that the manifest of that model names, or the manifest itself

Nothing else is served: no listing, no link, no directory that is being written (its name is that of no model), nothing
outside of the models directory. The files are opened below a descriptor of the model's directory, so that one answer
never mixes two packings; the entity tag says which packing it is of. Threads of their own do it, a connection each, and
the kernel moves the bytes (sendfile).
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import os
import re
import socket
import socketserver
import stat
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from bus.errors import UserError
from bus.subjects import unescape_model
from loaders import CheckpointError
from loaders.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, parse_manifest
from loaders.packed import WEIGHTS_NAME
from loaders.reading import read_exactly, require_companion_name

CONNECTIONS_LIMIT = 64
"""More are closed at once: whoever fetches tries again, or takes another source."""
IDLE_SECONDS = 20.0
"""A connection on which nothing moves for so long is closed."""
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
_TARGET_LIMIT = 2048

logger = logging.getLogger("longshore.node")


class _Missing(Exception):
    """There is nothing to serve under that path."""


class ModelServer:
    """Serves the models of `directory` at `listen` (HOST:PORT; port 0 takes a free one) until `stop`.

    `address` is what other servers put before the escaped name of a model. Raises `UserError` where nobody can listen
    there, and for a host that is no address of this server for others.
    """

    def __init__(self, directory: Path, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if bare in ("", "0.0.0.0", "::"):
            raise UserError(
                f"--serve-models {listen}: give the address at which other servers reach this one, such as "
                "10.0.0.7:8090; it is what they are told"
            )
        try:
            self._server = _Server((bare, int(port)), directory)
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"--serve-models {listen}: cannot listen there: {getattr(error, 'strerror', None) or error}; "
                "use HOST:PORT of this server that is free"
            ) from None
        self.address = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="models", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Connections are closed, whatever moves on them."""
        self._server.shutdown()
        self._server.server_close()
        self._server.drop()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS_LIMIT

    def __init__(self, place: tuple[str, int], directory: Path) -> None:
        self.address_family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        self.directory = directory
        self._lock = threading.Lock()
        self._open: dict[int, socket.socket] = {}
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        """That of http.server asks the name service who this host is, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self._lock:
            if len(self._open) >= CONNECTIONS_LIMIT:
                return False
            self._open[id(request)] = request
            return True

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(id(request), None)
        super().shutdown_request(request)

    def drop(self) -> None:
        with self._lock:
            waiting = list(self._open.values())
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection from %s broke off", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server: _Server

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def version_string(self) -> str:
        return "longshore"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self, *, send: bool) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # A body would be read as the next request.
            self._refuse(400)
            return
        try:
            descriptor, mark = open_served(self.server.directory, self.path)
        except _Missing:
            self._refuse(404)
            return
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            asked = _RANGE.fullmatch(self.headers.get("Range", "").strip())
            begin, end = _span(asked, size) if asked is not None else (0, size)
            if asked is not None and begin >= end:
                self._refuse(416, {"Content-Range": f"bytes */{size}"})
                return
            partial = asked is not None  # What is no plain range is passed over, as the standard has it.
            self.send_response(206 if partial else 200)
            if partial:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{mark}"')
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            if send and end > begin and self.connection.sendfile(file, begin, end - begin) != end - begin:
                self.close_connection = True

    def _refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _span(asked: re.Match[str], size: int) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    return int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)


def open_served(directory: Path, target: str) -> tuple[int, str]:
    """A descriptor of the file that this request target names, and the mark of its version. Raises `_Missing`."""
    model, name = _split(target)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        folder = os.open(directory / model, flags | os.O_DIRECTORY)
    except OSError:
        raise _Missing from None
    try:
        text = _read_manifest(folder, flags)
        manifest = parse_manifest(text, MANIFEST_NAME)
        if name == MANIFEST_NAME:
            mark, size = manifest.checksum, len(text)
        elif name == WEIGHTS_NAME:
            mark, size = manifest.digest, manifest.bytes
        elif name in manifest.files:
            mark, size = manifest.files[name].checksum, manifest.files[name].bytes
        else:
            raise _Missing
        descriptor = _open_below(folder, name, flags)
    except (OSError, CheckpointError):
        raise _Missing from None
    finally:
        os.close(folder)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        os.close(descriptor)
        raise _Missing
    return descriptor, mark


def _split(target: str) -> tuple[str, str]:
    """The escaped model and the file of a request target, where both are written as this program writes them."""
    if len(target) > _TARGET_LIMIT:
        raise _Missing
    try:
        path = unquote_to_bytes(target.partition("?")[0]).decode()
        model, separator, name = path.removeprefix("/").partition("/")
        if not separator or not unescape_model(model):
            raise _Missing
        return model, require_companion_name(name, "a request")
    except (ValueError, CheckpointError):
        raise _Missing from None


def _read_manifest(folder: int, flags: int) -> bytes:
    descriptor = os.open(MANIFEST_NAME, flags | os.O_NONBLOCK, dir_fd=folder)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MANIFEST_LIMIT_BYTES:
            raise _Missing
        return read_exactly(descriptor, found.st_size, 0, Path(MANIFEST_NAME))
    finally:
        os.close(descriptor)


def _open_below(folder: int, name: str, flags: int) -> int:
    """A file of the directory, or of a folder directly below it; no link is followed on the way."""
    above, separator, plain = name.rpartition("/")
    if not separator:
        return os.open(plain, flags | os.O_NONBLOCK, dir_fd=folder)
    inner = os.open(above, flags | os.O_DIRECTORY, dir_fd=folder)
    try:
        return os.open(plain, flags | os.O_NONBLOCK, dir_fd=inner)
    finally:
        os.close(inner)
