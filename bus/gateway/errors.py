"""Errors as OpenAI's clients expect them: a status, and one object with message, type, param and code.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": "bad_request"}}

`code` is the contract's own name (docs/subjects.md) except where OpenAI has one for the very same thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from bus.answer import RequestFailed

INVALID = "invalid_request_error"
SERVER = "server_error"
RATE = "rate_limit_error"
AUTHENTICATION = "authentication_error"

_STATUS: dict[str, tuple[int, str]] = {
    "bad_request": (400, INVALID),
    "invalid_request": (400, INVALID),
    "unknown_model": (404, INVALID),
    "unknown_request": (404, INVALID),
    "key_reused": (409, INVALID),
    "too_large": (413, INVALID),
    "queue_full": (429, RATE),
    "cancelled": (499, INVALID),
    "not_ready": (503, SERVER),
    "ledger_full": (503, SERVER),
    "unknown": (503, SERVER),
    "no_answer": (503, SERVER),
    "no_connection": (503, SERVER),
    "bus": (503, SERVER),
    "start_failed": (503, SERVER),
    "expired": (503, SERVER),
    "stopping": (503, SERVER),
    "deadline": (504, SERVER),
}
_NAMES = {"unknown_model": "model_not_found"}
_REPEATABLE = frozenset(
    {"queue_full", "not_ready", "ledger_full", "unknown", "no_answer", "no_connection", "bus", "start_failed"}
    | {"expired", "stopping"}
)
DEFAULT_RETRY_MS = 1000
_FIRST_WORD = re.compile(r"[a-z_]+")


class HttpError(Exception):
    """A request that is answered with an error. `retry_ms` 0: repeating it is of no use; `allow`: methods that are."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str = "",
        param: str = "",
        retry_ms: int = 0,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_ms = retry_ms
        self.allow = allow

    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param or None,
            "code": self.code or None,
        }
        return msgspec.json.encode({"error": error})

    def headers(self) -> dict[str, str]:
        """When to come again, for any client (whole seconds) and for OpenAI's (milliseconds; whether at all)."""
        if not self.retry_ms:
            return {"x-should-retry": "false"}
        return {
            "retry-after": str(-(-self.retry_ms // 1000)),
            "retry-after-ms": str(self.retry_ms),
            "x-should-retry": "true",
        }


def bad_field(param: str, message: str, *, code: str = "bad_request") -> HttpError:
    """A body that cannot be taken because of one field."""
    return HttpError(400, message, code=code, param=param)


def stopping() -> HttpError:
    """The answer of a gateway that ends."""
    return HttpError(503, "this gateway is stopping: ask again", kind=SERVER, code="stopping", retry_ms=1000)


def from_cell(failure: RequestFailed, names: Mapping[str, str] | None = None) -> HttpError:
    """What the cell or the library said of a request, with the field renamed as the client wrote it.

    `names` maps fields of the contract to those of the body.
    """
    status, kind = _STATUS.get(failure.code, (500, SERVER))
    message, param = renamed(failure.message, names or {})
    code = _NAMES.get(failure.code, failure.code)
    if failure.code == "unknown_model":
        param = "model"
    elif failure.code == "key_reused":
        param = "Idempotency-Key"
    elif status == 400 and "context" in message:
        param = param or "messages"
        code = "context_length_exceeded"
    retry_ms = (failure.retry_ms or DEFAULT_RETRY_MS) if failure.code in _REPEATABLE else 0
    return HttpError(status, message, kind=kind, code=code, param=param, retry_ms=retry_ms)


def renamed(message: str, names: Mapping[str, str]) -> tuple[str, str]:
    """A sentence of the contract that begins with a field, in the words of the body, and that field."""
    found = _FIRST_WORD.match(message)
    if found is None or found.group() not in names:
        return message, ""
    name = names[found.group()]
    return name + message[found.end() :], name
