"""Which running requests are meant when something is to be moved."""

from __future__ import annotations

from actors.request_state import Request
from bus.messages import DescribeMove, MoveEnded, To


def is_meant(request: Request, message: DescribeMove) -> bool:
    """Whether a running request is of this model, and on this worker or server."""
    if message.model and request.model != message.model:
        return False
    return not message.worker or message.worker in (request.worker, server_of(request.worker))


def server_of(worker: str) -> str:
    """`s1` of `gpu/s1/0`."""
    return worker.split("/")[1] if worker.count("/") == 2 else ""


def not_moved(name: str, request: Request | None) -> To:
    """What is told of a request that was named and does not run."""
    reason = f"it is {request.status}, not running" if request is not None else "no such request is known here"
    attempt = request.attempt if request is not None else 1
    return To("record", MoveEnded(name, attempt, request.worker or "-" if request is not None else "-", reason=reason))
