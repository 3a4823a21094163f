"""A packed checkpoint behind http or https, read by ranges over several connections at once.

Every answer is checked before a byte of it counts: status, range, size of the file, and that it is still the same file
(its entity tag, or its date). A connection that breaks or a server in trouble (5xx) is tried again a few times; a file
that changed, or is gone, is an error at once. A server that ignores ranges is read in order, over one connection.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from loaders.errors import CheckpointError, one_line
from loaders.packed import CHUNK_BYTES

TIMEOUT_SECONDS = 20.0
CONNECT_SECONDS = 5.0
"""What cannot be interrupted: connecting."""
PIECE_SECONDS = 120.0
"""A piece that takes longer comes from a server that hangs: no single read does."""
ATTEMPTS = 5
HURRIED_ATTEMPTS = 2
PAUSE_SECONDS = 0.1
"""Before the second attempt; four times as long before each further one."""
REDIRECTS = 5
CONNECTIONS = 4
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_SPACES = re.compile(r"[\x00-\x20\x7f]")
_LENGTH = re.compile(r"[0-9]{1,18}")
_SKIP_BYTES = 1 << 20

Got = TypeVar("Got")


class _Trouble(Exception):
    """Something that may go away: worth another attempt."""


class HttpSource:
    """`address` is the address of the packed directory; its files lie under it.

    `attempts`: how often what may go away is tried; few where there is another source.
    """

    def __init__(self, address: str, *, attempts: int = ATTEMPTS) -> None:
        try:
            parts = urlsplit(address)
            usable = bool(parts.hostname) and (parts.port is None or parts.port > 0) and not _SPACES.search(address)
        except ValueError:
            usable = False
        if not usable:
            raise CheckpointError(f"{address!r} is no address: write http://HOST/PATH or https://HOST/PATH")
        if parts.username or parts.password:
            raise CheckpointError("credentials in an address end up in logs: give an address without them")
        self._base = address.split("?", 1)[0].split("#", 1)[0].rstrip("/") + "/"
        self._query = parts.query
        self._attempts = attempts
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[int, HttpConnection] = {}

    @property
    def name(self) -> str:
        return self._base.rstrip("/")

    def cancel(self) -> None:
        self._cancelled.set()
        with self._lock:
            waiting = list(self._open.values())
        for connection in waiting:
            connection.interrupt()

    def connect(self, url: str) -> HttpConnection:
        """A connection that `cancel` interrupts."""
        connection = HttpConnection(url, self._forget, self._cancelled)
        with self._lock:
            self._open[id(connection)] = connection
        if self._cancelled.is_set():
            connection.interrupt()
        return connection

    def _forget(self, connection: HttpConnection) -> None:
        with self._lock:
            self._open.pop(id(connection), None)

    def read_small(self, name: str, limit: int) -> bytes:
        url = self._url(name)

        def attempt() -> bytes:
            connection = self.connect(url)
            try:
                answer = connection.get({})
                if answer.status != 200:
                    raise _refused(url, answer.status)
                content = _read_all(answer, limit, url)
                stated = _length_of(answer)
                if stated is not None and stated != len(content):
                    raise _Trouble(f"{url} broke off after {len(content)} of {stated} bytes")
                return content
            finally:
                connection.close()

        return self.patiently(url, attempt)

    def open_large(self, name: str) -> HttpFile:
        return HttpFile(self, self._url(name))

    def patiently(self, url: str, attempt: Callable[[], Got]) -> Got:
        """Try again what may go away, a few times. CheckpointError says what the last trouble was."""
        pause = PAUSE_SECONDS
        for number in range(self._attempts):
            if self._cancelled.is_set():
                raise CheckpointError(f"fetching {url} was cancelled")
            try:
                return attempt()
            except _Trouble as trouble:
                last = str(trouble)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise CheckpointError(
                        f"{url}: the certificate of the server is not trusted ({error.reason})"
                    ) from None
                last = f"{url}: {one_line(error)}"
            if number + 1 < self._attempts:
                self._cancelled.wait(pause)
                pause *= 4
        raise CheckpointError(f"{last}; given up after {self._attempts} attempts, try again when the server is well")

    def _url(self, name: str) -> str:
        return self._base + quote(name) + (f"?{self._query}" if self._query else "")


class HttpFile:
    """One file, by ranges. `threads` is 1 where the server ignores ranges."""

    def __init__(self, source: HttpSource, url: str) -> None:
        self._source, self._url = source, url
        self._mark = ""
        self._idle: list[HttpConnection] = []
        self._lock = threading.Lock()
        self._in_order: HttpConnection | None = None
        self._body: http.client.HTTPResponse | None = None
        self._position = 0
        self.bytes, self.threads = source.patiently(url, self._look)

    def read(self, memory: memoryview, offset: int, count: int) -> None:
        """See `loaders.remote.RemoteFile`."""
        if not count:
            return
        reading = self._read_in_order if self.threads == 1 else self._read_range
        self._source.patiently(self._url, lambda: reading(memory, offset, count))

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._end_body()

    # ---- the first look ---------------------------------------------------------------------------------------

    def _look(self) -> tuple[int, int]:
        """(bytes of the file, threads that may read)."""
        connection = self._source.connect(self._url)
        try:
            answer = connection.get({"Range": "bytes=0-0"})
            if answer.status == 206:
                found = _RANGE.fullmatch(answer.getheader("Content-Range", "").strip())
                if found is None:
                    raise CheckpointError(f"{self._url}: the server answers a range with no Content-Range that fits")
                self._mark = _mark_of(answer)
                return int(found[3]), CONNECTIONS
            if answer.status != 200:
                raise _refused(self._url, answer.status)
            stated = _length_of(answer)
            if stated is None:
                raise CheckpointError(f"{self._url}: the server takes no ranges and does not say how long the file is")
            self._mark = _mark_of(answer)
            return stated, 1
        finally:
            connection.close()

    # ---- by ranges --------------------------------------------------------------------------------------------

    def _read_range(self, memory: memoryview, offset: int, count: int) -> None:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._source.connect(self._url)
        try:
            answer = connection.get({"Range": f"bytes={offset}-{offset + count - 1}"})
            if answer.status != 206:
                if answer.status == 200:
                    raise _changed(self._url)
                raise _refused(self._url, answer.status)
            found = _RANGE.fullmatch(answer.getheader("Content-Range", "").strip())
            if found is None or (int(found[1]), int(found[2])) != (offset, offset + count - 1):
                raise CheckpointError(f"{self._url}: the server gave another range than bytes {offset} and on")
            if int(found[3]) != self.bytes or _mark_of(answer) != self._mark:
                raise _changed(self._url)
            _fill(answer, memory[:count], self._url)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)

    # ---- in order ---------------------------------------------------------------------------------------------

    def _read_in_order(self, memory: memoryview, offset: int, count: int) -> None:
        """The file's one body, read on; from its beginning again where it broke off."""
        try:
            if self._body is None or self._position > offset:
                self._end_body()
                self._in_order = self._source.connect(self._url)
                answer = self._in_order.get({})
                if answer.status != 200:
                    raise _refused(self._url, answer.status)
                if answer.getheader("Content-Length") != str(self.bytes) or _mark_of(answer) != self._mark:
                    raise _changed(self._url)
                self._body, self._position = answer, 0
            scratch = memoryview(bytearray(min(_SKIP_BYTES, max(1, offset - self._position))))
            while self._position < offset:
                piece = scratch[: min(len(scratch), offset - self._position)]
                _fill(self._body, piece, self._url)
                self._position += len(piece)
            _fill(self._body, memory[:count], self._url)
            self._position += count
        except BaseException:
            self._end_body()
            raise

    def _end_body(self) -> None:
        if self._in_order is not None:
            self._in_order.close()
        self._in_order = self._body = None


