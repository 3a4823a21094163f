"""Everything that can happen to a move, at each of its stages, on real shells in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from staged import LENGTH, STAGES, Staged, options, plan, staged

from actors.worker_runtime import AttachRefused
from bus.contract import Record
from chaos.machines import SimulatedRuntime

FAULTS: dict[str, Callable[[Staged, Record], None]] = {
    "source dies": lambda world, record: world.kill(world.source, record, before_answer=True),
    "source dies just after": lambda world, record: world.kill(world.source, record, before_answer=False),
    "destination dies": lambda world, record: world.kill(world.heir or world.source, record, before_answer=True),
    "destination dies just after": lambda world, record: world.kill(
        world.heir or world.source, record, before_answer=False
    ),
    "control dies": lambda world, record: world.kill("control-0", record, before_answer=True),
    "the other control dies": lambda world, record: world.kill("control-1", record, before_answer=False),
    "who published dies": lambda world, record: world.kill("publisher", record, before_answer=True),
    "source is cut off": lambda world, record: world.cut(world.source, 1.0),
    "destination is cut off": lambda world, record: world.cut(world.heir or world.source, 1.0),
    "source is slow": lambda world, record: world.slow(world.source, 0.4),
    "destination is slow": lambda world, record: world.slow(world.heir or world.source, 0.4),
    "the server is away": lambda world, record: world.server.outage(0.7),
    "asked for twice": lambda world, record: world.migrate(),
    "wanted back": lambda world, record: world.migrate(to=world.source),
    "everybody dies": lambda world, record: (
        [world.kill(process.name, record, before_answer=False) for process in world.processes] and None
    ),
}


def check(world: Staged, text: str) -> None:
    (application,) = world.applications
    assert application.end == "length" and application.read == [LENGTH], text
    assert world.fired, f"{text}: the stage was not reached, only {list(world.stages)}"


def test_undisturbed_it_moves_and_goes_through_all_stages() -> None:
    verdict, world = staged()
    assert verdict.passed, verdict.violations
    assert list(world.stages) == sorted(world.stages, key=lambda stage: world.stages[stage])
    assert [stage for stage in STAGES if stage not in world.stages] == []
    assert [ended["moved"] for ended in world.ended_moves] == [True]
    assert world.applications[0].read == [LENGTH]


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_fails_at_a_stage_the_answer_is_the_undisturbed_one(stage: str) -> None:
    for name, act in FAULTS.items():
        verdict, world = staged(stage, act)
        text = f"{name} at {stage}"
        assert verdict.passed, f"{text}: {list(map(str, verdict.violations))}\n{verdict.events}"
        check(world, text)


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_at_a_stage_it_ends_within_a_step(stage: str) -> None:
    verdict, world = staged(stage, lambda world, record: world.cancel())
    assert verdict.passed, f"{stage}: {list(map(str, verdict.violations))}\n{verdict.events}"
    (application,) = world.applications
    assert application.end == "cancelled" and world.fired
    at = world.stages[stage][1]
    # The step that runs as the cancellation comes, and the one that the destination may be at.
    assert application.read[0] <= at + 3, f"{stage}: at {at}, ended at {application.read}"


@pytest.mark.parametrize("stage", STAGES)
def test_it_finishes_meanwhile(stage: str) -> None:
    """The last token comes at the stage or a step before or after."""
    _, calm = staged()
    at = calm.stages[stage][1]
    for length in (at, at + 1, at + 2):
        short = plan(0, "model-0", max_tokens=length, fields={"min_tokens": length})
        verdict, world = staged(plans=[short])
        assert verdict.passed, f"{stage}, {length}: {list(map(str, verdict.violations))}"
        assert world.applications[0].read == [length] and world.applications[0].end == "length"


@pytest.mark.parametrize("stage", STAGES)
def test_its_deadline_passes_meanwhile(stage: str) -> None:
    _, calm = staged()
    late = int((calm.stages[stage][0] - 0.5) * 1000)
    for deadline in (late - 20, late, late + 10):
        verdict, world = staged(plans=[plan(0, "model-0", deadline_ms=deadline)])
        assert verdict.passed, f"{stage}, {deadline} ms: {list(map(str, verdict.violations))}"
        (application,) = world.applications
        assert application.end == "deadline"
        ordered = world.stages["sequence.cancel"][1]
        assert ordered <= application.read[0] <= ordered + 3, f"{stage}: ordered at {ordered}, {application.read}"


def test_from_a_to_b_and_from_b_to_a_at_once() -> None:
    """Two answers change places, in several rounds of wishes that come while they are on their way."""
    plans = [plan(0, "model-0"), plan(1, "model-0")]

    def act(world: Staged, record: Record) -> None:
        for _ in range(3):
            world.migrate(request=world.plans[0].request)
            world.migrate(request=world.plans[1].request)

    for stage in ("move.described", "sequence.caught-up", "sequence.resume"):
        verdict, world = staged(stage, act, plans=plans, max_slots=1)
        assert verdict.passed, f"{stage}: {list(map(str, verdict.violations))}\n{verdict.events}"
        assert [one.read for one in world.applications] == [[LENGTH], [LENGTH]]
    verdict, world = staged("sequence.caught-up", act, plans=plans)
    assert verdict.passed and verdict.moves >= 2, verdict.violations


def test_nowhere_to_go_is_said_and_nothing_changes() -> None:
    verdict, world = staged(servers=1)
    assert verdict.passed, verdict.violations
    assert [(ended.get("moved", False), bool(ended["reason"])) for ended in world.ended_moves] == [(False, True)]
    assert world.applications[0].read == [LENGTH]


@pytest.mark.parametrize("stage", ["sequence.follow", "sequence.caught-up", "sequence.released"])
def test_a_reader_that_left_comes_back_for_the_rest(stage: str) -> None:
    _, calm = staged()
    leaving = replace(plan(0, "model-0"), leave_at=calm.stages[stage][1], away=0.6)
    verdict, world = staged(plans=[leaving])
    assert verdict.passed, verdict.violations
    assert world.applications[0].read == [LENGTH]


def test_a_destination_that_lacks_memory_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It attaches nothing: the answer stays where it is, and nobody tries for ever."""
    attach, attached = SimulatedRuntime.attach, []

    async def refuse(self: SimulatedRuntime, model: str, *arguments: Any, **named: Any) -> Any:
        attached.append(self)
        if self is not attached[0]:
            raise AttachRefused("the device has no memory left", retry=True)
        return await attach(self, model, *arguments, **named)

    monkeypatch.setattr(SimulatedRuntime, "attach", refuse)
    verdict, world = staged()
    assert verdict.passed, verdict.violations
    assert world.applications[0].read == [LENGTH]
    assert [ended.get("moved", False) for ended in world.ended_moves] == [False]
    assert 1 < len(attached) < 12


def test_a_source_goes_on_while_a_long_prompt_is_computed_elsewhere() -> None:
    """Meanwhile it gives so many tokens that one round is not enough."""
    card = msgspec.structs.replace(options().models[0], context=4096)
    long = replace(plan(0, "model-0"), prompt="a long prompt " * 150)
    verdict, world = staged(plans=[long], models=(card,))
    assert verdict.passed, verdict.violations
    assert [(ended["moved"], ended["rounds"] >= 2) for ended in world.ended_moves] == [(True, True)]
    assert world.stages["sequence.caught-up"][1] - world.stages["sequence.follow"][1] > 16
    assert world.applications[0].read == [LENGTH]
