"""Placement: who gets which slot, what starts where, what makes room, who is refused, and that nobody is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from cell_bench import MS, SECOND, card

from actors.placement import FAILURES_LIMIT, Placement
from actors.placement_start import DETACH_NS
from actors.placement_state import kv_plan
from bus.messages import (
    Candidate,
    DropModel,
    HeldModel,
    InstanceDraining,
    InstanceFailed,
    InstanceReady,
    InstanceStopped,
    LookForModel,
    Message,
    ModelAdded,
    ModelGone,
    ModelHeld,
    ModelRemoved,
    ModelReplaced,
    PlacementConfigured,
    PlacementDecided,
    PlacementRefused,
    PlaceRequest,
    RequestPlaced,
    ServerGone,
    ServerReady,
    SlotReleased,
    StartInstance,
    StopInstance,
    To,
    WorkerGone,
    WorkerReady,
)

W = "gpu/s/0"


class Table:
    """A placement under test: one line per message. A card's model takes 40 bytes of weights and 10 per slot."""

    def __init__(self) -> None:
        self.actor = Placement("placement")
        self.now, self.sequence = 100, 0

    def tell(self, message: Message) -> list[To]:
        self.now += 1
        return self.actor.handle(message, self.now)

    def server(self, name: str = "s", *models: Any, dram: int = 1000) -> list[To]:
        held = tuple(m if isinstance(m, HeldModel) else HeldModel(card(m)) for m in models)
        return self.tell(ServerReady(name, dram, held))

    def worker(self, name: str = W, memory: int = 60, slots: int = 2) -> list[To]:
        return self.tell(WorkerReady(name, name.split("/")[1], memory, slots))

    def ask(self, request: str, model: str = "a", attempt: int = 1, accepted: int = 0) -> list[To]:
        self.sequence += 1
        return self.tell(PlaceRequest(request, attempt, model, accepted or self.sequence))

    def ready(self, model: str = "a", worker: str = W, slots: int = 1) -> list[To]:
        return self.tell(InstanceReady(worker, model, slots, "ssd", 5))

    def release(self, request: str, model: str = "a", attempt: int = 1) -> list[To]:
        return self.tell(SlotReleased(request, attempt, model))

    def running(self, *models: str, memory: int = 0, dram: int = 1000) -> Table:
        """These models run on one worker, one slot each, all idle, in the order of their last use."""
        self.server("s", *models, *(["x"] if "x" not in models else []), dram=dram)
        self.worker(memory=memory or 50 * len(models), slots=1)
        for model in models:
            self.ask(f"first-{model}", model)
            self.ready(model)
            self.release(f"first-{model}", model)
        return self


def start(model: str = "a", slots: int = 1, evict: tuple[str, ...] = (), worker: str = W) -> To:
    return To(worker, StartInstance(model, slots, 10 * slots, 10, evict))


def refusal(said: list[To]) -> PlacementRefused:
    (to,) = said
    assert isinstance(to.message, PlacementRefused) and to.receiver == "requests"
    return to.message


def starts(said: list[To]) -> list[tuple[str, str, tuple[str, ...]]]:
    found = [(to.receiver, to.message) for to in said]
    return [(worker, m.model, m.evict) for worker, m in found if isinstance(m, StartInstance)]


def placed(said: list[To]) -> list[tuple[str, str]]:
    return [(to.message.request, to.message.worker) for to in said if isinstance(to.message, RequestPlaced)]


def drains(said: list[To]) -> list[tuple[str, str]]:
    return [(to.message.worker, to.message.model) for to in said if isinstance(to.message, InstanceDraining)]


def stops(said: list[To]) -> list[tuple[str, str]]:
    return [(to.receiver, to.message.model) for to in said if isinstance(to.message, StopInstance)]


