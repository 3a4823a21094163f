"""The cell's own messages: timers, rule versions, skipped steps, accepted differences."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from bus.messages.envelope import Count, Message, Name, Positive, Text


class SetTimer(Message, frozen=True, tag="timer.set"):
    """actor > timer: wake me when `now` has reached `due` (nanoseconds since the epoch). `about` comes back."""

    due: Count
    about: Name


class TimerFired(Message, frozen=True, tag="timer.fired"):
    """fact: the timer which message (fact, index) asked for is due. Its identity is that message."""

    fact: Positive
    index: Count
    due: Count
    about: Name


class RulesActivated(Message, frozen=True, tag="rules.activated"):
    """operator: from this fact on, decisions follow this rule version."""

    version: Positive


class DifferenceAccepted(Message, frozen=True, tag="difference.accepted"):
    """operator: the recorded message (fact, index) stands although the code computes another one.

    The epoch of the driver that obeyed it, if it was an effect, is closed.
    """

    fact: Positive
    index: Count
    driver: Annotated[str, Meta(max_length=200)] = ""
    epoch: Count = 0
    note: Text = ""


class StepSkipped(Message, frozen=True, tag="step.skipped"):
    """cell > record: the fact made an actor fail; nothing of its step counts but this message."""

    fact: Positive
    actor: Name
    reason: Text
