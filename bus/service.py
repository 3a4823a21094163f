"""Answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, so that `nats micro ls` and its like see a cell's controls.

The subjects and bodies are those of the NATS services API (io.nats.micro.v1). The endpoints themselves are served
elsewhere, because the library's handle one message at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from bus.contract import Bus, BusError
from bus.subjects import Subjects, may_reply

NAME = "longshore"
VERSION = "0.1.0"
VERBS = ("PING", "INFO", "STATS")
ASK_SECONDS = 0.5


class Service:
    """One instance of the service.

    `counts` gives the number of requests and errors so far, `metadata` what this instance says of itself.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        me: str,
        verbs: list[str],
        counts: Callable[[], dict[str, int]],
        metadata: Callable[[], dict[str, str]] = dict,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._me = me
        self._verbs = verbs
        self._counts = counts
        self._metadata = metadata
        self._started = datetime.fromtimestamp(bus.wall() / 1e9, UTC).isoformat().replace("+00:00", "Z")

    def subjects_of(self, verb: str) -> list[str]:
        """What one instance listens to: everybody, everybody of this name, this one alone."""
        return [f"$SRV.{verb}", f"$SRV.{verb}.{NAME}", f"$SRV.{verb}.{NAME}.{self._me}"]

    async def answer(self, verb: str, subject: str) -> None:
        """Answer one of the subjects for ever."""
        subscription = await self._bus.subscribe(subject)
        try:
            while True:
                delivery = await subscription.next()
                if may_reply(delivery.reply):
                    try:
                        await self._bus.publish(delivery.reply, msgspec.json.encode(self.body(verb)))
                    except BusError:
                        continue
        finally:
            await subscription.close()

    def body(self, verb: str) -> dict[str, Any]:
        identity: dict[str, Any] = {
            "type": f"io.nats.micro.v1.{verb.lower()}_response",
            "name": NAME,
            "id": self._me,
            "version": VERSION,
            "metadata": {"cell": self._subjects.cell, **self._metadata()},
        }
        if verb == "INFO":
            described = "Requests in, tokens out; see docs/subjects.md."
            endpoints = [
                {"name": v, "subject": self._subjects.every(v), "queue_group": "intake", "metadata": {}}
                for v in self._verbs
            ]
            return identity | {"description": described, "endpoints": endpoints}
        if verb == "STATS":
            counts = self._counts()
            endpoint = {
                "name": "intake",
                "subject": self._subjects.every("infer"),
                "queue_group": "intake",
                "num_requests": counts.get("requests", 0),
                "num_errors": counts.get("errors", 0),
                "last_error": "",
                "processing_time": 0,
                "average_processing_time": 0,
            }
            return identity | {"started": self._started, "endpoints": [endpoint]}
        return identity


class Instance(msgspec.Struct, frozen=True):
    """One control as it describes itself. `metadata` has its cell, and what `actors.control_process` tells."""

    id: str
    name: str
    metadata: dict[str, str] = {}


_instance = msgspec.json.Decoder(Instance)
INSTANCES_LIMIT = 1000


async def instances(bus: Bus, cell: str, *, seconds: float = ASK_SECONDS) -> list[Instance]:
    """Every control of a cell that answers within so many seconds, by id. What is no such answer is left out."""
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox)
    found: dict[str, Instance] = {}
    try:
        await bus.publish(f"$SRV.PING.{NAME}", b"", reply=inbox)
        async with asyncio.timeout(seconds):
            while len(found) < INSTANCES_LIMIT:
                delivery = await subscription.next()
                with contextlib.suppress(msgspec.DecodeError, ValueError):
                    one = _instance.decode(delivery.payload)
                    if one.name == NAME and one.metadata.get("cell") == cell:
                        found[one.id] = one
    except TimeoutError:
        pass
    finally:
        await subscription.close()
    return [found[key] for key in sorted(found)]
