"""One connection to a NATS server: nats-py, with its hot path and its known failures taken over.

What this adds to `nats.aio.client.Client`:

* Hooks: a subscription may have a plain function called with the raw message while it is parsed. No task, no queue,
  no header parsing: reading gets five times as fast, and nothing is dropped behind our back.
* `write` queues bytes without waiting, so that appends keep the order of their calls.
* While the connection is down nothing is buffered: what was not sent is gone, and whoever waits hears so at once.
* A read loop that ends by an error inside nats-py counts as a lost connection. nats-py itself stops reading then and
  goes on calling itself connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from typing import Any, Protocol

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import Error as ClientError

from bus.contract import BusError, Delivery, NoAnswer, NoResponders, NotAllowed, Unreachable
from bus.credentials import ConnectionOptions
from bus.refusals import NotTrusted, is_refusal, why_not
from bus.wire import header_block, parse_headers, publish_frame, status

PING_SECONDS = 5
RECONNECT_WAIT_SECONDS = 0.1
CONNECT_SECONDS = 2.0
CANCELLATIONS = 10
CANCELLATION_SECONDS = 0.2
WRITE_BUFFER_BYTES = 4 * 1024 * 1024

Hook = Callable[[bytes, bytes, bytes, bytes | None], None]
"""Called with subject, reply subject, payload and raw headers of one message. It must not raise."""

_VIOLATION = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]*)\"")
"""What a server says where a user lacks a right; nats-py hands it on in lower case."""

_log = logging.getLogger("longshore.bus")


async def _end(connecting: asyncio.Task[None] | asyncio.Future[None]) -> None:
    """Cancel until it is over, or give it up: nats-py loses a cancellation that meets an error of its own."""
    for _ in range(CANCELLATIONS):
        connecting.cancel()
        done, _pending = await asyncio.wait([connecting], timeout=CANCELLATION_SECONDS)
        if done:
            return


class Listener(Protocol):
    """Who wants to know when the connection goes and comes."""

    def lost(self) -> None: ...

    def restored(self) -> None: ...

    def closed(self) -> None: ...

    def forbidden(self, subject: str) -> None:
        """The server does not let us publish on a subject, which is given in lower case."""


class Connection(Client):
    """A NATS client whose messages can be taken inline. Make it with `Connection.open`."""

    def __init__(self) -> None:
        super().__init__()
        self.url = ""
        self.connections = 0
        self._hooks: dict[int, Hook] = {}
        self._listeners: dict[int, Listener] = {}
        self._answers: dict[int, asyncio.Future[tuple[bytes, bytes | None]]] = {}
        self._asked: dict[int, str] = {}
        self._inboxes: dict[int, Hook] = {}
        self._next_answer = 0
        self._answer_prefix = ""
        self._up = asyncio.Event()
        self._refused = asyncio.Event()
        self._errors: list[BaseException] = []
        self._last_told = ""
        self._wants_tls = False
        self._deaf = False

    @classmethod
    async def open(cls, options: ConnectionOptions | str, *, name: str = "") -> Connection:
        """Connect within two seconds for each address, or raise `Unreachable`, in one sentence that says why.

        Raises `CredentialError` where the options themselves cannot be used.
        """
        given = ConnectionOptions(url=options or "nats://") if isinstance(options, str) else options
        given = given.without_secrets_in_url()
        arguments = given.connect_arguments()
        connection = cls()
        connection.url = given.address
        connection._wants_tls = given.wants_tls
        seconds = CONNECT_SECONDS * len(arguments["servers"])
        connecting = asyncio.ensure_future(connection.connect(**connection._settings(name) | arguments))
        refused = asyncio.ensure_future(connection._refused.wait())
        try:
            await asyncio.wait([connecting, refused], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done() and connecting.exception() is None and connection.is_connected:
                await connection._opened()
                return connection
            if connecting.done() and (error := connecting.exception()) is not None:
                await connection._failed(error)
        finally:
            refused.cancel()
            if connection.connections == 0:
                await _end(connecting)
                with contextlib.suppress(Exception):
                    await connection.close()
        raise Unreachable(why_not(connection.url, connection._errors, given))

    def _settings(self, name: str) -> dict[str, Any]:
        return {
            "name": name or None,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": RECONNECT_WAIT_SECONDS,
            "connect_timeout": CONNECT_SECONDS,
            "ping_interval": PING_SECONDS,
            "max_outstanding_pings": 1,
            "error_cb": self._failed,
            "reconnected_cb": self._was_reconnected,
            "closed_cb": self._was_closed,
        }

    async def _failed(self, error: BaseException) -> None:
        """What nats-py reports: of the first attempts to connect, of reconnects, of permissions."""
        text = str(error) or type(error).__name__
        telling = "permissions" in text.lower() or is_refusal(error)
        if self.connections:
            # Repeated ten times a second while a server refuses to take us back: said once.
            level = logging.WARNING if telling and text != self._last_told else logging.DEBUG
            self._last_told = text if telling else self._last_told
            _log.log(level, "%s: %s", self.url, text)
            return
        self._errors.append(error)
        # A single server that says no will say so again; of several another one may take us.
        if is_refusal(error) and len(self._server_pool) <= 1:
            self._refused.set()

    async def _opened(self) -> None:
        self.connections = 1
        self._up.set()
        self._answer_prefix = self.new_inbox() + "."
        await self.hook(self._answer_prefix + "*", self._answered)
        # Without a right to its own answers nothing would ever work, and nobody would say why.
        with contextlib.suppress(Exception):
            await self.flush(int(CONNECT_SECONDS))
        if self._deaf:
            self.connections = 0
            prefix = self._answer_prefix.removesuffix(".").rpartition(".")[0]
            raise Unreachable(
                f"the NATS server at {self.url} allows this user no answers under {prefix}: name the prefix that it "
                "allows with --nats-inbox PREFIX"
            )

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py would say who it is in the clear to whoever answers at a tls:// address.
        if initial_connection and self._wants_tls and not info.get("tls_required"):
            raise NotTrusted("the server offers no TLS")
        await super()._process_info(info, initial_connection)

    async def _process_connect_init(self) -> None:
        await super()._process_connect_init()
        if not self.is_connected:
            raise ClientError("the server ended the connection instead of taking it")

    # subscriptions with a hook
    async def hook(self, subject: str, hook: Hook, *, queue: str = "") -> int:
        """Have `hook` called for every message on `subject`, across reconnects. Returns the id for `unhook`."""
        self._sid += 1
        sid = self._sid
        subscription = Subscription(self, sid, subject, queue=queue)
        self._subs[sid] = subscription
        self._hooks[sid] = hook
        await self._send_subscribe(subscription)
        return sid

    def unhook(self, sid: int) -> None:
        self.unsubscribe_soon(sid)
        self._hooks.pop(sid, None)

    def unsubscribe_soon(self, sid: int) -> None:
        """Tell the server to send nothing more; what it sends until it knows still reaches the hook."""
        if self._subs.pop(sid, None) is not None and self.is_connected:
            self.write(f"UNSUB {sid}\r\n".encode())

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        hook = self._hooks.get(sid)
        if hook is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        try:
            hook(subject, reply, data, headers)
        except UnicodeDecodeError:
            _log.warning("a message on %r with reply %r was dropped: not UTF-8", subject[:200], reply[:200])
        except Exception:
            # One message that nobody understands must not end the reading of all others.
            _log.exception("a message on %s was not understood", subject.decode("utf-8", "replace"))

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Any:
        # As in nats-py, but what is not UTF-8 does not end the read loop: a stream would deliver it again and again.
        return self.msg_class(
            subject=subject.decode("utf-8", "replace"),
            reply=reply.decode("utf-8", "replace"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
        except ValueError:
            found = parse_headers(headers)
        return found

    # writing
    def write(self, command: bytes) -> None:
        """Queue protocol bytes; the flusher sends them in order. Dropped while disconnected."""
        if not self.is_connected:
            return
        self._pending.append(command)
        self._pending_data_size += len(command)
        queue = self._flush_queue
        if queue is not None and queue.empty():
            queue.put_nowait(asyncio.get_running_loop().create_future())

    async def send(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publish a core message; one that finds no connection is lost. Waits only while the socket takes no more.

        Raises `BusError` where it is too large, or its subject cannot be sent.
        """
        self.write(self.frame(subject, payload, reply=reply, headers=header_block(headers or {})))
        if self._pending_data_size > WRITE_BUFFER_BYTES:
            await self._flush_pending(force_flush=True)

    def frame(self, subject: str, payload: bytes, *, reply: str = "", headers: bytes = b"") -> bytes:
        if len(payload) + len(headers) > self.max_payload:
            raise BusError(
                f"a message of {len(payload) + len(headers)} bytes on {subject} is over the server's limit "
                f"of {self.max_payload} bytes"
            )
        try:
            return publish_frame(subject, reply, headers, payload)
        except ValueError as error:
            raise BusError(str(error)) from None

    # requests
    async def ask(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, timeout: float = 2.0
    ) -> Delivery:
        """Core request. Raises `NoResponders`, or `NoAnswer` after `timeout` seconds."""
        answer, raw = await self._ask(subject, payload, header_block(headers or {}), timeout)
        return Delivery(subject, answer, "", parse_headers(raw))

    async def ask_raw(
        self, subject: str, payload: bytes, timeout: float, *, again: float = 0.0
    ) -> tuple[bytes, bytes | None]:
        """Like `ask`, with the headers as they came; `again`: seconds after which it is asked once more, and so on.

        What is asked of a server that has just died is lost, and of a stream without a leader, too: only who asks again
        hears from the next one at once.
        """
        return await self._ask(subject, payload, b"", timeout, again or timeout)

    async def _ask(
        self, subject: str, payload: bytes, headers: bytes, timeout: float, again: float = 0.0
    ) -> tuple[bytes, bytes | None]:
        self._next_answer += 1
        token = self._next_answer
        answer: asyncio.Future[tuple[bytes, bytes | None]] = asyncio.get_running_loop().create_future()
        self._answers[token] = answer
        self._asked[token] = subject
        try:
            frame = self.frame(subject, payload, reply=f"{self._answer_prefix}{token}", headers=headers)
            async with asyncio.timeout(timeout):
                while True:
                    self.write(frame)
                    await asyncio.wait([answer], timeout=again or timeout)
                    if answer.done():
                        break
                data, raw = answer.result()
        except TimeoutError:
            raise NoAnswer(f"no answer on {subject} within {timeout:g} s") from None
        finally:
            self._answers.pop(token, None)
            self._asked.pop(token, None)
        if status(raw) == 503 and not data:
            raise NoResponders(f"nobody listens on {subject}")
        return data, raw

    def _answered(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        token = subject[len(self._answer_prefix) :]
        number = int(token) if token.isdigit() else 0
        inbox = self._inboxes.get(number)
        if inbox is not None:
            inbox(subject, reply, payload, headers)
            return
        answer = self._answers.get(number)
        if answer is not None and not answer.done():
            answer.set_result((payload, headers))

    def open_inbox(self, hook: Hook) -> str:
        """A subject whose messages `hook` gets. The server knows it already: it lies under the one for answers."""
        self._next_answer += 1
        self._inboxes[self._next_answer] = hook
        return f"{self._answer_prefix}{self._next_answer}"

    def close_inbox(self, subject: str) -> None:
        self._inboxes.pop(int(subject[len(self._answer_prefix) :]), None)

    # coming and going
    def listen(self, listener: Listener) -> None:
        self._listeners[id(listener)] = listener

    def forget(self, listener: Listener) -> None:
        self._listeners.pop(id(listener), None)

    async def wait_connected(self) -> None:
        """Return once the connection stands. Raises `BusError` where it was closed for good."""
        while not self.is_connected:
            if self.is_closed:
                raise BusError(f"the connection to {self.url} is closed")
            self._up.clear()
            await self._up.wait()

    def _tell_lost(self) -> None:
        self._pending.clear()
        self._pending_data_size = 0
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(NoAnswer(f"the connection to {self.url} was lost before an answer came"))
        for listener in list(self._listeners.values()):
            listener.lost()

    async def _was_reconnected(self) -> None:
        self.connections += 1
        self._up.set()
        for listener in list(self._listeners.values()):
            listener.restored()

    async def _was_closed(self) -> None:
        self._up.set()
        self._tell_lost()
        for listener in list(self._listeners.values()):
            listener.closed()

    async def _attempt_reconnect(self) -> None:
        # Abort, not close: closing waits until the peer has taken all bytes, which a stopped server never does.
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
        self._tell_lost()
        await super()._attempt_reconnect()

    async def _process_err(self, err_msg: str) -> None:
        violation = _VIOLATION.search(err_msg)
        if violation is not None:
            self._violated(violation[1], violation[2])
        # nats-py closes for good on most errors that a server names; only the first connect may end that way.
        if self.connections == 0 or "permissions violation" in err_msg:
            await super()._process_err(err_msg)
        elif "invalid" in err_msg:
            _log.warning("the server at %s refused a command: %s", self.url, err_msg)
        else:
            await self._process_op_err(ConnectionError(err_msg))

    def _violated(self, what: str, subject: str) -> None:
        """Tell whoever waits for an answer that there will be none. `subject` is in lower case."""
        if what == "subscription":
            self._deaf = self._deaf or subject == f"{self._answer_prefix}*".lower()
            return
        for token, asked in self._asked.items():
            answer = self._answers[token]
            if asked.lower() == subject and not answer.done():
                answer.set_exception(self.not_allowed(asked))
        for listener in list(self._listeners.values()):
            listener.forbidden(subject)

    def not_allowed(self, subject: str) -> NotAllowed:
        return NotAllowed(f"the NATS server at {self.url} does not allow this user to publish on {subject}")

    async def _read_loop(self) -> None:
        await super()._read_loop()
        if self.is_connected and self._reading_task is asyncio.current_task():
            await self._process_op_err(ConnectionError("reading ended by an error inside the client"))

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        # nats-py writes it past what is still queued, so that its answer would say nothing about that.
        self._pongs.append(asyncio.get_running_loop().create_future() if future is None else future)
        self.write(b"PING\r\n")

    async def _process_pong(self) -> None:
        # As in nats-py, but a pong for somebody who gave up waiting does not end the read loop.
        if self._pongs:
            waiting = self._pongs.pop(0)
            if not waiting.done():
                waiting.set_result(True)
            self._pongs_received += 1
            self._pings_outstanding = 0