# ---- rule versions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rules", "second", "third", "fourth"), [(1, 0, 0, 0), (2, 1, 0, 1), (3, 1, 0, 1)])
def test_of_places_that_are_equally_soon_version_2_takes_the_device_with_the_least_to_do(
    rules: int, second: int, third: int, fourth: int
) -> None:
    table = Table()
    table.actor.rules = rules
    table.server("s", *(HeldModel(card(model), "dram") for model in "abcd"))
    for index in range(2):
        table.worker(f"gpu/s/{index}", memory=400, slots=2)
    assert starts(table.ask("a1", "a")) == [("gpu/s/0", "a", ())]
    said = table.ask("b1", "b")  # gpu/s/0 will have a1
    assert starts(said) == [(f"gpu/s/{second}", "b", ())]
    decided = next(to.message for to in said if isinstance(to.message, PlacementDecided))
    assert [one.busy for one in decided.candidates] == ([0, 1] if rules >= 2 else [0, 0])
    table.ready("a", "gpu/s/0", slots=2)
    table.ready("b", f"gpu/s/{second}", slots=2)
    assert starts(table.ask("c1", "c")) == [(f"gpu/s/{third}", "c", ())], "one sequence and one instance on each"
    table.ready("c", f"gpu/s/{third}", slots=2)
    table.release("a1", "a")
    table.release("c1", "c")
    table.ask("b2", "b")
    table.release("b1", "b")
    table.release("b2", "b")
    assert starts(table.ask("d1", "d")) == [(f"gpu/s/{fourth}", "d", ())], "both are idle: one holds two instances"


# ---- slots and queues -------------------------------------------------------------------------------------------


