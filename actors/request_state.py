"""What the requests actor knows: every request that it remembers, and which of them are answers of one."""

from __future__ import annotations

from typing import Literal

import msgspec

from bus.messages import Choice, Death, Generation, ReplyTo, RequestEnded, RequestsConfigured, Span


class Request(msgspec.Struct, omit_defaults=True):
    """One request, or one answer (choice) of a request that asks for several.

    `position` is the first position that is not known to be durable; `deadline` 0 means none. `moving`: somebody else
    prepares to go on with it; `heir`: the worker that does so when the source lets go, as attempt `heir_attempt`;
    `tried`: the highest number that an attempt, or one that never began, has had; `died`: what became of attempts that
    ended without it, where that is to be told.
    """

    model: str
    client: str
    key: str
    body: str
    accepted: int
    accepted_at: int
    deadline: int = 0
    priority: int = 0
    status: Literal["queued", "running", "ended"] = "queued"
    attempt: int = 1
    worker: str = ""
    position: int = 0
    deaths: int = 0
    rejections: int = 0
    stopping: str = ""
    replies: list[ReplyTo] = []
    spans: list[Span] = []
    small: Generation | None = None
    prompt_tokens: int = 0
    outcome: str = ""
    end: str = ""
    code: str = ""
    reason: str = ""
    retry_ms: int = 0
    ended_at: int = 0
    choice: Choice | None = None
    moving: bool = False
    heir: str = ""
    heir_attempt: int = 0
    tried: int = 0
    died: list[Death] = []


class Family(msgspec.Struct):
    """The answers of one request, by their ids; `running` of them have not ended. `replies`: who waits for all ends."""

    members: list[str]
    running: int
    replies: list[ReplyTo] = []


class RequestsState(msgspec.Struct):
    """`requests` by id, `ended` by id in order of ending, `families` by the id that clients name."""

    requests: dict[str, Request] = {}
    ended: dict[str, int] = {}
    families: dict[str, Family] = {}
    retention_timer: bool = False
    configuration: RequestsConfigured = RequestsConfigured()

    def members(self, name: str) -> list[str]:
        """The requests inside the cell that a client's request stands for."""
        family = self.families.get(name)
        return family.members if family is not None else [name]

    def known(self, name: str) -> Request | None:
        """The request that a client names. Answers of one request have no name of their own outside, but the first."""
        request = self.requests.get(name)
        return None if request is None or (request.choice is not None and request.choice.index) else request

    def over(self, name: str) -> bool:
        """Whether a known request has ended, with all its answers."""
        family = self.families.get(name)
        return family.running == 0 if family is not None else self.requests[name].status == "ended"


def as_ended(name: str, request: Request) -> RequestEnded:
    """How a request ended, with all that it is to be read from, for no reader yet."""
    return RequestEnded(
        request=name,
        model=request.model,
        outcome=request.outcome,  # type: ignore[arg-type]
        positions=request.position,
        end=request.end,  # type: ignore[arg-type]
        code=request.code,
        reason=request.reason,
        retry_ms=request.retry_ms,
        spans=tuple(request.spans),
        prompt_tokens=request.prompt_tokens,
        attempts=request.attempt,
        elapsed_ns=max(0, request.ended_at - request.accepted_at),
        choice=request.choice,
    )
