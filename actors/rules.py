"""Rule versions: which there are, what each changed, and when an old one may go.

A change of behaviour is a version. `rules.activated` is a fact: what stands before it is decided by the old version,
what stands behind it by the new one, on every replica and in every replay. So both are in the code, beside each other:

    version 2: of places that are ready equally soon, the device with the least to do gets the instance
        (`order_1` and `order_2` in `actors.placement_start`)
    version 3: tiers are weighed as one: what is evicted is what costs least to bring back and is wanted latest
        (`actors.store_room`), models may come from other servers and remote sources, and running models move away for
        those that start sooner in their place; a drain moves first what is urgent and what saves most, and who finds
        no slot then waits for one; a worker that is told to end is no death of its requests; no two attempts of a
        request have the same number, moves that came to nothing included; `self.rules >= 3`
    version 4: what starts for a sequence that was to move there is given up when it is not to move any more, as it is
        for a request that waits; a model that lies on no server is refused where every SSD is taken by what lies
        nowhere else; `self.rules >= 4`
    version 5: a model that is removed is dropped by every server, so that what came of it to one that was not to keep
        it goes, too; an operator may want a model in DRAM before requests come; what is larger than the budget of DRAM
        and lies elsewhere is fetched to the SSD, and streamed from there; `self.rules >= 5`

Version N may be taken out, with what is its own in those places, once nobody has to decide by it any more: every cell's
switch to a later one lies behind its oldest snapshot, and no recording from before that is to be verified by this
program. What then still meets it is told so by `UnknownRules`.
"""

from __future__ import annotations

FIRST_RULES = 1
"""In force from the beginning of a ledger on, until a fact says otherwise."""

KNOWN_RULES = (1, 2, 3, 4, 5)
"""What this program can follow, in order; the last is the best it knows."""

WARM_RULES = 5
"""From this version on an operator may want a model in DRAM."""

SENTENCES = {
    1: "of places that are ready equally soon, the first in order of arrival gets the instance",
    2: "of places that are ready equally soon, the device with the least to do gets the instance",
    3: "what is evicted is what costs least to bring back and is wanted latest, models may come from other servers and "
    "remote sources, and running models move away for those that start sooner in their place; a drain moves first what "
    "is urgent and what saves most, and a worker that is told to end is no death of its requests",
    4: "what starts for answers that were to move there is given up when they end, or stay, before that; "
    "a model for which no SSD may ever have room is refused",
    5: "what came of a model before its fetch broke off goes with the model, on every server; an operator may "
    "want a model in DRAM before requests come; what is larger than DRAM may come from elsewhere to the SSD",
}
"""Per version, for people."""


class UnknownRules(Exception):
    """The ledger follows a rule version that this program does not know: it must not decide, nor publish."""

    def __init__(self, version: int, sequence: int, known: tuple[int, ...]) -> None:
        self.version, self.sequence, self.known = version, sequence, known
        super().__init__(
            f"rule version {version} is in force at ledger sequence {sequence}; "
            f"this program knows {', '.join(map(str, known))}: run a newer one"
        )