def test_a_cold_model_starts_and_serves_in_order_of_acceptance() -> None:
    table = Table()
    assert table.server("s", "a") == [] and table.worker() == []
    first = Candidate(W, "ssd", 0, 40, 0, SECOND // 10)
    assert table.ask("r1") == [start(), To("record", PlacementDecided("a", W, "r1", 1, (first,), 1))]
    assert table.ask("r2") == []
    assert table.ready() == [To("requests", RequestPlaced("r1", 1, W, "ssd", 2))]
    assert table.release("r1") == [To("requests", RequestPlaced("r2", 1, W, "ssd", 2))]
    assert table.release("r2") == []
    assert table.ask("r3") == [To("requests", RequestPlaced("r3", 1, W, "running", 0))]


def test_the_instance_with_most_free_slots_is_taken() -> None:
    table = Table()
    table.server("s", "a")
    for worker in (W, "gpu/s/1"):
        table.worker(worker)
    for i in range(2):
        table.ask(f"r{i}")
    table.ready(slots=3)
    table.ready(worker="gpu/s/1", slots=3)
    taken = [placed(table.ask(f"q{i}"))[0][1] for i in range(4)]
    assert sorted(taken) == [W, "gpu/s/1", "gpu/s/1", "gpu/s/1"], "the two that waited went to the first"
    assert placed(table.ask("last")) == [] and table.actor.state.waiting == 1


def test_a_request_that_lost_its_worker_goes_before_those_that_came_after_it() -> None:
    table = Table()
    table.server("s", "a")
    for request, attempt, accepted in (("late", 1, 9), ("lost", 2, 3), ("later", 1, 11), ("older", 3, 1)):
        table.ask(request, attempt=attempt, accepted=accepted)
    assert list(table.actor.state.queues["a"]) == ["older", "lost", "late", "later"]


def test_the_queue_is_bounded_for_new_requests_and_says_when_to_come_again() -> None:
    table = Table()
    table.tell(PlacementConfigured(queue_limit=2))
    table.server("s", "a", "b")
    table.ask("r1")
    table.ask("r2", "b")
    full = refusal(table.ask("r3"))
    assert (full.code, full.retry_ms) == ("queue_full", 1000) and "try again in 1000 ms" in full.reason
    assert table.ask("r1b", attempt=2) == [], "who was accepted before is not refused"


@pytest.mark.parametrize("waiting", [True, False])
def test_a_cancelled_request_leaves_its_queue_or_its_slot(waiting: bool) -> None:
    table = Table().running("a", memory=50)
    table.ask("r1")
    table.ask("r2")
    assert table.release("r2" if waiting else "r1", attempt=9) == [], "another attempt"
    table.release("r2" if waiting else "r1")
    assert table.actor.state.waiting == 0 and len(table.actor.state.placed) == 1
    assert table.release("nobody") == []


# ---- where it starts --------------------------------------------------------------------------------------------


def test_the_nearest_tier_wins() -> None:
    table = Table()
    for server, tier in (("s", "ssd"), ("t", "dram")):
        table.server(server, HeldModel(card("a"), tier))
        table.worker(f"gpu/{server}/0")
    said = table.ask("r1")
    assert starts(said) == [("gpu/t/0", "a", ())]
    decided = said[1].message
    assert isinstance(decided, PlacementDecided)
    assert [(c.worker, c.tier, c.load_ns) for c in decided.candidates] == [("gpu/t/0", "dram", 0), (W, "ssd", 40)]


def test_what_is_queued_on_the_loading_path_counts_and_so_does_the_learned_bandwidth() -> None:
    table = Table()
    for server in ("s", "t"):
        table.server(server, "a", "b")
        table.worker(f"gpu/{server}/0", memory=120)
    assert starts(table.ask("r1")) == [(W, "a", ())]
    assert starts(table.ask("r2", "b")) == [("gpu/t/0", "b", ())], "the other path is free"
    table.tell(ModelHeld("s", card("a"), "dram", 40 * SECOND))
    assert table.actor.state.servers["s"].ssd_rate == 750_000_000
    table.tell(ModelHeld("s", card("a"), "dram", 1))
    assert 0 < table.actor.state.servers["s"].ssd_rate < 2**62


def test_the_least_recently_used_idle_instance_makes_room() -> None:
    table = Table().running("a", "b", "c")
    table.ask("r", "a")
    table.release("r", "a")
    said = table.ask("r1", "x")
    assert starts(said) == [(W, "x", ("b",))] and said[0].message == start("x", 1, ("b",)).message
    decided = said[1].message
    assert isinstance(decided, PlacementDecided) and decided.candidates[0].free_ns == DETACH_NS


def test_a_busy_instance_is_not_evicted() -> None:
    table = Table().running("a", "b")
    table.ask("r", "a")
    assert starts(table.ask("r1", "x")) == [(W, "x", ("b",))]


def test_free_memory_goes_before_eviction() -> None:
    table = Table().running("a", memory=50)
    table.worker("gpu/s/1", memory=50, slots=1)
    assert starts(table.ask("r1", "x")) == [("gpu/s/1", "x", ())]


def test_idle_instances_also_make_room_in_dram() -> None:
    """Found in review: with free device memory and DRAM for one model, a second one waited for ever."""
    table = Table().running("a", memory=500, dram=40)
    assert starts(table.ask("r1", "x")) == [(W, "x", ("a",))]


def test_idle_instances_of_other_workers_make_room_in_dram() -> None:
    table = Table()
    table.server("s", "a", HeldModel(card("x", weight=45)), dram=45)
    table.worker(memory=50, slots=1)
    table.ask("r", "a")
    table.ready("a")
    table.worker("gpu/s/1", memory=500, slots=1)
    said = table.ask("r1", "x")
    assert starts(said) == [] and drains(said) == [(W, "a")]
    said = table.release("r", "a")
    assert stops(said) == [(W, "a")] and starts(said) == []
    assert starts(table.tell(InstanceStopped(W, "a"))) == [("gpu/s/1", "x", ())]


def test_dram_that_is_being_loaded_is_not_counted_twice() -> None:
    """Found in review: after a worker died the load of its model went on, and placement forgot it."""
    table = Table()
    table.server("s", "a", "b", dram=40)
    table.worker()
    table.ask("r1", "a")
    table.tell(WorkerGone(W))
    table.worker("gpu/s/1", memory=500)
    table.release("r1", "a")
    table.tell(SlotReleased("r1", 1, "a"))
    state = table.actor.state
    assert state.servers["s"].loading == {"a": 40}


# ---- further instances -----------------------------------------------------------------------------------------


def test_a_model_that_runs_gets_a_further_instance_from_free_memory() -> None:
    table = Table().running("a", memory=50)
    table.ask("r1")
    assert starts(table.ask("r2")) == []
    assert starts(table.worker("gpu/s/1", memory=50, slots=1)) == [("gpu/s/1", "a", ())]


def test_others_are_evicted_for_it_only_when_a_whole_instance_of_requests_waits() -> None:
    table = Table()
    table.server("s", "a", "b")
    table.worker(memory=50, slots=1)
    table.worker("gpu/s/1", memory=90, slots=2)
    table.ask("rb", "b")
    first = table.actor.state.models["b"].instances
    table.tell(InstanceReady(next(iter(first)), "b", 2, "ssd", 5))
    other = "gpu/s/1" if W in first else W
    table.release("rb", "b")
    table.ask("r1")
    assert list(table.actor.state.models["a"].instances) == [other]
    table.ready(worker=other, slots=1)
    evicting = [starts(table.ask(f"q{i}")) for i in range(3)]
    slots = kv_plan(card("a"), 50 if other != W else 90, 1 if other != W else 2)[0]
    assert [len(one) for one in evicting].index(1) + 1 == slots
    assert next(one for one in evicting if one)[0][2] == ("b",)


# ---- room for who waits longest --------------------------------------------------------------------------------


def test_an_instance_is_drained_for_an_older_request() -> None:
    table = Table().running("a", memory=50)
    table.ask("r1", "a")
    assert drains(table.ask("r2", "x")) == [(W, "a")]
    assert table.ask("r3", "a") == [], "what drains takes nothing"
    said = table.release("r1", "a")
    assert starts(said) == [(W, "x", ("a",))] and placed(said) == []
    table.tell(InstanceStopped(W, "a"))
    table.ready("x")
    assert starts(table.release("r2", "x")) == [(W, "a", ("x",))]


def test_an_instance_for_which_an_older_request_waits_is_left_alone_until_it_is_served() -> None:
    table = Table().running("a", memory=50)
    table.ask("r1", "a")
    table.ask("r2", "a")
    assert drains(table.ask("r3", "x")) == []
    said = table.release("r1", "a")
    assert placed(said) == [("r2", W)] and drains(said) == [(W, "a")], "nobody older waits now"


def test_a_drain_that_nobody_wants_any_more_ends_and_who_waited_goes_on() -> None:
    table = Table().running("a", memory=60)
    table.actor.state.workers[W].instances["a"].slots = 2
    table.ask("r1", "a")
    assert drains(table.ask("r2", "x")) == [(W, "a")]
    table.ask("r3", "a")
    model, instance = table.actor.state.models["a"], table.actor.state.workers[W].instances["a"]
    assert not model.open and instance.status == "draining"
    assert placed(table.release("r2", "x")) == [("r3", W)]


def test_what_comes_free_is_kept_for_the_oldest() -> None:
    """Found in review: a small model took each piece of memory that was drained for a large one."""
    table = Table()
    table.server("s", "a", "b", "c", HeldModel(card("x", weight=90)))
    table.worker(memory=100, slots=1)
    for model in ("a", "b"):
        table.ask(f"r{model}", model)
        table.ready(model)
    assert sorted(drains(table.ask("rx", "x"))) == [(W, "a"), (W, "b")]
    assert starts(table.ask("rc", "c")) == []
    assert stops(table.release("ra", "a")) == [(W, "a")]
    assert starts(table.tell(InstanceStopped(W, "a"))) == []
    assert [m for _, m, _ in starts(table.release("rb", "b"))] == ["x"]


def test_the_drain_moves_when_its_worker_is_lost() -> None:
    table = Table().running("a", memory=50)
    table.ask("r1", "a")
    table.ask("r2", "x")
    assert table.tell(WorkerGone(W)) == [] and not table.actor.state.room
    assert starts(table.worker()) == [(W, "x", ())]


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_at_once() -> None:
    table = Table()
    assert refusal(table.ask("r")).code == "unknown_model"
    table.server("s", HeldModel(card("a", weight=100)), dram=500)
    table.worker(memory=100)
    large = refusal(table.ask("r1"))
    assert large.code == "too_large" and "needs 110 bytes of device memory" in large.reason
    table.worker("gpu/t/0", memory=1000)
    assert refusal(table.ask("r2")).code == "too_large", "that worker's server does not hold it"
    table.server("s", HeldModel(card("a", weight=600)), dram=500)
    assert "600 bytes of DRAM" in refusal(table.ask("r3")).reason


def test_a_lost_worker_that_could_hold_it_may_come_back() -> None:
    """Found in review: an accepted request whose large worker was restarting failed as too large."""
    table = Table()
    table.server("s", "a")
    table.worker()
    table.worker("gpu/s/1", memory=30)
    table.tell(WorkerGone(W))
    assert table.ask("r1", attempt=2) == []
    assert starts(table.worker()) == [(W, "a", ())]


def test_who_waited_for_the_first_worker_is_told_when_it_is_too_small() -> None:
    table = Table()
    table.server("s", "a")
    assert table.ask("r1") == []
    assert refusal(table.worker(memory=30)).code == "too_large"


def test_starts_that_fail_are_tried_elsewhere_and_given_up_in_the_end() -> None:
    table = Table()
    table.server("s", "a")
    table.worker()
    table.worker("gpu/s/1")
    (at,) = starts(table.ask("r1"))
    seen = [at[0]]
    for _ in range(FAILURES_LIMIT - 1):
        (at,) = starts(table.tell(InstanceFailed(at[0], "a", "no memory", retry=True)))
        seen.append(at[0])
    assert seen == [W, "gpu/s/1"] * 5
    refused = refusal(table.tell(InstanceFailed(at[0], "a", "no memory", retry=True)))
    assert (refused.code, refused.reason) == ("start_failed", "a: no memory")
    assert starts(table.ask("r2")) == [(W, "a", ())]
    assert refusal(table.tell(InstanceFailed(W, "a", "bad shard"))).code == "start_failed", "no retry"


def test_a_further_instance_that_always_fails_is_given_up() -> None:
    """Found in review: with the model running elsewhere, the same start failed for ever, within one step."""
    table = Table().running("a", memory=50)
    table.worker("gpu/s/1", memory=50, slots=1)
    table.ask("r1")
    said = table.ask("r2")
    failures = 0
    while starts(said):
        failures += 1
        said = table.tell(InstanceFailed("gpu/s/1", "a", "no memory", retry=True))
    assert failures == FAILURES_LIMIT and table.actor.state.waiting == 1
    assert len(starts(table.worker("gpu/s/1", memory=50, slots=1))) == 1, "a new worker is a new chance"


# ---- models, servers and workers come and go ----------------------------------------------------------------------


def test_a_model_that_is_removed_stops_when_idle_and_is_dropped() -> None:
    table = Table().running("a", memory=60)
    table.actor.state.workers[W].instances["a"].slots = 1
    table.ask("r1")
    table.ask("r2")
    said = table.tell(ModelRemoved("a"))
    assert [type(to.message) for to in said] == [PlacementRefused, DropModel]
    assert refusal(table.ask("r3")).code == "unknown_model"
    assert stops(table.release("r1")) == [(W, "a")]
    assert table.tell(ModelGone("s", "a")) == [] and "a" not in table.actor.state.models
    assert table.tell(InstanceStopped(W, "a")) == [] and not table.actor.state.removing
    assert table.tell(ModelRemoved("a")) == []


def test_a_model_that_is_added_is_looked_for_and_lives_again() -> None:
    table = Table().running("a", memory=60)
    table.tell(ModelRemoved("x"))
    assert table.tell(ModelAdded("x")) == [To("store/s", LookForModel("x"))]
    assert not table.actor.state.removing and starts(table.ask("r", "x"))
    table.tell(ServerGone("s"))
    assert table.tell(ModelAdded("y")) == [To("store/s", LookForModel("y"))]


def test_a_model_that_no_server_holds_any_more_is_refused_with_those_who_wait() -> None:
    """Found in review: after a server's return without the model, its requests waited for ever."""
    table = Table()
    table.server("s", "a", "b")
    table.ask("r1")
    table.ask("r2", "b")
    assert refusal(table.tell(ModelGone("s", "a"))).code == "unknown_model"
    assert "came back without b" in refusal(table.server("s")).reason
    assert not table.actor.state.models


def test_a_running_model_without_a_server_is_served_until_its_worker_is_lost() -> None:
    table = Table().running("a", memory=50)
    table.tell(ModelGone("s", "a"))
    assert placed(table.ask("r1")) == [("r1", W)]
    table.ask("r2")
    assert refusal(table.tell(WorkerGone(W))).request == "r2"
    assert refusal(table.ask("r1", attempt=2)).code == "unknown_model"


def test_a_failed_load_that_was_the_last_copy_says_why() -> None:
    table = Table()
    table.server("s", "a")
    table.worker()
    table.ask("r1")
    assert table.tell(ModelGone("s", "a")) == []
    refused = refusal(table.tell(InstanceFailed(W, "a", "shard 2 is truncated", retry=True)))
    assert (refused.code, refused.reason) == ("start_failed", "a: shard 2 is truncated")


def test_a_lost_server_starts_nothing_until_it_returns() -> None:
    table = Table()
    table.server("s", "a")
    table.worker()
    table.tell(ServerGone("s"))
    assert table.ask("r1") == []
    assert starts(table.server("s", "a")) == [(W, "a", ())]


def test_a_lost_worker_takes_its_instances_and_slots_along_and_its_return_starts_anew() -> None:
    table = Table().running("a", memory=60)
    table.ask("r1")
    assert table.tell(WorkerGone(W)) == []
    state = table.actor.state
    assert not state.placed and not state.models["a"].instances and not state.models["a"].open
    assert not state.servers["s"].leased
    assert table.release("r1") == []
    assert table.ask("r1", attempt=2) == []
    assert starts(table.worker()) == [(W, "a", ())]
    assert table.tell(WorkerGone("gpu/s/9")) == []


def test_late_news_of_what_is_gone_changes_nothing() -> None:
    table = Table().running("a", memory=60)
    for message in (InstanceReady("gpu/s/9", "a", 1, "ssd"), InstanceStopped("gpu/s/9", "a")):
        assert table.tell(message) == []
    assert table.ready("a") == [] and table.ready("nobody") == []


# ---- costs ------------------------------------------------------------------------------------------------------


def test_a_warm_request_costs_the_same_however_large_the_cell_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: neither a pump nor a weighing, whatever waits for other models."""
    table = Table()
    table.server("s0", "m0")
    table.server("s1", *[f"m{i}" for i in range(20)])
    table.worker("gpu/s0/0", memory=80, slots=4)
    table.ask("first", "m0")
    table.ready("m0", "gpu/s0/0", slots=4)
    for i in range(40):
        table.ask(f"r{i}", f"m{1 + i % 19}")
    assert table.actor.state.waiting == 40
    monkeypatch.setattr("actors.placement_pump.best_options", lambda *a, **k: pytest.fail("weighed"))
    monkeypatch.setattr(Placement, "_pump", lambda *a: pytest.fail("pumped"))
    for i in range(10):
        assert placed(table.ask(f"warm{i}", "m0")) == [(f"warm{i}", "gpu/s0/0")]
        assert table.release(f"warm{i}", "m0") == []


def test_waiting_longer_is_not_weighed_again_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table().running("a", memory=50)
    table.ask("r1")
    table.ask("r2")
    weighed: list[int] = []
    monkeypatch.setattr("actors.placement_pump.best_options", lambda *a, **k: weighed.append(1) or ([], 5))
    for i in range(20):
        table.ask(f"q{i}")
    assert weighed == []
    assert table.now < MS


def test_a_replaced_model_is_served_anew_once_its_old_instances_are_idle() -> None:
    """Found in review: a newer version was never served while a worker, even an idle one, held the old one."""
    table = Table().running("a")
    table.ask("busy")
    assert table.tell(ModelReplaced("s", "a")) == [], "what runs goes on"
    assert placed(table.ask("later")) == [] and starts(table.ask("much later")) == []
    assert stops(table.release("busy")) == [(W, "a")]
    assert starts(table.tell(InstanceStopped(W, "a"))) == [], "not before the store holds the new one"
    assert starts(table.tell(ModelHeld("s", card("a"), "ssd"))) == [(W, "a", ())]
    assert placed(table.ready("a")) == [("later", W)]
    assert not table.actor.state.models["a"].replaced and placed(table.release("later")) == [("much later", W)]


def test_an_idle_instance_of_a_replaced_model_stops_at_once() -> None:
    table = Table().running("a")
    assert stops(table.tell(ModelReplaced("s", "a"))) == [(W, "a")]
