"""Each safeguard is taken out, one at a time: the simulated world notices, and its verdict names the broken promise.

The worlds are those of the seeds, with the kind of fault against which the safeguard stands made frequent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mutations
import pytest

from chaos.faults import Odds
from chaos.options import draw
from chaos.promises import Promise
from chaos.run import Verdict, run_world

SEEDS = range(16)
FROZEN = {"disturbances": ("freeze",), "disturb_every": 0.2, "requests": 60, "odds": Odds()}
DYING = {"disturbances": ("crash",), "disturb_every": 0.5, "odds": Odds()}
# Of one answer each: a driver and a cell that disagree on what runs ask each other for ever, which takes its time.
LOSSY = {"disturbances": (), "odds": Odds(append_lost=0.05), "several": 0.0}
UPGRADE = {"upgrade": True, "controls": 2, "servers": 2, "workers": 2, "memory_bytes": 1 << 20, "dram_bytes": 1 << 20,
           "requests": 60, "crash_at_record": 0.0, "odds": Odds()}  # fmt: skip
TORN = {"generations": True, "snapshot_trouble": 0.25, "snapshot_facts": 4, "fault_seconds": 20.0, "requests": 60,
        "disturbances": (), "odds": Odds()}  # fmt: skip
CALM: dict[str, Any] = {"disturbances": (), "odds": Odds()}


@pytest.mark.parametrize(
    ("mutation", "promise", "faults"),
    [
        (mutations.seal_does_nothing, Promise.NEVER_CHANGES, DYING),
        (mutations.facts_are_not_held_back, Promise.NO_HOLES, LOSSY),
        (mutations.epochs_are_ignored, Promise.QUIET, FROZEN),
        (mutations.nobody_rescues, Promise.ENDED_ONCE, CALM),
        (mutations.writers_are_not_fenced, Promise.SEALED, FROZEN),
        (mutations.pages_are_not_awaited, Promise.DURABLE_FIRST, CALM),
        (mutations.torn_snapshots_count, Promise.CAN_START, TORN),
        (mutations.old_programs_go_on, Promise.REPLICAS_AGREE, UPGRADE),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_missing_safeguard_is_noticed(mutation: Any, promise: Promise, faults: dict[str, Any]) -> None:
    verdicts: list[Verdict] = []
    for seed in SEEDS:
        options = replace(draw(seed), **faults)
        with mutation():
            mutated = run_world(options)
        verdicts.append(mutated)
        if promise in {violation.promise for violation in mutated.violations}:
            whole = run_world(options)
            assert whole.passed, [str(violation) for violation in whole.violations]
            return
    broken = [[str(violation) for violation in verdict.violations] for verdict in verdicts]
    pytest.fail(f"{mutation.__name__} did not break {promise.name} in any of {len(verdicts)} worlds: {broken}")
