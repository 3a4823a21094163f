"""API keys: who may ask, and under which client name of the cell.

A file has one key per line, `NAME KEY`; empty lines and those that begin with `#` are skipped. Idempotency keys are
unique within a name, so two API keys with different names never see each other's answers.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from bus.api import DEFAULT_CLIENT, NAME_LIMIT
from bus.errors import UserError
from bus.gateway.errors import AUTHENTICATION, HttpError

SHORTEST_KEY = 8
LONGEST_KEY = 512


class ApiKeys:
    """Pairs of client name and key; without any, everybody may ask and is called `anonymous`."""

    def __init__(self, pairs: list[tuple[str, str]] | None = None) -> None:
        self._known = [(name, _digest(key)) for name, key in pairs or []]

    def __bool__(self) -> bool:
        return bool(self._known)

    def client(self, authorization: str) -> str:
        """The client name of whoever sent this Authorization header. Raises `HttpError`.

        All keys are compared, each in constant time, so that the time taken tells nothing of them.
        """
        if not self._known:
            return DEFAULT_CLIENT
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("no API key: send it as `Authorization: Bearer KEY`")
        digest = _digest(key.strip())
        found = ""
        for name, known in self._known:
            if hmac.compare_digest(known, digest):
                found = name
        if not found:
            raise _refused("the API key is not known here")
        return found


def _refused(message: str) -> HttpError:
    return HttpError(401, message, kind=AUTHENTICATION, code="invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(file: Path) -> ApiKeys:
    """The keys in a file. Raises `UserError` with file and line where one is wrong."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"the file of API keys {file} cannot be read: {reason}") from None
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        parts = text.split()
        where = f"{file}, line {number}"
        if len(parts) != 2:
            raise UserError(f"{where}: write a name and a key, with a space between them")
        name, key = parts
        if len(name) > NAME_LIMIT or "\0" in name:
            raise UserError(f"{where}: a name has 1 to {NAME_LIMIT} characters")
        if not SHORTEST_KEY <= len(key) <= LONGEST_KEY or not key.isascii():
            raise UserError(f"{where}: a key has {SHORTEST_KEY} to {LONGEST_KEY} ASCII characters")
        if any(key == known for _, known in pairs):
            raise UserError(f"{where}: this key stands in the file twice")
        pairs.append((name, key))
    if not pairs:
        raise UserError(f"the file of API keys {file} has no key: write lines of the form `NAME KEY`")
    return ApiKeys(pairs)
