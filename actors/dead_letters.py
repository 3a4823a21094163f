"""What is remembered of a request under which workers die, and said when it is given up."""

from __future__ import annotations

from actors.request_state import Request
from bus.messages import Death, RequestQuarantined, RequestsConfigured, Span, To

DEATHS_TOLD = 32
"""The last ones are told; before them there may be others that began nothing."""


def note_death(request: Request, configuration: RequestsConfigured, span: Span | None, reason: str) -> None:
    """The running attempt has ended without its request."""
    if configuration.dead_letters:
        epoch = span.epoch if span is not None else 0
        request.died.append(Death(request.worker, request.attempt, request.position, epoch, reason))
        del request.died[:-DEATHS_TOLD]


def dead_letter(name: str, request: Request, configuration: RequestsConfigured) -> list[To]:
    """For the dead-letter subject, as its request ends as quarantined."""
    if not configuration.dead_letters:
        return []
    letter = RequestQuarantined(
        request=name,
        model=request.model,
        client=request.client,
        key=request.key,
        accepted=request.accepted,
        deaths=tuple(request.died),
        reason=request.reason,
        choice=request.choice,
    )
    return [To("dead", letter)]
