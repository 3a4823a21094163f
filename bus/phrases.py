"""Parts of sentences: numbers, names and places as people say them."""

from __future__ import annotations

from collections.abc import Sequence

from bus.messages.requests import Choice, Generation, ReplyTo, Span


def short(request: str) -> str:
    """A request id as people can read it; `longshore tail --request` takes it as it stands here, without the dots."""
    return request if len(request) <= 10 else request[:8] + "…"


def duration(nanoseconds: int) -> str:
    """
    >>> duration(240_000_000), duration(1_500_000_000), duration(85_000), duration(90_000_000_000)
    ('240 ms', '1.5 s', '85 us', '90 s')
    """
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1e3:.0f} us"
    if nanoseconds < 1_000_000_000:
        return f"{nanoseconds / 1e6:.0f} ms"
    return f"{nanoseconds / 1e9:.1f} s" if nanoseconds < 10_000_000_000 else f"{nanoseconds / 1e9:.0f} s"


def size(count: int) -> str:
    """
    >>> size(900), size(120_000_000), size(3_200_000_000)
    ('900 B', '120 MB', '3.2 GB')
    """
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 999.5:
            break
        value /= 1000
    return f"{value:.1f} {unit}" if unit != "B" and value < 10 else f"{value:.0f} {unit}"


def what_moves(request: str, model: str, place: str) -> str:
    if request:
        return f"request {short(request)}"
    return f"what runs{f' of {model}' if model else ''}{f' on {place}' if place else ''}"


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def names(items: Sequence[str], limit: int = 3) -> str:
    """At most `limit` of them, and how many there are besides."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(items[:limit]) or "nothing") + more


def why(reason: str) -> str:
    return f": {reason}" if reason else ""


def what_is_asked(generation: Generation) -> str:
    if generation.prompt is not None:
        return plural(len(generation.prompt.split()), "word")
    if generation.messages is not None:
        return plural(len(generation.messages), "message")
    if generation.inputs is not None:
        return plural(len(generation.inputs), "input") + " to embed"
    if generation.parts is not None:
        return f"a prompt in {plural(generation.parts.count, 'part')}"
    return plural(len(generation.tokens or ()), "prompt token")


def how_many(count: int) -> str:
    return f"{count} answers of " if count > 1 else ""


def at_priority(priority: int) -> str:
    return f", priority {priority}" if priority else ""


def which_choice(choice: Choice | None) -> str:
    return f", answer {choice.index + 1} of {choice.of} of {short(choice.family)}," if choice is not None else ""


def at_attempt(attempt: int) -> str:
    return f" (attempt {attempt})" if attempt > 1 else ""


def from_position(position: int) -> str:
    return f" from position {position} on" if position else ""


def reader(reply: ReplyTo | None) -> str:
    return "nobody" if reply is None else f"{reply.subject}{from_position(reply.start)}"


def readers(replies: Sequence[ReplyTo]) -> str:
    return reader(replies[0]) if len(replies) == 1 else plural(len(replies), "reader")


def positions(first: int, next_: int) -> str:
    return "no position" if next_ <= first else f"positions {first} to {next_ - 1}"


def durable_span(span: Span | None) -> str:
    return "" if span is None else f", {positions(span.first, span.next)} are durable"


def or_another(retry: bool) -> str:
    return "; another may do better" if retry else ""


def tier_name(tier: str) -> str:
    return {"ssd": "SSD", "dram": "DRAM", "remote": "elsewhere"}.get(tier, tier)


def where_from(source: str = "", words: str = " from ") -> str:
    return f"{words}{source}" if source else ""


def disk(ssd_bytes: int) -> str:
    return f", {size(ssd_bytes)} of SSD" if ssd_bytes else ""
