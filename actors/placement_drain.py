"""Servers that are taken out of service: nothing new starts there, and what runs there is moved away.

Everything is moved at once, in the order of what a move saves, for slots elsewhere may be few and time may be short:
first what is urgent (a higher priority, then the nearer deadline), then what has the most context, which all would have
to be computed again after a death. How much that is, the workers' deciding halves are asked; under rules before 3 the
order is that of the longest running. Who finds no slot waits for one. Once a second what stays without a move is asked
for again, until nothing is left or the time is over; then the server's process may end, and recovery does the rest. A
server that starts anew is in service again.
"""

from __future__ import annotations

from actors.learning import LARGEST, SECOND
from actors.placement_moves import PlacementMoves
from actors.placement_state import Drain
from bus.messages import (
    ContextsTold,
    ContextsWanted,
    DrainRequested,
    MoveWanted,
    ServerDrained,
    SetTimer,
    TimerFired,
    To,
)

DRAIN = "drain/"
WHY = "its server is being drained"


class PlacementDrain(PlacementMoves):
    """Drains servers."""

    def on_DrainRequested(self, message: DrainRequested, now: int) -> list[To]:
        name = message.server
        if name not in self.state.servers:
            return [self._told(name, reason=f"no server {name} is known here")]
        if message.undo:
            return [*self._in_service(name, "it was taken back"), *self._pump(now)]
        known = name in self.state.draining and not self.state.draining[name].told
        until = min(LARGEST, now + message.deadline_ms * 1_000_000)
        self.state.draining[name] = Drain(until, message.leave)
        self._index_server(name)
        said = [] if known else self._wake(name, now)
        return [*said, *self._move_away(name), *self._see_drained(now), *self._pump(now)]

    def on_TimerFired(self, message: TimerFired, now: int) -> list[To]:
        name = message.about.removeprefix(DRAIN)
        drain = self.state.draining.get(name)
        if drain is None:
            return []
        said = self._see_drained(now)
        return said if drain.told else [*said, *self._move_away(name), *self._wake(name, now)]

    def _in_service(self, name: str, reason: str) -> list[To]:
        """It takes sequences again."""
        drain = self.state.draining.pop(name, None)
        if drain is None:
            return []
        self._index_server(name)
        said = self._deny_waiting(name, reason) if self.rules >= 3 else []
        return said if drain.told else [*said, self._told(name, left=len(self._active(name)), reason=reason)]

    def _see_drained(self, now: int) -> list[To]:
        """Whether a server has nothing left, or no time."""
        said = []
        for name, drain in self.state.draining.items():
            left = 0 if drain.told else len(self._active(name))
            if not drain.told and (not left or now >= drain.until):
                drain.told = True
                said.append(self._told(name, left=left, leave=drain.leave))
        return said

    def _deny_waiting(self, name: str, reason: str) -> list[To]:
        """Nobody has to leave that server any more."""
        return [self._deny(request, wish, f"{name}: {reason}") for request, wish in list(self.state.wishes.items())
                if wish.source in self.state.workers and self.state.workers[wish.source].server == name]  # fmt: skip

    def _move_away(self, name: str) -> list[To]:
        staying = self._staying(name)
        if self.rules < 3:
            return [To("migration", MoveWanted(request=request, why=WHY)) for request in staying]
        drain = self.state.draining[name]
        drain.asked = dict.fromkeys((self.state.placed[request].worker for request in staying), True)
        drain.tokens = {}
        return [To(worker, ContextsWanted()) for worker in drain.asked]

    def on_ContextsTold(self, message: ContextsTold, now: int) -> list[To]:
        """Once all workers of a server that is drained have answered, what runs there moves."""
        worker = self.state.workers.get(message.worker)
        drain = self.state.draining.get(worker.server) if worker is not None else None
        if worker is None or drain is None or drain.asked.pop(message.worker, None) is None:
            return []
        drain.tokens |= {one.request: one.tokens for one in message.sequences}
        if drain.asked:
            return []
        tokens, drain.tokens = drain.tokens, {}
        said = []
        staying = [request for request in self._staying(worker.server) if request in tokens]
        for request in sorted(staying, key=lambda one: (*self._urgency(one), -tokens[one])):
            one = self.state.placed[request]
            why = f"{WHY}; a move saves {tokens[request]} tokens of context"
            why += f", priority {one.priority}" if one.priority else ""
            why += f", due in {max(0, one.deadline - now) // SECOND} s" if one.deadline else ""
            said.append(To("migration", MoveWanted(request=request, why=why)))
        return said

    def _staying(self, name: str) -> list[str]:
        """Who runs on this server and does not move yet, the longest first."""
        moving = self.state.wishes | self.state.kept
        return [request for request in self._active(name) if request not in moving]

    def _urgency(self, request: str) -> tuple[int, int]:
        """Less is more urgent."""
        one = self.state.placed[request]
        return -one.priority, one.deadline or LARGEST

    def _active(self, name: str) -> list[str]:
        """Who runs on this server or is about to, the longest first."""
        placed = [(one.since, request) for slots in (self.state.placed, self.state.kept)
                  for request, one in slots.items() if self.state.workers[one.worker].server == name]  # fmt: skip
        return [request for _, request in sorted(placed)]

    def _index_server(self, name: str) -> None:
        for worker_name, worker in self.state.workers.items():
            for model, instance in worker.instances.items() if worker.server == name else ():
                if model in self.state.models:
                    self._index(worker_name, self.state.models[model], instance)

    @staticmethod
    def _wake(name: str, now: int) -> list[To]:
        return [To("timer", SetTimer(min(LARGEST, now + SECOND), DRAIN + name))]

    @staticmethod
    def _told(name: str, *, left: int = 0, leave: bool = False, reason: str = "") -> To:
        return To(f"node/{name}", ServerDrained(name, left, leave, reason))
