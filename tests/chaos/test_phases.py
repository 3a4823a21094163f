"""Phases of moves, as the ledger's records tell them; and deaths drawn over them."""

from __future__ import annotations

from collections import Counter
from random import Random

import msgspec
import pytest

from bus.contract import Record
from bus.messages import FactEnvelope, SaidEnvelope, encode
from bus.subjects import Subjects
from chaos.deaths import VICTIMS, Deaths, Tally, of_server
from chaos.phases import PHASES, Phases

SUBJECTS = Subjects("sim")
NAMES = ["control-0", "store/s0", "gpu/s0/0", "gpu/s0/1", "store/s1", "gpu/s1/0"]


def said(kind: str, **fields: object) -> Record:
    body = msgspec.Raw(msgspec.json.encode({"kind": kind, "request": "r", **fields}))
    subject = SUBJECTS.said("migration", "record", kind)
    return Record(1, 0, subject, encode(SaidEnvelope(1, 0, 1, body)), "")


def fact(kind: str, **fields: object) -> Record:
    body = msgspec.Raw(msgspec.json.encode({"kind": kind, "request": "r", **fields}))
    return Record(1, 0, SUBJECTS.fact("gpu/s1/0", kind), encode(FactEnvelope("gpu/s1/0", body)), "")


def described(source: str = "gpu/s0/0") -> Record:
    return said("move.described", worker=source)


COURSE = (
    (described(), "placing"),
    (said("heir.introduced", heir="gpu/s1/0"), "following"),
    (fact("round.finished", attempt=2), "in rounds"),
    (fact("sequence.caught-up", attempt=2), "caught up"),
    (said("sequence.hand-over", attempt=1), "handing over"),
    (fact("sequence.released", attempt=1), "released"),
    (said("sequence.resume", attempt=2), "going on"),
)


def test_a_move_goes_through_all_phases_and_ends_with_the_first_page_of_its_heir() -> None:
    phases = Phases(SUBJECTS)
    for record, phase in COURSE:
        phases.stored(record)
        assert phases.standing() == {name: int(name == phase) for name in PHASES}
    assert tuple(phase for _, phase in COURSE) == PHASES
    phases.stored(said("move.ended", moved=True))
    phases.page(lambda request: 1)
    assert phases.moving["r"].phase == "going on", "a page of the source ends nothing"
    phases.page(lambda request: 2)
    assert not phases.moving and phases.moves == 1


def test_a_second_description_is_denied_and_ends_nothing() -> None:
    phases = Phases(SUBJECTS)
    for record, _ in COURSE[:2]:
        phases.stored(record)
    phases.stored(described())
    phases.stored(said("move.ended"))
    assert phases.moving["r"].phase == "following" and phases.moves == 1
    phases.stored(said("move.ended"))
    assert not phases.moving


def test_one_that_has_moved_may_be_moved_again_before_it_goes_on() -> None:
    phases = Phases(SUBJECTS)
    for record, _ in COURSE:
        phases.stored(record)
    phases.stored(said("move.ended", moved=True))
    phases.stored(described("gpu/s1/0"))
    assert phases.moves == 2 and phases.moving["r"].phase == "placing" and phases.moving["r"].source == "gpu/s1/0"


def test_a_request_that_ends_moves_no_more() -> None:
    phases = Phases(SUBJECTS)
    phases.stored(described())
    assert phases.stored(said("request.ended")) == "request.ended"
    assert not phases.moving


def test_every_message_during_a_move_is_a_death_with_the_same_chance_and_no_other_is() -> None:
    phases = Phases(SUBJECTS)
    deaths = Deaths(Random(1), 0.1, NAMES, phases)
    assert not any(deaths.draw("a") for _ in range(1000)), "nobody moves"
    for record, _ in COURSE[:2]:
        phases.stored(record)
    kinds: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    before = several = 0
    for number in range(20_000):
        death = deaths.draw("common" if number % 4 else "rare")
        if death is not None:
            kinds[death.kind] += 1
            victims[death.victim] += 1
            before += death.before_answer
            several += len(death.processes) > (3 if death.victim == "server" else 1)
    assert kinds["common"] == pytest.approx(1500, rel=0.1) and kinds["rare"] == pytest.approx(500, rel=0.15)
    assert set(victims) == set(VICTIMS)
    assert all(count == pytest.approx(400, rel=0.2) for count in victims.values())
    assert before == pytest.approx(1000, rel=0.1)
    assert several > 100


def test_the_victims_are_those_of_the_move() -> None:
    phases = Phases(SUBJECTS)
    phases.stored(described("gpu/s0/1"))
    deaths = Deaths(Random(2), 1.0, NAMES, phases)
    alone: dict[str, set[tuple[str, ...]]] = {}
    for _ in range(300):
        death = deaths.draw("k")
        assert death is not None and death.victim != "destination", "there is none yet"
        alone.setdefault(death.victim, set()).add(death.processes)
    assert ("gpu/s0/1",) in alone["source"] and ("control-0",) in alone["control"] and () in alone["bus"]
    assert ("store/s0", "gpu/s0/0", "gpu/s0/1") in alone["server"]
    assert of_server(NAMES, "s1") == ("store/s1", "gpu/s1/0")


def test_a_tally_counts_the_moves_in_each_phase_and_each_death_once() -> None:
    phases = Phases(SUBJECTS)
    phases.stored(described())
    death = Deaths(Random(3), 1.0, NAMES, phases).draw("slot.kept")
    assert death is not None
    tally = Tally()
    tally.count(death, {"placing": 2, "released": 1})
    found = tally.as_dict()
    assert found["phases"]["placing"] == 2 and found["phases"]["released"] == 1
    assert found["victims"][death.victim] == 1 and found["kinds"] == {"slot.kept": 1}
