"""Which running requests are meant when something is to be moved."""

from __future__ import annotations

from actors.request_state import Request
from bus.messages import DescribeMove, Generation, MoveEnded, To

CHARACTERS_PER_TOKEN = 4
"""Of prompts that nobody has tokenized yet."""
PART_TOKENS = 100_000
"""Of a part of a prompt that lies beside the ledger: so many at the most, about."""


def is_meant(request: Request, message: DescribeMove) -> bool:
    """Whether a running request is of this model, and on this worker or server."""
    if message.model and request.model != message.model:
        return False
    return not message.worker or message.worker in (request.worker, server_of(request.worker))


def server_of(worker: str) -> str:
    """`s1` of `gpu/s1/0`."""
    return worker.split("/")[1] if worker.count("/") == 2 else ""


def about_tokens(generation: Generation) -> int:
    """About how many tokens a prompt has, as far as the fact tells; 0 for embeddings, which are not moved."""
    if generation.inputs is not None:
        return 0
    if generation.tokens is not None:
        return len(generation.tokens)
    if generation.parts is not None:
        return generation.parts.count * PART_TOKENS
    characters = len(generation.prompt or "") + sum(len(message.content) for message in generation.messages or ())
    return characters // CHARACTERS_PER_TOKEN + 1


def not_moved(name: str, request: Request | None) -> To:
    """What is told of a request that was named and does not run."""
    reason = f"it is {request.status}, not running" if request is not None else "no such request is known here"
    attempt = request.attempt if request is not None else 1
    return To("record", MoveEnded(name, attempt, request.worker or "-" if request is not None else "-", reason=reason))
