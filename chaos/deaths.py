"""Deaths during moves, drawn uniformly over the ledger's messages.

What is uniform: every record that the ledger stores while the world is troubled and at least one move is under way is
a death with the same chance, drawn for itself, whatever its kind and whatever the move's phase. So no message of a move
is likelier to be the last one somebody sees than any other, and long phases get deaths in proportion to their messages.
Then, evenly again: which of the moves under way is meant, which of `VICTIMS` dies (of those that this move has), and
whether it dies before or after the record's acknowledgement. One death in `SEVERAL` takes one or two others along.
"""

from __future__ import annotations

from random import Random
from typing import Final, NamedTuple

from chaos.phases import PHASES, Moving, Phases

VICTIMS: Final = ("source", "destination", "control", "server", "bus")
"""The worker that a move leaves, the one that it goes to, a control, all of a server of the two, the NATS server."""
SEVERAL: Final = 8


class Death(NamedTuple):
    """`processes` die, by name; `bus`: the NATS server is away for a while. `victim` is one of `VICTIMS`."""

    kind: str
    victim: str
    processes: tuple[str, ...]
    bus: bool
    before_answer: bool


class Tally:
    """What was hit: `phases` counts the moves in each phase at a death, over all deaths; the others count deaths."""

    def __init__(self) -> None:
        self.phases = dict.fromkeys(PHASES, 0)
        self.victims = dict.fromkeys(VICTIMS, 0)
        self.kinds: dict[str, int] = {}

    def count(self, death: Death, standing: dict[str, int]) -> None:
        for phase, moves in standing.items():
            self.phases[phase] += moves
        self.victims[death.victim] += 1
        self.kinds[death.kind] = self.kinds.get(death.kind, 0) + 1

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {"phases": self.phases, "victims": self.victims, "kinds": dict(sorted(self.kinds.items()))}


class Deaths:
    """`hazard`: the chance of a death at each message; `names`: all processes of the world."""

    def __init__(self, random: Random, hazard: float, names: list[str], phases: Phases) -> None:
        self.tally = Tally()
        self._random, self._hazard, self.names, self._phases = random, hazard, names, phases

    def draw(self, kind: str) -> Death | None:
        """Whether somebody dies at the record of this kind which the ledger has just stored, and who."""
        moving = self._phases.moving
        if not moving or self._random.random() >= self._hazard:
            return None
        random = self._random
        move = random.choice(list(moving.values()))
        victim = random.choice([one for one in VICTIMS if one != "destination" or move.heir])
        processes = self._processes(victim, move)
        if random.randrange(SEVERAL) == 0:
            others = [name for name in self.names if name not in processes]
            processes += tuple(random.sample(others, min(len(others), random.randint(1, 2))))
        return Death(kind, victim, processes, victim == "bus", random.random() < 0.5)

    def _processes(self, victim: str, move: Moving) -> tuple[str, ...]:
        random = self._random
        if victim == "source":
            return (move.source,)
        if victim == "destination":
            return (move.heir,)
        if victim == "control":
            return (random.choice([name for name in self.names if name.startswith("control-")]),)
        if victim == "server":
            return of_server(self.names, random.choice([one for one in (move.source, move.heir) if one]).split("/")[1])
        return ()


def of_server(names: list[str], server: str) -> tuple[str, ...]:
    """The processes of a server: its storage driver and its workers."""
    return tuple(name for name in names if name.split("/")[1:2] == [server])
