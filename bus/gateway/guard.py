"""What stands before every route: errors in OpenAI's shape, API keys, request ids, a bound on what is handled."""

from __future__ import annotations

import asyncio
import secrets
import time

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bus.answer import RequestFailed
from bus.gateway.connected import ClientGone
from bus.gateway.errors import RATE, SERVER, HttpError, from_cell
from bus.gateway.keys import ApiKeys

GONE_STATUS = 499
"""What a log says of a client that went away: it was answered nothing."""

log = structlog.get_logger("longshore.gateway")


class Guard:
    """An ASGI application around another one. Paths under `/v1` want a key where there are any."""

    def __init__(self, inner: ASGIApp, keys: ApiKeys, limit: int) -> None:
        self._inner = inner
        self._keys = keys
        self._limit = limit
        self._handled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, send)
        self._handled += 1
        try:
            if scope["path"].startswith("/v1"):
                if self._handled > self._limit:
                    raise HttpError(
                        429,
                        f"{self._limit} requests are being handled here already",
                        kind=RATE,
                        code="queue_full",
                        retry_ms=1000,
                    )
                scope["state"]["client"] = self._keys.client(_header(scope, b"authorization"))
            await self._inner(scope, receive, exchange.send)
        except HttpError as error:
            await exchange.fail(error)
        except ClientGone:
            exchange.status = exchange.status or GONE_STATUS
        except HTTPException as error:
            await exchange.fail(_of_router(error, scope))
        except RequestFailed as failure:
            await exchange.fail(from_cell(failure))
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("an error of the gateway itself", method=scope["method"], path=scope["path"][:200])
            await exchange.fail(HttpError(500, "an error of the gateway itself", kind=SERVER, code="internal"))
        finally:
            self._handled -= 1
            exchange.log()


class _Exchange:
    """One request and what it was answered."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._began = time.monotonic()
        self.status = 0
        self._scope.setdefault("state", {})["request_id"] = secrets.token_hex(16)
        self._scope["app"] = self  # has the router raise what it refuses

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message["headers"])
            headers.append((b"x-request-id", self._scope["state"]["request_id"].encode()))
            message = {**message, "headers": headers}
        await self._send(message)

    async def fail(self, error: HttpError) -> None:
        if self.status:
            return
        body = error.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in error.headers().items()]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if error.allow:
            headers.append((b"allow", error.allow.encode()))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        path = self._scope["path"]
        if path.startswith("/health"):
            return
        log.info(
            "answered",
            method=self._scope["method"],
            path=path[:200],
            status=self.status,
            ms=int((time.monotonic() - self._began) * 1000),
            client=self._scope["state"].get("client", ""),
            request=self._scope["state"]["request_id"],
        )


def _of_router(error: HTTPException, scope: Scope) -> HttpError:
    path = scope["path"][:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return HttpError(
            405, f"{path} takes {allowed}, not {scope['method']}", code="method_not_allowed", allow=allowed
        )
    if error.status_code == 404:
        return HttpError(404, f"there is nothing at {path}", code="not_found")
    return HttpError(error.status_code, str(error.detail), code="bad_request")


def _header(scope: Scope, name: bytes) -> str:
    for known, value in scope["headers"]:
        if known == name:
            return str(value.decode("latin-1"))
    return ""
