"""The client library: ask a cell, and read each answer once and in order.

    async with Client.connect("nats://127.0.0.1:4222", cell="main") as client:
        async for chunk in client.infer("llama-a", prompt="Once upon a time", max_tokens=64):
            print(chunk.text, end="")

        answer = await client.infer("llama-a", messages=[{"role": "user", "content": "Hi"}], key="order-7").whole()
        request = await client.submit("llama-a", prompt="Later", key="order-8")
        result = await client.result(request, wait=60)

What is imported from here is the public surface: `Client`, `Answer` (what `infer` and `resume` return), `Chunk`,
`Result`, `Embeddings`, `TokenCounts`, `Patience`, `RequestFields`, `RequestFailed`, `Unreachable`.

Every request gets an idempotency key, so that the library may repeat it whenever an answer stays out. What a cell
refuses or fails raises `RequestFailed`, with a `code` to program against. All answers of a client come over one
subscription of its connection, and wait there within bounds: a slow reader costs memory for some thousand chunks, not
for all. It runs on any `bus.contract.Bus`, and makes no threads.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import msgspec

from bus.answer import Answer, Patience, Question, RequestFailed
from bus.api import DEFAULT_CLIENT, Refusal, parse_infer
from bus.contract import Bus, BusError, NoAnswer, NoResponders, Unreachable
from bus.credentials import DEFAULT_URL, ConnectionOptions
from bus.embeddings import numbers
from bus.messages.envelope import OUTPUT_LIMIT_BYTES
from bus.messages.requests import CHOICES_LIMIT, Encoding, request_id
from bus.part_limits import PART_LIMIT_BYTES
from bus.parts import Upload, UploadFailed, large_form
from bus.replies import Chunk, Result, Status, TokenCounts, decode_reply, encode_reply, reply_headers
from bus.subjects import Subjects

ASK_SECONDS = 2.0
PARTS_FROM_BYTES = 256 * 1024
"""From this size on a prompt goes to the cell in parts, ahead of its request."""
_FIRST_POLL_SECONDS = 0.05
_LAST_POLL_SECONDS = 1.0


class RequestFields(TypedDict, total=False):
    """The fields of `infer` and `submit` beside prompt and key, as docs/subjects.md describes them; None is absent."""

    messages: Sequence[Mapping[str, str]] | None
    tokens: Sequence[int] | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_tokens: Sequence[int] | None
    min_tokens: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    logprobs: int | None
    n: int | None
    priority: int | None
    client: str | None
    deadline_ms: int | None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of one request in the order of its inputs, as bytes (float32, little endian) and as numbers."""

    request: str
    vectors: tuple[bytes, ...]
    prompt_tokens: int

    @property
    def numbers(self) -> list[list[float]]:
        return [numbers(vector) for vector in self.vectors]