class HttpConnection:
    """One kept connection; redirects are followed, each to a connection of its own."""

    def __init__(self, url: str, closed: Callable[[HttpConnection], None], cancelled: threading.Event) -> None:
        self._url, self._closed, self._cancelled = url, closed, cancelled
        self._connect(url)

    def get(self, headers: dict[str, str]) -> http.client.HTTPResponse:
        for _ in range(REDIRECTS):
            if self._connection.sock is None:
                self._connection.connect()
                cast(socket.socket, self._connection.sock).settimeout(TIMEOUT_SECONDS)
                if self._cancelled.is_set():  # Too early for `interrupt`, which wants a socket.
                    raise CheckpointError(f"fetching {self._url} was cancelled")
            self._connection.request("GET", self._target, headers={"Accept-Encoding": "identity"} | headers)
            answer = self._connection.getresponse()
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            place = answer.getheader("Location")
            if not place:
                raise CheckpointError(f"{self._url}: the server sends us elsewhere and does not say where")
            self._connection.close()
            self._connect(place)
        raise CheckpointError(f"{self._url}: the server sends us elsewhere more than {REDIRECTS} times")

    def interrupt(self) -> None:
        """Whoever reads from it gets an error now."""
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()
        self._closed(self)

    def _connect(self, place: str) -> None:
        """To `place`, which may be relative to the first address."""
        try:
            parts: SplitResult = urlsplit(urljoin(self._url, place))
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or _SPACES.search(place):
            raise CheckpointError(f"{self._url}: the server sends us to {place[:200]!r}, which is no http address")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(cast(str, parts.hostname), parts.port, timeout=CONNECT_SECONDS)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _read_all(answer: http.client.HTTPResponse, limit: int, url: str) -> bytes:
    """The whole body, refused when it is larger than `limit` bytes."""
    pieces: list[bytes] = []
    left = limit
    began = time.monotonic()
    while piece := answer.read1(_SKIP_BYTES):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise CheckpointError(f"{url} has more than the {limit} bytes that such a file may have")
        seconds = time.monotonic() - began
        if seconds > PIECE_SECONDS * (1 + (limit - left) / CHUNK_BYTES):
            raise _Trouble(f"{url} gave {limit - left} bytes in {seconds:.0f} s: it is too slow")
    return b"".join(pieces)


