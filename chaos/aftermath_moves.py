"""What is held against a world's moves and drains, fact by fact, as its ledger is read once more after the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from actors.cell import Cell
from actors.gpu_state import GpuState
from actors.placement_state import PlacementState
from bus.contract import Record
from bus.messages import MoveDescribed, MoveEnded, ServerDrained, decode_said, decode_said_body
from bus.subjects import SaidSubject, Subjects
from chaos.promises import Promise

_TAKES = ("sequence.start", "sequence.follow")
"""Effects with which a worker gets something that it did not have."""

Told = Callable[[Promise, str], None]


class MovesJudged:
    """`fact` is told of every fact that the cell has taken, in order; `over` at the end."""

    def __init__(self, records: Iterable[Record], subjects: Subjects, violation: Told) -> None:
        self._violation = violation
        self._given: dict[int, dict[tuple[str, str], bool]] = {}
        self._drained: dict[int, ServerDrained] = {}
        self._open: dict[tuple[str, int], int] = {}
        self._draining: dict[str, dict[str, bool]] = {}
        seen: dict[tuple[int, int], bool] = {}
        for record in records:
            subject = subjects.parse(record.subject)
            if isinstance(subject, SaidSubject):
                self._said(record, subject, seen)

    def _said(self, record: Record, subject: SaidSubject, seen: dict[tuple[int, int], bool]) -> None:
        kind = subject.kind
        if kind not in (*_TAKES, "server.drained", "move.described", "move.ended"):
            return
        said = decode_said(record.payload)
        if seen.setdefault((said.fact, said.index), False):
            return  # said once more by another replica
        seen[said.fact, said.index] = True
        body = decode_said_body(said.body)
        if kind in _TAKES:
            worker = subject.receiver.removeprefix("driver/")
            self._given.setdefault(said.fact, {})[worker, str(getattr(body, "request", ""))] = True
        elif isinstance(body, ServerDrained):
            if not body.reason:
                self._drained[said.fact] = body
        elif isinstance(body, MoveDescribed | MoveEnded):
            # A request that was named and does not run is told to have ended its move without one.
            key = (body.request, body.attempt)
            self._open[key] = self._open.get(key, 0) + (1 if isinstance(body, MoveDescribed) else -1)

    def fact(self, sequence: int, cell: Cell) -> None:
        """The cell has taken this fact."""
        placement = cell.actors.get("placement")
        if placement is None:
            return
        state = cast(PlacementState, placement.state)
        for (worker, request), _ in self._given.get(sequence, {}).items():
            server = worker.split("/")[1]
            before = self._draining.get(server)
            if before is not None and server in state.draining and request not in before:
                self._violation(
                    Promise.DRAINED, f"ledger {sequence}: {worker} gets {request} while {server} is drained"
                )
        if (told := self._drained.get(sequence)) is not None:
            held = _held(cell, told.server)
            if len(held) > told.left:
                what = f"ledger {sequence}: {told.server} is said to hold {told.left} and holds {held}"
                self._violation(Promise.DRAINED, what)
        if state.draining or self._draining:
            self._draining = {server: self._draining.get(server) or _placed(state, server) for server in state.draining}

    def over(self) -> None:
        for (request, attempt), count in self._open.items():
            if count > 0:
                self._violation(Promise.MOVES_END, f"a move of {request}, attempt {attempt}, never ended")


def _placed(state: PlacementState, server: str) -> dict[str, bool]:
    """Who had a place on this server, or one kept for it, when its draining began."""
    return {
        request: True
        for slots in (state.placed, state.kept)
        for request, one in slots.items()
        if one.worker.split("/")[1] == server
    }


def _held(cell: Cell, server: str) -> list[str]:
    """What the workers of a server run, or follow and are not told to forget."""
    found: list[str] = []
    for name, actor in cell.actors.items():
        if isinstance(actor.state, GpuState) and name.split("/")[1] == server:
            found += actor.state.sequences
            found += [key for key, one in actor.state.standbys.items() if not one.dropping]
    return found
