"""Prompts that are too large for one message: cut into parts, stored beside the ledger, put together by the worker.

    client:  parts ─▶ PARTS_<cell>, each acknowledged        then `prompt_parts` in the body of infer or submit
    intake:  the first and the last part are there, and will be for long enough: the request is accepted
    worker:  all parts ─▶ digest ─▶ prompt; a later attempt, elsewhere, does the same

What travels is bytes: the text of a prompt in UTF-8, or the JSON of messages or tokens, SHA-256 over all of it. The
ledger holds the reference alone, so replay needs no parts. A part is stored once and never replaced; parts expire, and
a request that cites them gets a deadline before that.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from bus.contract import Log, LogFull, NoAnswer, WrongLastSequence
from bus.messages.requests import ChatMessage, Generation, PromptParts
from bus.part_limits import PART_LIMIT_BYTES, PARTS_LIMIT, UPLOAD_LIMIT_BYTES
from bus.subjects import Subjects

RETRY_SECONDS = 0.1
TOKENS_LIMIT = 1_000_000


class PartsRefused(Exception):
    """Parts that make no prompt, or that are not there; one sentence."""


class UploadFailed(Exception):
    """A prompt that could not be stored in parts; one sentence."""


@dataclass(frozen=True, slots=True)
class Upload:
    """The parts of one prompt, and what a request cites them by."""

    cited: PromptParts
    parts: tuple[bytes, ...]

    @classmethod
    def of(cls, form: str, value: Any, name: str, *, part_bytes: int = PART_LIMIT_BYTES) -> Upload:
        """Of the value of `prompt`, `messages` or `tokens` (`form`). Raises `UploadFailed` where it is too large.

        The upload is named after `name` and the content: whoever repeats it stores nothing twice.
        """
        data = value.encode() if form == "prompt" else msgspec.json.encode(value)
        if len(data) > UPLOAD_LIMIT_BYTES:
            raise UploadFailed(f"{form} takes {len(data)} bytes, at most {UPLOAD_LIMIT_BYTES} are taken, in parts")
        size = max(part_bytes, -(-len(data) // PARTS_LIMIT))
        parts = tuple(data[at : at + size] for at in range(0, len(data), size))
        digest = hashlib.sha256(data).hexdigest()
        upload = hashlib.sha256(f"{name}\0{digest}".encode()).hexdigest()[:32]
        cited = msgspec.convert(
            {"upload": upload, "count": len(parts), "digest": digest, "form": form}, type=PromptParts
        )
        return cls(cited, parts)

    async def store(self, log: Log, subjects: Subjects, *, patience: float) -> None:
        """Until every part is acknowledged; `patience` in seconds bounds each. Raises `UploadFailed`, `BusError`."""
        for index, part in enumerate(self.parts):
            await self._store(log, subjects.part(self.cited.upload, index), part, patience)

    @staticmethod
    async def _store(log: Log, subject: str, part: bytes, patience: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while True:
            try:
                await log.append(subject, part, expected_last=0)
            except WrongLastSequence:
                pass  # it is stored: by an append whose answer got lost, or by an earlier upload
            except LogFull:
                raise UploadFailed("the cell has no room for the parts of large prompts: try again later") from None
            except NoAnswer:
                if loop.time() >= until:
                    raise UploadFailed(f"{subject} stays unanswered: the cell takes no parts at the moment") from None
                await asyncio.sleep(RETRY_SECONDS)
                continue
            return


async def fetch(log: Log, subjects: Subjects, cited: PromptParts) -> bytes:
    """All parts together. Raises `PartsRefused`, and `BusError` where nobody answers."""
    data = bytearray()
    for index in range(cited.count):
        record = await log.last(subjects.part(cited.upload, index))
        if record is None:
            raise PartsRefused(missing(cited, index))
        data += record.payload
        if len(data) > UPLOAD_LIMIT_BYTES:
            raise PartsRefused(
                f"the parts of upload {cited.upload} have more than {UPLOAD_LIMIT_BYTES} bytes together: shorten it"
            )
    return bytes(data)


def missing(cited: PromptParts, index: int) -> str:
    """The sentence about a part that is not there."""
    return (
        f"part {index} of {cited.count} of upload {cited.upload} is not stored (any more): publish all parts, and wait "
        "for each acknowledgement, before the request"
    )


def assemble(generation: Generation, data: bytes) -> Generation:
    """The same with its prompt in the place of its parts. Raises `PartsRefused`."""
    cited = generation.parts
    assert cited is not None
    digest = hashlib.sha256(data).hexdigest()
    if digest != cited.digest:
        raise PartsRefused(
            f"the parts of upload {cited.upload} have the SHA-256 {digest[:12]}…, where the request says "
            f"{cited.digest[:12]}…: upload them again under another name"
        )
    try:
        if cited.form == "prompt":
            text = data.decode()
            if not text:
                raise PartsRefused(f"the parts of upload {cited.upload} are empty")
            return msgspec.structs.replace(generation, prompt=text, parts=None)
        if cited.form == "messages":
            messages = _not_empty(_messages.decode(data), cited)
            return msgspec.structs.replace(
                generation, messages=tuple(ChatMessage(one.role, one.content) for one in messages), parts=None
            )
        tokens = _not_empty(_tokens.decode(data), cited)
    except UnicodeDecodeError:
        raise PartsRefused(f"the parts of upload {cited.upload} are not UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise PartsRefused(f"the parts of upload {cited.upload} are not the JSON of {cited.form}: {error}") from None
    if len(tokens) > TOKENS_LIMIT:
        raise PartsRefused(f"upload {cited.upload} has {len(tokens)} tokens, at most {TOKENS_LIMIT} are taken")
    return msgspec.structs.replace(generation, tokens=tokens, parts=None)


def _not_empty(items: Any, cited: PromptParts) -> Any:
    if not items:
        raise PartsRefused(f"the parts of upload {cited.upload} hold no {cited.form}")
    return items


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message as large as a prompt in parts may be."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.role) <= 64:
            raise ValueError("a role has 1 to 64 characters")


_messages = msgspec.json.Decoder(tuple[_Message, ...])
_tokens = msgspec.json.Decoder(tuple[int, ...])


def large_form(body: dict[str, Any], limit: int) -> str:
    """Which of prompt, messages and tokens takes more than `limit` bytes in the body of a request; empty for none."""
    prompt, messages, tokens = body.get("prompt"), body.get("messages"), body.get("tokens")
    if isinstance(prompt, str) and (len(prompt) > limit or 4 * len(prompt) > limit < len(prompt.encode())):
        return "prompt"
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        return "messages" if len(msgspec.json.encode(messages)) > limit else ""
    if isinstance(tokens, Sequence) and 2 * len(tokens) > limit // 5:
        return "tokens" if len(msgspec.json.encode(tokens)) > limit else ""
    return ""
