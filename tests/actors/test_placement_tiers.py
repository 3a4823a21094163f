"""Placement over servers, other servers and sources: who fetches from where, what that is estimated to take, what is
given up."""

from __future__ import annotations

from typing import Any

from cell_bench import SECOND, card
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import Table, starts

from actors.gpu import Gpu
from actors.placement_state import kv_plan
from actors.store import Store
from bus.messages import (
    AbandonStart,
    AttachModel,
    CancelLoad,
    EvictModel,
    HeldModel,
    InstanceStopped,
    LoadCancelTaken,
    LoadFailed,
    LoadModel,
    LookForModel,
    Message,
    ModelAdded,
    ModelAttached,
    ModelGone,
    ModelHeld,
    ModelLoaded,
    ModelRemoved,
    PlacementDecided,
    PlacementRefused,
    PlaceRequest,
    RequestPlaced,
    ServerReady,
    SlotReleased,
    StartInstance,
    StoreStarted,
    Tier,
    To,
    WorkerStarted,
)

AT = "/models/a"
MB = 1_000_000


class Tiers(Table):
    """Servers named by a letter, each with one worker; a model of 40 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.actor.rules = 3

    def holds(self, name: str, tier: Tier | None, *, address: str = "", source: str = "") -> list[To]:
        """A server that is up, and how near it has model a."""
        held = () if tier is None else (HeldModel(card("a"), tier, source),)
        said = self.tell(ServerReady(name, 1000, held, address=address))
        return [*said, *self.worker(f"gpu/{name}/0")]


def started(said: list[To]) -> tuple[str, StartInstance]:
    ((worker, message),) = [(to.receiver, to.message) for to in said if isinstance(to.message, StartInstance)]
    return worker, message


def decided(said: list[To]) -> PlacementDecided:
    return next(to.message for to in said if isinstance(to.message, PlacementDecided))


def kinds(said: list[To]) -> list[str]:
    return [type(to.message).__name__ for to in said]


# ---- who may have it, and from whom ---------------------------------------------------------------------------


def test_a_server_that_has_nothing_fetches_from_another_one_and_is_told_what_it_is() -> None:
    table = Tiers()
    table.tell(ServerReady("full", 1000, (HeldModel(card("a"), "ssd"),), address="http://full:1"))
    table.holds("empty", None)
    worker, start = started(table.ask("r"))
    assert (worker, start.sources, start.card) == ("gpu/empty/0", ("http://full:1/a",), card("a"))


def test_without_an_address_and_a_source_nobody_fetches() -> None:
    table = Tiers()
    table.tell(ServerReady("full", 1000, (HeldModel(card("a"), "ssd"),)))
    table.holds("empty", None)
    assert starts(table.ask("r")) == []


def test_sources_are_in_order_dram_then_who_serves_fewest_then_where_an_operator_said() -> None:
    table = Tiers()
    table.tell(ModelAdded("a", AT))
    for name, tier in (("s1", "ssd"), ("s2", "dram"), ("s3", "ssd")):
        table.tell(ServerReady(name, 1000, (HeldModel(card("a"), tier),), address=f"http://{name}"))  # type: ignore[arg-type]
    table.holds("e1", None)
    _, start = started(table.ask("r1"))
    assert start.sources == ("http://s2/a", "http://s1/a", "http://s3/a", AT)
    table.tell(ModelHeld("s2", card("a"), "ssd"))
    table.holds("e2", None)
    _, start = started(table.ask("r2") or table.ask("r3"))
    assert start.sources == ("http://s1/a", "http://s3/a", "http://s2/a", AT), "from s2 one fetches already"


def test_a_model_for_which_no_disk_may_ever_have_room_is_refused_until_one_has() -> None:
    """What fills the SSD lies nowhere else: nobody may evict it, so that the request would wait for ever."""
    table = Tiers()
    table.actor.rules = 4
    table.tell(ModelAdded("a", AT))
    own = HeldModel(card("b"), "ssd")
    table.tell(ServerReady("s1", 1000, (HeldModel(card("a"), "remote", AT), own), 79))
    table.worker("gpu/s1/0")
    (refused,) = [to.message for to in table.ask("r1") if isinstance(to.message, PlacementRefused)]
    assert refused.code == "too_large" and "--ssd" in refused.reason
    table.tell(ModelGone("s1", "b"))
    assert starts(table.ask("r2")) == [("gpu/s1/0", "a", ())]


def test_a_request_that_waits_is_refused_when_the_last_disk_turns_out_to_be_taken() -> None:
    table = Tiers()
    table.actor.rules = 4
    table.tell(ModelAdded("a", AT))
    table.tell(ServerReady("s1", 1000, (HeldModel(card("a"), "remote", AT),), 79))
    assert starts(table.ask("r1")) == [], "there is no worker yet"
    said = table.tell(ModelHeld("s1", card("b"), "ssd"))
    assert [to.message.request for to in said if isinstance(to.message, PlacementRefused)] == ["r1"]


def test_the_nearest_tier_is_soonest_and_the_estimate_learns_per_server_and_tier() -> None:
    table = Tiers()
    big = card("a", weight=1000 * MB)
    for name, tier in (("far", "remote"), ("near", "ssd")):
        table.tell(ServerReady(name, 4000 * MB, (HeldModel(big, tier, AT),)))  # type: ignore[arg-type]
        table.worker(f"gpu/{name}/0", memory=2000 * MB, slots=1)
    one = decided(table.ask("r"))
    assert [(c.worker, c.tier, c.load_ns) for c in one.candidates] == [
        ("gpu/near/0", "ssd", SECOND), ("gpu/far/0", "remote", 2 * SECOND)
    ]  # fmt: skip
    assert [c.error_ns for c in one.candidates] == [0, 0]
    # The disk turns out to be slow, and the way from elsewhere fast.
    table.tell(ModelHeld("near", big, "dram", 21 * SECOND, loaded_from="ssd"))
    table.tell(ModelHeld("far", big, "dram", SECOND // 2, loaded_from="remote", source=AT))
    near, far = table.actor.state.servers["near"], table.actor.state.servers["far"]
    assert near.ssd_rate < 800 * MB and far.remote_rate == 875 * MB and far.ssd_rate == 1000 * MB
    assert near.error_ns("ssd") == 5 * SECOND and far.error_ns("remote") == 3 * SECOND // 8


def test_loads_from_elsewhere_queue_at_the_rate_of_their_own_way() -> None:
    table = Tiers()
    held = tuple(HeldModel(card(name, weight=1000 * MB), "remote", f"/{name}") for name in ("a", "b"))
    table.tell(ServerReady("s", 4000 * MB, held))
    table.worker("gpu/s/0", memory=1500 * MB, slots=1)
    table.worker("gpu/s/1", memory=1500 * MB, slots=1)
    table.ask("r1", "a")
    (candidate,) = decided(table.ask("r2", "b")).candidates
    assert (candidate.queue_ns, candidate.load_ns) == (2 * SECOND, 2 * SECOND)


def test_a_copy_of_another_server_is_no_source_for_the_others() -> None:
    table = Tiers()
    table.holds("s", "ssd", address="http://s")
    table.holds("t", None, address="http://t")
    table.tell(ModelHeld("t", card("a"), "dram", 5, loaded_from="remote", source="http://s/a"))
    assert table.actor.state.models["a"].source == ""
    table.tell(ModelHeld("t", card("a"), "dram", source="/elsewhere"))
    assert table.actor.state.models["a"].source == "/elsewhere"


def test_what_was_added_before_any_server_was_there_is_looked_for_when_one_comes() -> None:
    table = Tiers()
    assert table.tell(ModelAdded("a", AT)) == []
    assert table.tell(ServerReady("s", 1000, ())) == [To("store/s", LookForModel("a", AT))]
    table.tell(ModelHeld("s", card("a"), "remote", source=AT))
    assert table.tell(ServerReady("t", 1000, ())) == [], "it is told what to fetch when it starts there"
    assert kinds(table.tell(ModelRemoved("a"))) == ["DropModel"]
    table.tell(ModelGone("s", "a"))
    assert table.tell(ServerReady("s", 1000, ())) == []


def test_every_server_is_told_that_a_model_is_removed() -> None:
    """One that was to fetch it, and did not get it, may have a part of it (from rule version 5 on)."""
    for rules, told in ((4, ["store/s"]), (5, ["store/s", "store/t"])):
        table = Tiers()
        table.actor.rules = rules
        table.holds("s", "ssd", address="http://s")
        table.holds("t", None)
        assert [to.receiver for to in table.tell(ModelRemoved("a"))] == told


def test_models_that_requests_wait_for_are_named_to_be_kept() -> None:
    table = Tiers()
    table.server("s", HeldModel(card("a"), "dram"), HeldModel(card("b")), HeldModel(card("c")))
    table.worker("gpu/s/0", memory=60, slots=1)
    table.ask("r1", "b")
    table.ask("r2", "a")
    table.ask("r3", "c")
    table.ready("b", "gpu/s/0")
    said = table.release("r1", "b")
    assert ("gpu/s/0", "a", ("b",)) in starts(said)
    table.worker("gpu/s/1", memory=60, slots=1)
    said = table.tell(InstanceStopped("gpu/s/0", "b"))
    told = [to.message for to in said if isinstance(to.message, StartInstance) and to.message.model == "c"]
    assert all("c" not in one.keep for one in told)


# ---- what is given up -----------------------------------------------------------------------------------------


def test_a_start_for_one_request_is_given_up_with_it_and_not_for_two() -> None:
    table = Tiers()
    table.holds("s", "ssd")
    table.ask("r1")
    table.ask("r2")
    assert "AbandonStart" not in kinds(table.release("r1"))
    assert [to for to in table.release("r2") if isinstance(to.message, AbandonStart)] == [
        To("gpu/s/0", AbandonStart("a"))
    ]
    table.ask("r3")
    said = table.tell(InstanceStopped("gpu/s/0", "a"))
    assert starts(said) == [("gpu/s/0", "a", ())], "who came meanwhile is not forgotten"


def test_older_rules_give_nothing_up() -> None:
    table = Tiers()
    table.actor.rules = 2
    table.holds("s", "ssd")
    table.ask("r1")
    assert kinds(table.release("r1")) == []


class Cell:
    """Placement, one store and one worker of one server, and drivers whose answers come when the test says so."""

    def __init__(self, tier: Tier) -> None:
        self.table = Tiers()
        self.actors: dict[str, Any] = {
            "placement": self.table.actor,
            "store/s": Store("store/s"),
            "gpu/s/0": Gpu("gpu/s/0"),
        }
        for actor in self.actors.values():
            actor.rules = 3
        self.effects: list[Message] = []
        self.placed: dict[str, bool] = {}
        self.time = 0
        self.say("store/s", StoreStarted("s", 100, (HeldModel(card("a"), tier, AT),), sequence=1, ssd_bytes=50))
        memory = 40 + kv_plan(card("a"), 1000, 1)[1]
        self.say("gpu/s/0", WorkerStarted("s", 0, memory, 1, sequence=2))

    def say(self, receiver: str, message: Message) -> None:
        self.time += SECOND
        queue = [To(receiver, message)]
        while queue:
            to = queue.pop(0)
            if to.receiver in self.actors:
                queue += self.actors[to.receiver].handle(to.message, self.time)
            elif to.receiver.startswith("driver/"):
                self.effects.append(to.message)
            elif isinstance(to.message, RequestPlaced):
                self.placed[to.message.request] = True

    def answer(self, number: int, fails: bool) -> None:
        """One of the effects that are under way; a load that is to be given up fails so, unless it was quicker."""
        effect = self.effects.pop(number)
        cancelled = any(isinstance(one, CancelLoad) for one in self.effects)
        match effect:
            case LoadModel(model=model, sources=sources) if fails:
                self.say("store/s", LoadFailed(model, "x", cancelled=cancelled))
            case LoadModel(model=model, sources=sources):
                self.say("store/s", ModelLoaded(model, 40, 10, "remote" if sources else "ssd"))
            case CancelLoad(model=model):
                loads = [one for one in self.effects if isinstance(one, LoadModel)]
                self.say("store/s", LoadCancelTaken(model, bool(loads)))
                if loads and fails:
                    self.effects.remove(loads[0])
                    self.say("store/s", LoadFailed(model, "given up", cancelled=True))
            case AttachModel(model=model):
                self.say("gpu/s/0", ModelAttached(model, 1, 5))
            case _:
                assert not isinstance(effect, EvictModel), "there is room for one"


def test_the_load_of_a_request_that_is_cancelled_is_broken_off_in_the_same_step() -> None:
    cell = Cell("remote")
    cell.say("placement", PlaceRequest("r", 1, "a", 1))
    assert [type(one).__name__ for one in cell.effects] == ["LoadModel"]
    cell.say("placement", SlotReleased("r", 1, "a"))
    assert [type(one).__name__ for one in cell.effects] == ["LoadModel", "CancelLoad"]
    assert not cell.actors["gpu/s/0"].state.instances


def test_what_is_being_attached_becomes_an_idle_instance() -> None:
    cell = Cell("ssd")
    cell.say("placement", PlaceRequest("r", 1, "a", 1))
    cell.answer(0, fails=False)
    cell.say("placement", SlotReleased("r", 1, "a"))
    assert [type(one).__name__ for one in cell.effects] == ["AttachModel"]
    cell.answer(0, fails=False)
    cell.say("placement", PlaceRequest("q", 1, "a", 2))
    assert cell.placed == {"q": True} and not cell.effects


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["ssd", "remote"]),
    st.lists(st.tuples(st.sampled_from(["ask", "cancel", "answer", "fail"]), st.integers(0, 3)), max_size=30),
)
def test_requests_that_come_and_go_while_their_model_loads(tier: Tier, steps: list[tuple[str, int]]) -> None:
    """On every interleaving: nothing stays reserved for nobody, and whoever is still there gets a slot."""
    cell = Cell(tier)
    asked: dict[str, bool] = {}
    for number, (what, which) in enumerate(steps):
        if what == "ask":
            asked[f"r{number}"] = True
            cell.say("placement", PlaceRequest(f"r{number}", 1, "a", number + 1))
        elif what == "cancel" and asked:
            request = list(asked)[which % len(asked)]
            del asked[request]
            cell.placed.pop(request, None)
            cell.say("placement", SlotReleased(request, 1, "a"))
        elif cell.effects and what in ("answer", "fail"):
            cell.answer(which % len(cell.effects), what == "fail")
    for _ in range(200):
        if cell.effects:
            cell.answer(0, False)
        elif waiting := next((one for one in asked if one in cell.placed), None):
            del asked[waiting]
            cell.say("placement", SlotReleased(waiting, 1, "a"))
        else:
            break
    state, store, gpu = (cell.actors[name].state for name in ("placement", "store/s", "gpu/s/0"))
    assert not asked and not state.queues and not state.placed, "whoever was still there got a slot"
    assert not state.servers["s"].loading and not state.servers["s"].fetching
    instances = list(gpu.instances)
    assert instances == list(state.workers["gpu/s/0"].instances)
    (model,) = store.models.values()
    assert list(model.leases) == ["gpu/s/0"] * len(instances) and not model.waiting and not model.loading