class Client:
    """Asks one cell over one bus. `Client.connect` opens and closes a connection of its own.

    `name` is the `client` of its requests: keys are unique within it, so programs that share keys share the name. A
    prompt of more than `parts_from_bytes` goes to the cell in parts (`bus.parts`), up to 8 MiB.
    """

    def __init__(
        self,
        bus: Bus,
        cell: str = "main",
        *,
        name: str = DEFAULT_CLIENT,
        encoding: Encoding = "json",
        patience: Patience | None = None,
        parts_from_bytes: int = PARTS_FROM_BYTES,
    ) -> None:
        self.bus = bus
        self.name = name
        self._subjects = Subjects(cell)
        self._encoding: Encoding = encoding
        self._headers = reply_headers(encoding)
        self._patience = patience or Patience()
        self._parts_from_bytes = parts_from_bytes
        self._open: weakref.WeakValueDictionary[int, Answer] = weakref.WeakValueDictionary()
        self._submitted: dict[str, None] = {}

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str | ConnectionOptions = DEFAULT_URL,
        *,
        cell: str = "main",
        name: str = DEFAULT_CLIENT,
        encoding: Encoding = "json",
        patience: Patience | None = None,
    ) -> AsyncIterator[Client]:
        """A client with its own connection, which comes back by itself whenever it is lost.

        `url`: one address, or several with commas; or `ConnectionOptions`, which say all about the connection
        (credentials, TLS). Raises `Unreachable` where no server answers within two seconds for each address, or where
        it refuses the credentials.
        """
        from bus.jetstream import JetStreamBus

        bus = await JetStreamBus.connect(url, cell, name="longshore-client")
        client = cls(bus, cell, name=name, encoding=encoding, patience=patience)
        try:
            yield client
        finally:
            await client.close()
            await bus.close()

    async def close(self) -> None:
        """Stop reading all answers; the bus stays open. What was accepted goes on without `cancel_on_close`."""
        for answer in list(self._open.values()):
            await answer.aclose()

    # requests
    def infer(
        self,
        model: str,
        prompt: str | None = None,
        *,
        key: str | None = None,
        start: int = 0,
        cancel_on_close: bool = False,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Answer:
        """Ask; nothing is sent before the first chunk is awaited.

        The same `key` gives the same answer for as long as the cell keeps results, whoever asks and whatever was
        restarted in between; without one, two calls are two requests. `start` is the first position wanted. With
        `cancel_on_close` an answer that is left early (closed, its task cancelled, `timeout`) is cancelled in the cell.
        `timeout` (seconds, for the whole answer) ends the reading with `RequestFailed`; `deadline_ms` has the cell
        itself end the request.
        """
        key = secrets.token_hex(16) if key is None else key
        if not model:
            raise RequestFailed("unknown_model", "the name of the model is empty")
        body, upload = self._in_parts(self._fields(dict(fields), prompt=prompt, key=key))
        self._encode(body)
        request = request_id(body["client"], key)
        first = Question(
            self._subjects.infer(model),
            lambda at: self._encode(body | {"from": at}),
            self._headers,
            self._store(upload),
        )
        return self._answer(request, first, start, cancel_on_close, timeout, body.get("n", 1))

    def embedding(
        self,
        model: str,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        key: str | None = None,
        start: int = 0,
        cancel_on_close: bool = False,
        timeout: float | None = None,
        deadline_ms: int | None = None,
    ) -> Answer:
        """The vectors of texts (or of lists of token ids) as they are made: position i is input i, and a chunk's
        `vectors` are float32, little endian. Arguments as of `infer`; `embed` gives the numbers of all of them.
        """
        key = secrets.token_hex(16) if key is None else key
        if not model:
            raise RequestFailed("unknown_model", "the name of the model is empty")
        texts = not inputs or isinstance(inputs[0], str)
        given: dict[str, Any] = {"input" if texts else "tokens": list(inputs), "deadline_ms": deadline_ms}
        body = self._fields(given, key=key, stream=True)
        self._encode(body)
        request = request_id(body["client"], key)
        first = Question(self._subjects.embed(model), lambda at: self._encode(body | {"from": at}), self._headers)
        return self._answer(request, first, start, cancel_on_close, timeout)

    async def embed(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        key: str | None = None,
        timeout: float | None = None,
        deadline_ms: int | None = None,
    ) -> Embeddings:
        """One vector for each text (or list of token ids), at most 256 of them, in one request.

        Raises `RequestFailed`, also (`cancelled`, `deadline`) where it ended before all vectors were made.
        """
        several: Sequence[str] | Sequence[Sequence[int]] = [inputs] if isinstance(inputs, str) else inputs
        answer = self.embedding(model, several, key=key, timeout=timeout, deadline_ms=deadline_ms)
        vectors = [vector async for chunk in answer for vector in chunk.vectors]
        if answer.end != "stop":
            how = f"ended as {answer.end} after {len(vectors)} of {len(several)} vectors"
            raise RequestFailed(answer.end or "failed", f"request {answer.request_id} {how}")
        tokens = answer.usage.prompt_tokens if answer.usage is not None else 0
        return Embeddings(answer.request_id, tuple(vectors), tokens)

    def resume(
        self, request: str, start: int = 0, *, cancel_on_close: bool = False, timeout: float | None = None
    ) -> Answer:
        """Read a request that exists, from position `start` on: while it runs, and for as long as results are kept."""
        return self._answer(request, None, start, cancel_on_close, timeout)

    def _answer(
        self,
        request: str,
        first: Question | None,
        start: int,
        cancel_on_close: bool,
        timeout: float | None,
        choices: int = 1,
    ) -> Answer:
        async def cancel() -> None:
            await self.cancel(request)

        answer = Answer(
            self.bus,
            request,
            first=first,
            resume=Question(self._subjects.resume(request), lambda at: self._encode({"from": at}), self._headers),
            start=start,
            choices=choices if choices in range(1, CHOICES_LIMIT + 1) else 1,
            encoding=self._encoding,
            patience=self._patience,
            cancel=cancel,
            cancel_on_close=cancel_on_close,
            timeout=timeout,
            fresh=request in self._submitted,
            closed=self._forget,
        )
        self._open[id(answer)] = answer
        return answer

    def _forget(self, answer: Answer) -> None:
        self._open.pop(id(answer), None)

    async def submit(
        self, model: str, prompt: str | None = None, *, key: str | None = None, **fields: Unpack[RequestFields]
    ) -> str:
        """Leave a request with the cell and return its id; the answer is read with `result` or `resume`.

        Returns once the request is stored: it then runs, whatever is restarted. What the contract refuses raises
        `RequestFailed` before anything is sent.
        """
        key = secrets.token_hex(16) if key is None else key
        body, upload = self._in_parts(self._fields(dict(fields), prompt=prompt, key=key))
        payload = self._encode(body)
        try:
            request = parse_infer(payload, self._headers.get("Content-Type"), model).request
        except Refusal as refusal:
            raise RequestFailed(refusal.name, refusal.message, refusal.retry_ms) from None
        if (store := self._store(upload)) is not None:
            await store()
        acknowledged = await self._ask(self._subjects.submit(model), payload, patient=True)
        try:
            error = msgspec.json.decode(acknowledged, type=_Acknowledged).error
        except msgspec.DecodeError as reason:
            raise RequestFailed("bad_reply", f"the acknowledgement of a stream was expected: {reason}") from None
        if error:
            why = error.get("description", "no reason given")
            raise RequestFailed("not_ready", f"the stream of submitted requests did not take it: {why}")
        self._submitted[request] = None
        if len(self._submitted) > 10_000:
            del self._submitted[next(iter(self._submitted))]
        return request

    async def result(self, request: str, *, wait: float = 0.0) -> Result:
        """What is known of a request: still `running` or `ended` (then `end`, `text`, `tokens`, `usage`, `error`).

        With `wait` (seconds) it returns as soon as the request has ended, else what is known then. Raises
        `RequestFailed` with code `unknown_request` where the cell does not know it (any more).
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        pause = _FIRST_POLL_SECONDS
        while True:
            last = loop.time() >= until
            try:
                reply = self._decode(await self._ask(self._subjects.result(request), b"", patient=not last))
                if isinstance(reply, Result) and (last or reply.status == "ended"):
                    return reply
            except RequestFailed as failure:
                if last or failure.code != "unknown_request" or request not in self._submitted:
                    raise
            await asyncio.sleep(min(pause, max(0.0, until - loop.time())))
            pause = min(pause * 1.5, _LAST_POLL_SECONDS)

    async def cancel(self, request: str) -> None:
        """Have a request ended as soon as possible; its answer then ends as `cancelled`, unless it ended before."""
        self._decode(await self._ask(self._subjects.cancel(request), b"", patient=True))

    # operators
    async def models(self) -> list[dict[str, Any]]:
        """The cards of all models, with the tiers they lie in."""
        found: list[dict[str, Any]] = await self._admin("models")
        return found

    async def status(self) -> dict[str, Any]:
        """The state of the cell."""
        found: dict[str, Any] = await self._admin("status")
        return found

    async def add_model(self, model: str, source: str = "") -> Any:
        """Tell the cell that a packed model lies under this name; with `source` (an absolute directory or an http(s)
        address) its servers can fetch it there."""
        return await self._admin("model.add", {"model": model, **({"source": source} if source else {})})

    async def remove_model(self, model: str) -> Any:
        return await self._admin("model.remove", {"model": model})

    async def warm_model(self, model: str, server: str = "") -> int:
        """Have a model brought to DRAM before requests come, on this server or where it is there soonest; the ledger
        sequence that `model.warmed` refers to."""
        answer = await self._admin("model.warm", {"model": model, **({"server": server} if server else {})})
        return int(answer["fact"])

    async def _admin(self, verb: str, body: dict[str, Any] | None = None) -> Any:
        payload = msgspec.json.encode(body) if body else b""
        answer = msgspec.json.decode(await self._ask(self._subjects.admin(verb), payload, headers={}))
        if isinstance(answer, dict) and answer.get("status") == "refused":
            error = answer.get("error") or {}
            raise RequestFailed(error.get("code", "refused"), error.get("message", "refused"), error.get("retry_ms", 0))
        return answer

    # on the wire
    def _fields(self, fields: dict[str, Any], **named: Any) -> dict[str, Any]:
        body = {name: value for name, value in (named | fields).items() if value is not None}
        body.setdefault("client", self.name)
        for name, value in body.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestFailed("bad_request", f"{name} must be a finite number, got {value}")
        return body

    def _in_parts(self, body: dict[str, Any]) -> tuple[dict[str, Any], Upload | None]:
        """The body with a reference in the place of a prompt that is too large for one message, and its parts."""
        form = large_form(body, self._parts_from_bytes)
        if not form:
            return body, None
        name = f"{body['client']}\0{body['key']}"
        try:
            upload = Upload.of(form, body[form], name, part_bytes=min(PART_LIMIT_BYTES, self._parts_from_bytes))
        except UploadFailed as failed:
            raise RequestFailed("too_large", str(failed)) from None
        except UnicodeEncodeError:
            raise RequestFailed("bad_request", f"{form} has a text that is not valid Unicode") from None
        cited = {"prompt_parts": msgspec.to_builtins(upload.cited)}
        return {name: value for name, value in body.items() if name != form} | cited, upload

    def _store(self, upload: Upload | None) -> Callable[[], Awaitable[None]] | None:
        if upload is None:
            return None
        stored = False

        async def store() -> None:
            nonlocal stored
            if stored:
                return
            try:
                await upload.store(self.bus.parts, self._subjects, patience=self._patience.total)
            except UploadFailed as failed:
                raise RequestFailed("not_ready", str(failed), 1000) from None
            except BusError as error:
                raise RequestFailed("bus", str(error)) from None
            stored = True

        return store

    def _encode(self, body: dict[str, Any]) -> bytes:
        try:
            payload = encode_reply(body, self._encoding)
        except UnicodeEncodeError:
            raise RequestFailed("bad_request", "the request has a text that is not valid Unicode") from None
        if len(payload) > OUTPUT_LIMIT_BYTES:
            raise RequestFailed(
                "too_large", f"the request has {len(payload)} bytes, at most {OUTPUT_LIMIT_BYTES} are taken"
            )
        return payload

    async def _ask(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, patient: bool = False
    ) -> bytes:
        """One question, one answer; a patient one is repeated until patience is over (all of them are idempotent)."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        headers = self._headers if headers is None else headers
        timeout = self._patience.unanswered if patient else ASK_SECONDS
        while True:
            try:
                return (await self.bus.request(subject, payload, headers=headers, timeout=timeout)).payload
            except NoResponders:
                if not patient or loop.time() - started >= self._patience.nobody:
                    message = f"nobody listens on {subject}: check the name of the cell, and that it is up"
                    raise RequestFailed("not_ready", message) from None
            except NoAnswer:
                if not patient or loop.time() - started >= self._patience.total:
                    raise RequestFailed("no_answer", f"no answer on {subject}: try again") from None
                timeout = min(2 * timeout, ASK_SECONDS)
                continue
            except BusError as error:
                raise RequestFailed("bus", str(error)) from None
            await asyncio.sleep(0.2)

    def _decode(self, payload: bytes) -> Status | Result:
        """A status that accepts, or a result; a refusal is raised."""
        try:
            reply = decode_reply(payload, self._encoding)
        except ValueError as error:
            raise RequestFailed("bad_reply", str(error)) from None
        if isinstance(reply, Result) or (isinstance(reply, Status) and reply.status == "accepted"):
            return reply
        if reply.error is None:
            raise RequestFailed("bad_reply", "the cell sent a chunk where a status or a result was expected")
        raise RequestFailed(reply.error.code, reply.error.message, reply.error.retry_ms)


class _Acknowledged(msgspec.Struct):
    """The acknowledgement of a JetStream append, as far as a client cares."""

    error: dict[str, Any] | None = None
    seq: int = 0


__all__ = [
    "Answer",
    "Chunk",
    "Client",
    "ConnectionOptions",
    "Patience",
    "RequestFailed",
    "RequestFields",
    "Result",
    "TokenCounts",
    "Unreachable",
]
