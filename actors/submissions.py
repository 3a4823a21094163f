"""Requests that were published to `submit.<model>`: their acknowledgement by the intake stream is their acceptance.

A durable consumer hands each to one control, which appends the fact and then acknowledges; what is delivered again is
a repeat under the same key. A submission that can never become a request is published to
`longshore.<cell>.refused.<model>` with the reason, and is not delivered again.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import structlog

from actors.intake import Intake
from bus.api import Refusal, encode_reply, parse_key
from bus.contract import BusError
from bus.embeddings import parse_submitted
from bus.jetstream import JetStreamBus
from bus.subjects import Subjects

DURABLE = "intake"
FETCH = 64
ACK_SECONDS = 1
"""So long after it was handed to a control that does not acknowledge it, a submission is handed to another one."""
RETRY_SECONDS = 1.0

log = structlog.get_logger("longshore.submissions")


async def take_submissions(bus: JetStreamBus, subjects: Subjects, intake: Intake) -> None:
    """For ever. Waits and tries again whatever the server says."""
    while True:
        try:
            await _take(bus, subjects, intake)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # nats-py raises its own family here; none of them may end a control.
            log.warning("submissions wait", reason=f"{type(error).__name__}: {error}")
            await asyncio.sleep(RETRY_SECONDS)


async def _take(bus: JetStreamBus, subjects: Subjects, intake: Intake) -> None:
    from nats.errors import TimeoutError as FetchTimeout
    from nats.js.api import AckPolicy, ConsumerConfig

    stream = subjects.intake_stream
    config = ConsumerConfig(
        durable_name=DURABLE, ack_policy=AckPolicy.EXPLICIT, ack_wait=ACK_SECONDS, max_ack_pending=1000
    )
    jetstream = bus.raw.jetstream()
    await jetstream.add_consumer(stream, config)
    pull = await jetstream.pull_subscribe_bind(DURABLE, stream)
    try:
        while True:
            try:
                messages = await pull.fetch(FETCH, timeout=5)
            except (FetchTimeout, TimeoutError):
                continue
            await asyncio.gather(*(_submit(message, bus, intake, subjects) for message in messages))
    finally:
        with contextlib.suppress(Exception):
            await pull.unsubscribe()


async def _submit(message: Any, bus: JetStreamBus, intake: Intake, subjects: Subjects) -> None:
    key = f"submit:{message.metadata.sequence.stream}"
    headers = dict(message.headers or {})
    try:
        parsed = intake.parse(message.subject, message.data, headers, default_key=key, parser=parse_submitted)
        status = await intake.accept(parsed, "")
        if status.status == "accepted":
            await message.ack()
        else:
            await message.nak(delay=RETRY_SECONDS)
    except Refusal as refusal:
        if refusal.code in (429, 503):
            await message.nak(delay=max(RETRY_SECONDS, refusal.retry_ms / 1000))
            return
        key = parse_key(message.data, headers.get("Content-Type")) or key
        log.warning("submission refused", subject=message.subject, key=key, reason=refusal.message)
        token = subjects.last_token(message.subject)
        body = encode_reply({"key": key, "stream_sequence": message.metadata.sequence.stream, **_error(refusal)})
        with contextlib.suppress(BusError):  # a subject that a server took need not be one that we may write to
            await bus.publish(subjects.refused(token), body, headers=refusal.headers())
        await message.term()
    except BusError:
        await message.nak(delay=RETRY_SECONDS)


def _error(refusal: Refusal) -> dict[str, Any]:
    return {"error": {"code": refusal.name, "message": refusal.message}}
