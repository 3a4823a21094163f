"""Bytes of the NATS client protocol that we make and read ourselves, because both sit on the hot path.

Sizes matter to the in-memory bus as well: the server counts headers as part of the payload limit.
"""

from __future__ import annotations

import re

from bus.contract import PUBLISHER_HEADER

MESSAGE_ID = "Nats-Msg-Id"
EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
MAX_PAYLOAD = 1024 * 1024
"""Bytes of payload and headers that a NATS server takes by default."""

_VERSION = b"NATS/1.0\r\n"
_PUBLISHER = PUBLISHER_HEADER.encode() + b": "
_SUBJECT = re.compile(r"[^\s]+\Z")


def header_block(headers: dict[str, str]) -> bytes:
    """The header section of a message; empty where there are no headers. Raises ValueError on line breaks."""
    if not headers:
        return b""
    lines = [_VERSION]
    for name, value in headers.items():
        if "\n" in value or "\r" in value:
            raise ValueError(f"header {name} holds a line break")
        lines.append(f"{name}: {value}\r\n".encode())
    lines.append(b"\r\n")
    return b"".join(lines)


def append_headers(message_id: str, expected_last: int | None, publisher: str) -> bytes:
    """The header section of an append."""
    if not (message_id or publisher) and expected_last is None:
        return b""
    headers = {}
    if message_id:
        headers[MESSAGE_ID] = message_id
    if expected_last is not None:
        headers[EXPECTED_LAST] = str(expected_last)
    if publisher:
        headers[PUBLISHER_HEADER] = publisher
    return header_block(headers)


def publish_frame(subject: str, reply: str, headers: bytes, payload: bytes) -> bytes:
    """PUB or HPUB with everything that belongs to it. Raises ValueError where the subject cannot be sent."""
    if _SUBJECT.match(subject) is None:
        raise ValueError(f"{subject!r} is not a subject")
    size = len(payload)
    if not headers:
        return b"".join((f"PUB {subject} {reply} {size}\r\n".encode(), payload, b"\r\n"))
    line = f"HPUB {subject} {reply} {len(headers)} {len(headers) + size}\r\n"
    return b"".join((line.encode(), headers, payload, b"\r\n"))


def parse_headers(raw: bytes | None) -> dict[str, str]:
    """Names and values of a header section; of a repeated name the last one."""
    if not raw:
        return {}
    headers = {}
    for line in raw.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.decode("utf-8", "replace")] = value.strip().decode("utf-8", "replace")
    return headers


def status(raw: bytes | None) -> int:
    """The status code that a server put into a header section; 0 where it says none."""
    if not raw or not raw.startswith(b"NATS/1.0 "):
        return 0
    code = raw[9:12]
    return int(code) if code.isdigit() else 0


def publisher_of(raw: bytes | None) -> str:
    """The publisher named in a header section: a search for one name, far cheaper than parsing all of them."""
    if not raw:
        return ""
    at = raw.find(_PUBLISHER)
    if at < 0:
        return ""
    at += len(_PUBLISHER)
    return raw[at : raw.index(b"\r\n", at)].decode("utf-8", "replace")
