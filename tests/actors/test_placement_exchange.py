"""Exchanges: when what runs on a device moves away for a model that lies near it, what that reserves, how it ends."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cell_bench import SECOND, card
from test_placement import Table, drains, placed, starts

from actors.placement_exchange import HOLD_NS, MOVES_LIMIT
from actors.placement_state import RunningInstance, Waiting
from bus.messages import (
    AbandonStart,
    HeldModel,
    InstanceStopped,
    ModelRemoved,
    MoveWanted,
    PlacementExchanged,
    PlacementSpread,
    PlaceRequest,
    SlotDenied,
    SlotKept,
    SlotReleased,
    SlotTaken,
    StartInstance,
    To,
    WantSlot,
    WorkerGone,
    encode,
)

S, T = "gpu/s/0", "gpu/t/0"


def model(name: str, tier: Any = "dram", weight: int = 40) -> HeldModel:
    return HeldModel(msgspec.structs.replace(card(name), weight_bytes=weight), tier)


def two_servers(rules: int = 3, *, near: Any = "dram", t: tuple[HeldModel, ...] = (), **worker: Any) -> Table:
    """`a` runs on the only device of s with one sequence; `b` lies on s alone; t, which is idle, holds `a`, too."""
    table = Table()
    table.actor.rules = rules
    table.server("s", model("a"), model("b", near))
    table.worker(S, memory=60, slots=2)
    ask(table, "a1", "a")
    table.ready("a", S)
    table.server("t", model("a", "ssd"), *t)
    table.worker(T, **({"memory": 60, "slots": 2} | worker))
    return table


def ask(table: Table, request: str, name: str, tokens: int = 100) -> list[To]:
    table.sequence += 1
    return table.tell(PlaceRequest(request, 1, name, table.sequence, tokens=tokens))


def exchanges(said: list[To]) -> list[PlacementExchanged]:
    return [to.message for to in said if isinstance(to.message, PlacementExchanged)]


def wanted(said: list[To]) -> list[tuple[str, str]]:
    return [(to.message.request, to.message.to) for to in said if isinstance(to.message, MoveWanted)]


def move(table: Table, request: str, name: str, source: str, to: str, *, after: int = 0) -> list[To]:
    """From the wish to the slot that is taken; what was said when the source let go."""
    table.tell(WantSlot(request, 2, name, source, to))
    table.now += after
    said = table.tell(SlotReleased(request, 1, name, 5))
    table.tell(SlotTaken(request, 2, 150))
    return said


@pytest.mark.parametrize("rules", [2, 3])
def test_what_runs_moves_to_an_idle_device_and_the_model_starts_in_its_place(rules: int) -> None:
    table = two_servers(rules)
    said = ask(table, "b1", "b")
    assert drains(said) == [(S, "a")]
    if rules < 3:
        assert not exchanges(said) and not wanted(said), "it waits until a1 ends"
        return
    (decided,) = exchanges(said)
    assert (decided.model, decided.worker, decided.request) == ("b", S, "b1")
    assert [(m.request, m.to, m.starts) for m in decided.moves] == [("a1", T, True)]
    assert 0 < decided.move_ns < decided.migrate_ns and decided.drain_ns == decided.start_ns == 0
    assert starts(said) == [(T, "a", ())], "reserved in the same step"
    assert wanted(said) == [("a1", T)]
    table.tell(WantSlot("a1", 2, "a", S, T))
    kept = table.ready("a", T)
    assert [to.message for to in kept] == [SlotKept("a1", 2, T)]
    assert starts(table.tell(SlotReleased("a1", 1, "a", 5))) == [(S, "b", ("a",))]
    assert table.tell(SlotTaken("a1", 2, 150)) == []
    table.tell(InstanceStopped(S, "a"))
    assert placed(table.ready("b", S)) == [("b1", S)]
    table.release("b1", "b")
    table.release("a1", "a", attempt=2)
    assert empty(table)


def empty(table: Table) -> bool:
    state = table.actor.state
    left = (state.room, state.kept, state.wishes, state.placed, state.exchange.rooms, state.exchange.sequences)
    return not any(left) and not state.exchange.tried


def test_without_another_device_it_is_drained_as_ever() -> None:
    table = two_servers(memory=30)
    said = ask(table, "b1", "b")
    assert drains(said) == [(S, "a")] and not exchanges(said) and not wanted(said)


def test_it_moves_to_where_its_model_runs_already() -> None:
    table = two_servers(t=())
    ask(table, "a2", "a")
    table.ready("a", T, slots=2)
    assert [one.worker for one in table.actor.state.placed.values()].count(T) >= 1
    (decided,) = exchanges(ask(table, "b1", "b"))
    assert [(m.request, m.to, m.starts) for m in decided.moves] == [("a1", T, False)]


def test_what_will_end_sooner_than_it_would_move_is_waited_for() -> None:
    table = two_servers()
    table.actor.state.exchange.token_ns["a"] = 1000  # something has ended
    table.actor.state.models["a"].service_ns = SECOND // 10
    said = ask(table, "b1", "b")
    assert drains(said) == [(S, "a")] and not exchanges(said)
    slow = two_servers()
    slow.actor.state.exchange.token_ns["a"] = 1000
    slow.actor.state.models["a"].service_ns = 30 * SECOND
    (decided,) = exchanges(ask(slow, "b1", "b"))
    assert 29 * SECOND < decided.drain_ns < 31 * SECOND


@pytest.mark.parametrize(("bytes_per_second", "moves"), [(160, False), (2, True)])
def test_a_slower_start_on_an_idle_device_is_weighed_against_it(bytes_per_second: int, moves: bool) -> None:
    table = two_servers(t=(model("b", "ssd"),))
    table.actor.state.models["a"].servers["t"] = "dram"
    table.actor.state.servers["t"].ssd_rate = bytes_per_second
    said = ask(table, "b1", "b")
    if not moves:
        assert not exchanges(said) and starts(said) == [(T, "b", ())], "0.25 s to load, about as long as the exchange"
        return
    (decided,) = exchanges(said)
    assert decided.start_ns >= 20 * SECOND and decided.migrate_ns < SECOND
    assert wanted(said) == [("a1", T)] and starts(said) == [(T, "a", ())]
    table.server("u", model("b", "ssd"))
    assert not starts(table.worker("gpu/u/0")), "the exchange goes on"


def test_a_destination_that_has_to_load_for_long_is_no_gain() -> None:
    table = two_servers(t=(model("b", "ssd"),))
    table.actor.state.servers["t"].ssd_rate = 2
    said = ask(table, "b1", "b")
    assert not exchanges(said) and starts(said) == [(T, "b", ())]


def test_a_move_that_is_denied_leaves_the_drain_and_is_not_tried_again_at_once() -> None:
    table = two_servers()
    assert exchanges(ask(table, "b1", "b"))
    table.tell(WantSlot("a1", 2, "a", S, T))
    said = table.tell(WorkerGone(T))
    assert [to.message.request for to in said if isinstance(to.message, SlotDenied)] == ["a1"]
    state = table.actor.state
    assert not state.exchange.rooms and state.room["b"].victims == [(S, "a")], "the device is drained as ever"
    table.worker(T)
    table.now += 2 * SECOND
    assert not exchanges(table.worker(T)), "a1 was to move a moment ago"
    assert starts(table.release("a1", "a")) == [(S, "b", ("a",))]
    table.tell(InstanceStopped(S, "a"))
    table.ready("b", S)
    table.release("b1", "b")
    assert empty(table)


def test_a_sequence_is_moved_seldom_and_not_often() -> None:
    table = two_servers()
    ask(table, "b1", "b")
    known = table.actor.state.exchange.sequences["a1"]
    assert (known.moves, known.moved_at) == (1, table.now)
    other = two_servers()
    other.actor.state.exchange.sequences["a1"].moves = MOVES_LIMIT
    assert not exchanges(ask(other, "b1", "b"))
    lately = two_servers()
    lately.actor.state.exchange.sequences["a1"].moved_at = lately.now
    assert not exchanges(ask(lately, "b1", "b"))
    lately.now += HOLD_NS
    assert exchanges(lately.worker("gpu/t/1"))


def test_whoever_waits_longer_keeps_what_it_waits_for() -> None:
    table = two_servers(memory=60, slots=1)
    table.tell(WorkerGone(T))
    ask(table, "a2", "a")
    ask(table, "a3", "a")
    assert table.actor.state.queues["a"]
    said = ask(table, "b1", "b")
    assert not exchanges(said) and not drains(said), "a2 or a3 waits for the instance"


def test_when_nobody_waits_any_more_what_moves_just_goes_on() -> None:
    table = two_servers()
    ask(table, "b1", "b")
    table.release("b1", "b")
    state = table.actor.state
    assert not state.room and not state.exchange.rooms and state.workers[S].instances["a"].status == "running"
    table.ready("a", T)
    move(table, "a1", "a", S, T)
    table.release("a1", "a", attempt=2)
    assert empty(table)


def test_moves_teach_how_long_the_next_takes() -> None:
    table = two_servers()
    before = table.actor.state.exchange
    ask(table, "b1", "b")
    table.ready("a", T)
    move(table, "a1", "a", S, T, after=4 * SECOND)
    times = before.resume["a"]
    assert times.moves == 1 and times.error_ns > 3 * SECOND and times.estimate(150) > SECOND
    assert before.token_ns["a"] > SECOND // 2, "5 tokens in 4 s"
    assert encode(PlaceRequest("r", 1, "a", 1)).find(b"tokens") < 0, "what was said before is said as before"


def shared(rules: int = 3, *, t: Any = "dram") -> Table:
    """`a` and `b` run on the device of s, one sequence each; that of t idles; nobody waits."""
    table = Table()
    table.actor.rules = rules
    table.server("s", model("a", weight=20), model("b", weight=20))
    table.worker(S, memory=120, slots=2)
    for name in "ab":
        ask(table, f"{name}1", name)
        table.ready(name, S, slots=2)
    ask(table, "b2", "b")
    table.server("t", model("a", t, 20), model("b", t, 20))
    table.worker(T, memory=120, slots=2)
    table.now += 3 * SECOND
    return table


@pytest.mark.parametrize("rules", [3, 4])
def test_what_starts_for_a_move_is_given_up_with_it(rules: int) -> None:
    table = shared(rules)
    table.release("b2", "b")
    table.tell(WantSlot("a1", 2, "a", S, T))
    said = table.tell(SlotReleased("a1", 2, "a"))
    assert [to for to in said if isinstance(to.message, AbandonStart)] == [To(T, AbandonStart("a"))] * (rules - 3)


@pytest.mark.parametrize("other", ["moves there too", "waits", "another place"])
def test_what_starts_for_a_move_goes_on_where_somebody_else_wants_it(other: str) -> None:
    table = shared(4)
    table.tell(WantSlot("a1", 2, "a", S, T))
    if other == "moves there too":
        table.tell(WantSlot("a2", 2, "a", S, T))
    elif other == "waits":
        table.actor.state.workers[S].instances["a"].slots = 1
        table.actor._index(S, table.actor.state.models["a"], table.actor.state.workers[S].instances["a"])
        ask(table, "a2", "a")
    else:
        table.actor.state.wishes["a1"].to = "u"
    said = table.tell(SlotReleased("a1", 2, "a"))
    assert not [to for to in said if isinstance(to.message, AbandonStart)]


def spreads(said: list[To]) -> list[tuple[str, str, str]]:
    found = [to.message for to in said if isinstance(to.message, PlacementSpread)]
    return [(one.model, one.worker, one.to) for one in found]


def test_what_shares_a_device_moves_to_one_that_idles_once() -> None:
    table = shared()
    said = table.release("b2", "b")
    assert spreads(said) == [("a", S, T)] and starts(said) == [(T, "a", ())] and wanted(said) == [("a1", T)]
    assert [to.message.urgent for to in said if isinstance(to.message, StartInstance)] == [False], "nobody waits"
    table.ready("a", T, slots=2)
    move(table, "a1", "a", S, T)
    table.now += 100 * SECOND
    table.worker("gpu/t/1")
    ask(table, "b3", "b")
    assert not spreads(table.release("b3", "b")), "each has a device of its own"


@pytest.mark.parametrize("reason", ["rules", "far", "young", "moved", "waiting", "taken", "lately"])
def test_what_shares_a_device_stays_where_a_move_is_no_gain(reason: str) -> None:
    table = shared(rules=2 if reason == "rules" else 3, t="ssd" if reason == "far" else "dram")
    state = table.actor.state
    if reason == "far":
        state.servers["t"].ssd_rate = 1
    elif reason == "young":
        table.now -= 2 * SECOND
    elif reason == "moved":
        for known in state.exchange.sequences.values():
            known.moves = 1
    elif reason == "waiting":
        table.tell(ModelRemoved("c"))
        state.queues["b"] = {"b9": Waiting(1, 9, 9)}
        state.workers[S].instances["b"].slots = 1
    elif reason == "taken":
        state.workers[T].instances["b"] = RunningInstance(2, 40, "running", {"b7": 1})
    else:
        state.exchange.spread_at = table.now + 10
    said = table.release("b2", "b")
    assert not spreads(said) and not wanted(said)