def _length_of(answer: http.client.HTTPResponse) -> int | None:
    """What the answer says of its length, if that can be one."""
    stated = answer.getheader("Content-Length", "").strip()
    return int(stated) if _LENGTH.fullmatch(stated) else None


def _fill(answer: http.client.HTTPResponse, memory: memoryview, url: str) -> None:
    done = 0
    deadline = time.monotonic() + PIECE_SECONDS
    while done < len(memory):
        if time.monotonic() > deadline:
            raise _Trouble(f"{url} gave {done} bytes in {PIECE_SECONDS:g} s: it is too slow")
        got = answer.readinto(memory[done:])
        if not got:
            raise _Trouble(f"{url} broke off {len(memory) - done} bytes too early")
        done += got


def _mark_of(answer: http.client.HTTPResponse) -> str:
    """What tells one version of a file from another."""
    return answer.getheader("ETag") or answer.getheader("Last-Modified") or ""


def _refused(url: str, status: int) -> Exception:
    if status >= 500 or status in (408, 429):
        return _Trouble(f"{url}: the server answers with status {status}")
    reason = {404: "there is no such file", 410: "the file is gone", 401: "the server wants credentials"}.get(status)
    reason = reason or ("the server refuses it" if status == 403 else "the server does not give it")
    return CheckpointError(f"{url}: {reason} (status {status}); look at the address")


def _changed(url: str) -> CheckpointError:
    return CheckpointError(f"{url} changed while it was read; fetch it again from the beginning")
