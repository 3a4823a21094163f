"""When a replica publishes: lead, rescue, step back. Tables over `actors.replica`, no bus, no clock."""

from __future__ import annotations

import msgspec
import pytest

from actors.cell import Cell, Said
from actors.readback import Difference
from actors.replica import MISSING_SECONDS, Replica, is_urgent
from bus.contract import Record
from bus.messages import FactEnvelope, Generation, Message, RequestAccepted, encode, kind_of, request_id

CELL = "main"
ME, OTHER = "me", "other"


class Stream:
    """A ledger in memory; what is appended is fed to replicas by the test."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def fact(self, actor: str, message: Message) -> Record:
        payload = encode(FactEnvelope("intake", msgspec.Raw(encode(message))))
        return self.append(f"longshore.{CELL}.fact.{actor}.{kind_of(message)}", payload, "")

    def append(self, subject: str, payload: bytes, publisher: str) -> Record:
        record = Record(len(self.records) + 1, 10**18 + len(self.records), subject, payload, publisher)
        self.records.append(record)
        return record

    def request(self, key: str) -> Record:
        accepted = RequestAccepted(request_id("c", key), "c", key, "m", Generation(4, prompt="x"))
        return self.fact("requests", accepted)


def computed(stream: Stream, fact: Record) -> list[tuple[str, bytes]]:
    """What a cell says to the last fact."""
    cell = Cell(CELL)
    steps = [step for record in stream.records[: fact.sequence] for step in cell.take(record)]
    return [(said.subject, said.payload) for said in steps[-1].said]


def rescued(replica: Replica, at: float, last: int) -> int:
    replica.rescue(at, last)
    published = replica.outgoing()
    for fact, said in published:
        replica.sent(fact, said.place, at)
    return len(published)


def all_answered(replica: Replica, facts: int = 10) -> None:
    for fact in range(facts):
        for place in range(facts):
            replica.answered(fact, place)


def test_a_new_replica_waits_and_then_rescues() -> None:
    stream, replica = Stream(), Replica(Cell(CELL), ME, end_at_start=0)
    fact = stream.request("a")
    replica.take(fact, 0.0)
    assert replica.outgoing() == []
    assert rescued(replica, MISSING_SECONDS / 2, fact.sequence) == 0
    assert rescued(replica, MISSING_SECONDS + 0.01, fact.sequence) == len(computed(stream, fact))
    assert not replica.leading


def test_who_is_behind_the_stream_rescues_nothing() -> None:
    stream, replica = Stream(), Replica(Cell(CELL), ME, end_at_start=0)
    fact = stream.request("a")
    replica.take(fact, 0.0)
    assert rescued(replica, 1.0, fact.sequence + 1) == 0


def test_while_own_publishes_are_unanswered_absence_proves_nothing() -> None:
    stream, replica = Stream(), Replica(Cell(CELL), ME, end_at_start=0)
    replica.take(stream.request("a"), 0.0)
    assert rescued(replica, 0.3, 1) > 0
    assert rescued(replica, 10.0, 1) == 0
    all_answered(replica)
    assert rescued(replica, 10.1, 1) == 0, "the count starts anew once they are answered"
    assert rescued(replica, 10.1 + MISSING_SECONDS, 1) > 0


def test_twice_in_a_row_leads_until_somebody_elses_comes_back() -> None:
    stream, replica = Stream(), Replica(Cell(CELL), ME, end_at_start=0)
    at = 0.0
    for key in ("a", "b"):
        fact = stream.request(key)
        replica.take(fact, at)
        at += 0.3
        assert rescued(replica, at, fact.sequence) > 0
        for subject, payload in computed(stream, fact):
            replica.take(stream.append(subject, payload, ME), at)
        all_answered(replica)
    assert replica.leading
    fact = stream.request("c")
    replica.take(fact, at)
    published = replica.outgoing()
    assert [said.payload for _, said in published] and len(published) == len(computed(stream, fact))
    for subject, payload in computed(stream, fact):
        replica.take(stream.append(subject, payload, OTHER), at)
    assert not replica.leading


def test_others_publishing_in_between_resets_the_count() -> None:
    stream, replica = Stream(), Replica(Cell(CELL), ME, end_at_start=0)
    first = stream.request("a")
    replica.take(first, 0.0)
    assert rescued(replica, 0.3, first.sequence) > 0
    for subject, payload in computed(stream, first):
        replica.take(stream.append(subject, payload, OTHER), 0.3)
    all_answered(replica)
    second = stream.request("b")
    replica.take(second, 1.0)
    assert rescued(replica, 1.3, second.sequence) > 0
    assert not replica.leading


def test_a_replica_is_silent_up_to_the_end_of_the_stream_at_its_start() -> None:
    stream = Stream()
    fact = stream.request("a")
    said = computed(stream, fact)
    for subject, payload in said:
        stream.append(subject, payload, OTHER)
    replica = Replica(Cell(CELL), ME, end_at_start=len(stream.records))
    replica.take(stream.records[0], 0.0)
    assert not replica.live
    assert rescued(replica, 5.0, 1) == 0
    for record in stream.records[1:]:
        replica.take(record, 5.0)
    assert replica.live
    assert rescued(replica, 9.0, len(stream.records)) == 0


def test_who_waits_outside_goes_first() -> None:
    said = [Said(0, "a", b"", "placement"), Said(1, "b", b"", "driver/gpu/s1/0"), Said(2, "c", b"", "reader")]
    assert [is_urgent(one) for one in said] == [False, True, True]


def test_a_busy_stream_does_not_keep_a_lost_output_from_its_rescue() -> None:
    """The end of the stream is always ahead, and some publish is always on its way."""
    stream, replica = Stream(), Replica(Cell(CELL), ME, end_at_start=0)
    lost = stream.request("lost")
    replica.take(lost, 0.0)
    at, before, found = 0.0, 0, []
    for number in range(10):
        fact = stream.request(f"busy {number}")
        at += 0.05
        replica.take(fact, at)
        for subject, payload in computed(stream, fact):
            replica.take(stream.append(subject, payload, OTHER), at)
        replica.sent(fact.sequence, 0, at)
        replica.answered(before, 0)
        before = fact.sequence
        replica.rescue(at, replica.position + 1)
        found += [fact for fact, _ in replica.outgoing()]
    assert found and set(found) == {lost.sequence}


def test_a_difference_stops_the_replica_and_names_message_and_field() -> None:
    stream, replica = Stream(), Replica(Cell(CELL), ME, end_at_start=0)
    fact = stream.request("a")
    replica.take(fact, 0.0)
    subject, payload = computed(stream, fact)[0]
    with pytest.raises(Difference) as caught:
        replica.take(stream.append(subject, payload.replace(b'"model":"m"', b'"model":"n"'), OTHER), 0.1)
    assert caught.value.field == "body.model"
    assert caught.value.message == "request.place"
