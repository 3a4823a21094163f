"""Watch: turns silence, holes and broken hashes of drivers into `driver.lost`. Nothing else decides on time-outs.

Silence counts from the driver's `started` in the ledger, and anew after a stall or a reconnect of this process:
whoever did not listen cannot say that somebody was silent.
"""

from __future__ import annotations

import asyncio

import msgspec

from bus.contract import Bus, BusError
from bus.messages import DriverLost, FactEnvelope, encode, kind_of
from bus.ordering import FactOrder
from bus.subjects import Subjects

SILENCE_SECONDS = 1.0
HOLE_SECONDS = 1.0
LOOK_SECONDS = 0.1
STALL_SECONDS = 0.5


class Heartbeat(msgspec.Struct, frozen=True):
    driver: str
    epoch: int
    boot: str = ""


_heartbeat = msgspec.json.Decoder(Heartbeat)


class Watch:
    """Watches the open epochs of `order`, which the replica of this process keeps up to date."""

    def __init__(self, bus: Bus, subjects: Subjects, me: str, *, silence: float = SILENCE_SECONDS) -> None:
        self._bus = bus
        self._subjects = subjects
        self._me = me
        self._silence = silence
        self._heard: dict[str, tuple[int, float]] = {}
        self._holes: dict[str, tuple[int, int, float]] = {}
        self._stated: dict[tuple[str, int], float] = {}
        self._connections = 0
        self._looked = 0.0

    async def listen(self) -> None:
        """Take heartbeats for ever: those of epochs that `look` has seen open. Others do not count as life."""
        subscription = await self._bus.subscribe(self._subjects.heartbeats())
        loop = asyncio.get_running_loop()
        try:
            while True:
                delivery = await subscription.next()
                try:
                    beat = _heartbeat.decode(delivery.payload)
                except (msgspec.DecodeError, ValueError, RecursionError):
                    continue
                if self._heard.get(beat.driver, (0, 0.0))[0] == beat.epoch:
                    self._heard[beat.driver] = (beat.epoch, loop.time())
        finally:
            await subscription.close()

    async def look(self, order: FactOrder, *, live: bool) -> None:
        """Once: state what is lost by now. Call it every `LOOK_SECONDS`."""
        now = asyncio.get_running_loop().time()
        stalled = now - self._looked > STALL_SECONDS
        reconnected = self._bus.connections != self._connections or not self._bus.connected
        self._looked, self._connections = now, self._bus.connections
        if stalled or reconnected or not live:
            self._heard = {driver: (epoch.epoch, now) for driver, epoch in order.state.drivers.items()}
            self._holes.clear()
            return
        heard = {}
        for driver, epoch in order.state.drivers.items():
            known, since = self._heard.get(driver, (0, now))
            heard[driver] = (epoch.epoch, since if known == epoch.epoch else now)
        self._heard = heard
        self._stated = {
            (driver, epoch): at
            for (driver, epoch), at in self._stated.items()
            if heard.get(driver, (0, now))[0] == epoch
        }
        for driver, (number, since) in list(heard.items()):
            if now - since > self._silence:
                await self._lost(driver, number, f"no heartbeat for {self._silence:g} s", now)
        troubles = order.troubles()
        holes = {}
        for trouble in troubles:
            epoch_before, hole, since = self._holes.get(trouble.driver, (0, 0, now))
            if (epoch_before, hole) != (trouble.epoch, trouble.hole):
                since = now
            holes[trouble.driver] = (trouble.epoch, trouble.hole, since)
            if not trouble.hole or now - since > HOLE_SECONDS:
                await self._lost(trouble.driver, trouble.epoch, trouble.reason, now)
        self._holes = holes

    async def _lost(self, driver: str, epoch: int, reason: str, now: float) -> None:
        if now - self._stated.get((driver, epoch), -10.0) < SILENCE_SECONDS:
            return
        self._stated[(driver, epoch)] = now
        lost = DriverLost(driver, epoch, reason)
        payload = encode(FactEnvelope("watch", msgspec.Raw(encode(lost))))
        try:
            await self._bus.ledger.append(
                self._subjects.fact(driver, kind_of(lost)),
                payload,
                message_id=f"fact.watch.{driver}.{epoch}",
                publisher=self._me,
            )
        except BusError:
            self._stated.pop((driver, epoch), None)
