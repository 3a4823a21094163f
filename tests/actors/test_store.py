"""The deciding half of a server's storage tiers: leases, budget, eviction, replacement, removal, loss and return."""

from __future__ import annotations

import pytest
from cell_bench import card

from actors.actor import Unexpected
from actors.store import Store
from bus.messages import (
    DeleteModel,
    DriverLost,
    DropModel,
    EvictModel,
    FindModel,
    HeldModel,
    LeaseGranted,
    LeaseModel,
    LeaseRefused,
    LeaseReturned,
    LoadFailed,
    LoadModel,
    LookForModel,
    Message,
    ModelDeleted,
    ModelEvicted,
    ModelFound,
    ModelGone,
    ModelHeld,
    ModelLoaded,
    ModelMissing,
    ModelReplaced,
    ServerGone,
    ServerReady,
    StoreStarted,
    To,
)

W0, W1 = "gpu/s/0", "gpu/s/1"


def driver(message: Message) -> To:
    return To("driver/store/s", message)


def placement(message: Message) -> To:
    return To("placement", message)


def granted(worker: str, model: str, tier: str = "dram", digest: str = "") -> To:
    return To(worker, LeaseGranted(model, digest or f"d-{model}", tier))  # type: ignore[arg-type]


def held(model: str, tier: str = "ssd", **changes: int) -> HeldModel:
    return HeldModel(card(model, **changes), tier)  # type: ignore[arg-type]


def make(*models: HeldModel, dram: int = 100) -> Store:
    store = Store("store/s")
    store.handle(StoreStarted("s", dram, models, sequence=5), 0)
    return store


def lease(store: Store, worker: str, model: str, now: int = 1) -> list[To]:
    return store.handle(LeaseModel(worker, model), now)


def test_a_start_says_what_is_held() -> None:
    store = Store("store/s")
    models = (held("a"), held("b", "dram"))
    assert store.handle(StoreStarted("s", 100, models, sequence=5), 0) == [placement(ServerReady("s", 100, models))]
    with pytest.raises(Unexpected):
        store.handle(StoreStarted("t", 100), 0)


def test_what_was_found_beyond_the_budget_is_evicted() -> None:
    models = (held("a", "dram"), held("b", "dram"), held("c", "dram"))
    why = "the DRAM budget is smaller than what was found there"
    assert Store("store/s").handle(StoreStarted("s", 90, models, sequence=1), 0) == [
        placement(ServerReady("s", 90, models)),
        driver(EvictModel("a", why)),
        placement(ModelHeld("s", card("a"), "ssd")),
    ]


def test_a_lease_from_dram_is_granted_and_one_from_ssd_waits_for_the_load() -> None:
    store = make(held("a", "dram"), held("b"))
    assert lease(store, W0, "a") == [granted(W0, "a")]
    assert lease(store, W0, "b") == [driver(LoadModel("b", "d-b"))]
    assert lease(store, W1, "b") == [], "one load for both"
    assert store.handle(ModelLoaded("b", 40, 7), 2) == [
        placement(ModelHeld("s", card("b"), "dram", 7)),
        granted(W0, "b", "ssd"),
        granted(W1, "b", "ssd"),
    ]


def test_room_is_made_by_the_least_recently_used_without_a_lease() -> None:
    store = make(held("a", "dram"), held("b", "dram"), held("c"), dram=80)
    lease(store, W0, "a", now=1)
    lease(store, W0, "b", now=2)
    store.handle(LeaseReturned(W0, "b"), 3)
    assert lease(store, W0, "c") == [
        driver(EvictModel("b", "least recently used, makes room for c")),
        placement(ModelHeld("s", card("b"), "ssd")),
        driver(LoadModel("c", "d-c")),
    ]
    assert store.handle(ModelEvicted("b"), 4) == []
    store.handle(LeaseReturned(W0, "a"), 5)
    assert lease(store, W0, "b")[0] == driver(EvictModel("a", "least recently used, makes room for b"))


def test_the_least_recent_goes_first() -> None:
    store = make(held("a", "dram"), held("b", "dram"), held("c"), dram=80)
    for now, model in ((1, "b"), (2, "a")):
        lease(store, W0, model, now)
        store.handle(LeaseReturned(W0, model), now)
    assert lease(store, W1, "c")[0] == driver(EvictModel("b", "least recently used, makes room for c"))


def test_what_finds_no_room_is_refused() -> None:
    store = make(held("a", "dram"), held("b"), held("c", weight=101), dram=70)
    lease(store, W0, "a")
    (full,) = lease(store, W1, "b")
    assert isinstance(full.message, LeaseRefused) and full.message.retry and "is in use" in full.message.reason
    (large,) = lease(store, W1, "c")
    assert isinstance(large.message, LeaseRefused) and not large.message.retry and "101 bytes" in large.message.reason
    (unknown,) = lease(store, W1, "x")
    assert isinstance(unknown.message, LeaseRefused) and "does not hold x" in unknown.message.reason


def test_a_load_under_way_is_not_evicted_and_counts() -> None:
    store = make(held("a"), held("b"), dram=70)
    lease(store, W0, "a")
    store.handle(LeaseReturned(W0, "a"), 2)
    (full,) = lease(store, W1, "b")
    assert isinstance(full.message, LeaseRefused) and full.message.retry
    assert store.handle(ModelLoaded("a", 40, 1), 3) == [placement(ModelHeld("s", card("a"), "dram", 1))]
    assert [type(to.message) for to in lease(store, W1, "b")] == [EvictModel, ModelHeld, LoadModel]


@pytest.mark.parametrize("gone", [False, True])
def test_a_failed_load_refuses_who_waits_and_tells_placement(gone: bool) -> None:
    store = make(held("a"))
    lease(store, W0, "a")
    lease(store, W1, "a")
    told = ModelGone("s", "a") if gone else ModelHeld("s", card("a"), "ssd")
    assert store.handle(LoadFailed("a", "bad block", gone), 2) == [
        To(W0, LeaseRefused("a", "bad block", retry=True)),
        To(W1, LeaseRefused("a", "bad block", retry=True)),
        placement(told),
    ]
    assert ("a" in store.state.models) is not gone


def test_a_lost_driver_refuses_who_waits_keeps_leases_and_grants_nothing() -> None:
    store = make(held("a", "dram"), held("b"))
    lease(store, W0, "a")
    lease(store, W1, "b")
    assert store.handle(DriverLost("store/s", 4, "x"), 2) == []
    assert store.handle(DriverLost("store/s", 5, "x"), 2) == [
        placement(ServerGone("s")),
        To(W1, LeaseRefused("b", "the storage driver of s is lost", retry=True)),
    ]
    assert store.handle(DriverLost("store/s", 5, "x"), 2) == []
    (refused,) = lease(store, W1, "a")
    assert isinstance(refused.message, LeaseRefused) and refused.message.retry
    assert store.handle(LookForModel("a"), 2) == [] and store.handle(DropModel("b"), 2) == []
    again = store.handle(StoreStarted("s", 100, (held("a"), held("b")), sequence=9), 3)
    assert again == [
        placement(ServerReady("s", 100, (held("a", "dram"), held("b")))),
        driver(DeleteModel("b", "d-b")),
        placement(ModelGone("s", "b")),
    ], "the leased one is in DRAM still, the dropped one is deleted now"
    assert store.state.models["a"].leases == {W0: True}


def test_a_lost_epoch_that_never_came_to_be_ends_the_one_before() -> None:
    assert make().handle(DriverLost("store/s", 6, "x"), 2) == [placement(ServerGone("s"))]


def test_a_restart_refuses_who_waits() -> None:
    store = make(held("a"), held("b"))
    lease(store, W0, "a")
    lease(store, W1, "b")
    said = store.handle(StoreStarted("s", 100, (held("a"),), sequence=9), 3)
    assert said == [
        To(W0, LeaseRefused("a", "the storage driver restarted", retry=True)),
        To(W1, LeaseRefused("b", "server s no longer holds b", retry=True)),
        placement(ServerReady("s", 100, (held("a"),))),
    ]
    store = make(held("a"))
    lease(store, W0, "a")
    newer = HeldModel(card("a", digest="new"))
    assert store.handle(StoreStarted("s", 100, (newer,), sequence=9), 3)[0].message == LeaseRefused(
        "a", "the model was replaced", retry=True
    )


def test_looking_for_models() -> None:
    store = make()
    assert store.handle(LookForModel("a"), 1) == [driver(FindModel("a"))]
    assert store.handle(ModelFound(card("a")), 1) == [placement(ModelHeld("s", card("a"), "ssd"))]
    assert store.handle(ModelFound(card("a")), 1) == [placement(ModelHeld("s", card("a"), "ssd"))]
    assert store.handle(ModelMissing("b", "x"), 1) == []
    assert store.handle(ModelMissing("a", "x"), 1) == [placement(ModelGone("s", "a"))]


def test_a_model_that_loads_or_is_leased_is_not_missing() -> None:
    """Found in review: `missing` during a load forgot the model, and the load's own answer raised."""
    store = make(held("a"), held("b", "dram"))
    lease(store, W0, "a")
    lease(store, W0, "b")
    assert store.handle(ModelMissing("a", "x"), 2) == [] and store.handle(ModelMissing("b", "x"), 2) == []
    assert store.handle(LoadFailed("a", "x", True), 3)[-1] == placement(ModelGone("s", "a"))


def test_a_replaced_model_is_served_as_it_was_until_nobody_uses_it() -> None:
    """Found in review: new leases were granted under the new digest on the old bytes."""
    store = make(held("a", "dram"))
    lease(store, W0, "a")
    new = card("a", weight=50, digest="new")
    assert store.handle(ModelFound(new), 2) == [placement(ModelReplaced("s", "a"))]
    assert lease(store, W1, "a") == [granted(W1, "a")]
    assert store.handle(LeaseReturned(W0, "a"), 3) == []
    assert store.handle(LeaseReturned(W1, "a"), 3) == [
        driver(EvictModel("a", "the model was replaced")),
        placement(ModelHeld("s", card("a"), "ssd")),
        placement(ModelHeld("s", new, "ssd")),
    ]
    assert lease(store, W0, "a") == [driver(LoadModel("a", "new"))]


def test_dropping_waits_for_leases_and_loads() -> None:
    store = make(held("a", "dram"), held("b"))
    lease(store, W0, "a")
    lease(store, W0, "b")
    assert store.handle(DropModel("a"), 2) == [] and store.handle(DropModel("b"), 2) == []
    assert store.handle(DropModel("x"), 2) == []
    (refused,) = lease(store, W1, "a")
    assert isinstance(refused.message, LeaseRefused)
    assert store.handle(LeaseReturned(W0, "a"), 3) == [
        driver(EvictModel("a", "the model is being removed")),
        placement(ModelHeld("s", card("a"), "ssd")),
        driver(DeleteModel("a", "d-a")),
        placement(ModelGone("s", "a")),
    ]
    assert store.handle(LeaseReturned(W0, "a"), 3) == [], "it is deleted once"
    assert store.handle(ModelDeleted("a"), 4) == [] and store.handle(LeaseReturned(W0, "a"), 4) == []
    store.handle(ModelLoaded("b", 40, 1), 5)
    assert store.handle(LeaseReturned(W0, "b"), 5)[-2] == driver(DeleteModel("b", "d-b"))
    assert store.handle(ModelMissing("b", "gone already"), 6) == [] and not store.state.models


def test_a_model_added_again_is_kept_and_one_being_deleted_comes_back_after_it() -> None:
    """Found in review: an old look's answer undid a removal, and a lease during the deletion was never answered."""
    store = make(held("a", "dram"))
    lease(store, W0, "a")
    store.handle(DropModel("a"), 2)
    store.handle(ModelFound(card("a")), 2)
    assert store.state.models["a"].dropping, "only who adds the model again undoes its removal"
    store.handle(LookForModel("a"), 2)
    assert store.handle(LeaseReturned(W0, "a"), 3) == []
    assert store.handle(DropModel("a"), 4)[-2] == driver(DeleteModel("a", "d-a"))
    assert store.handle(LookForModel("a"), 5) == [driver(FindModel("a"))]
    (refused,) = lease(store, W0, "a")
    assert isinstance(refused.message, LeaseRefused)
    assert store.handle(ModelFound(card("a", digest="new")), 6) == []
    assert store.handle(ModelDeleted("a"), 7) == [driver(FindModel("a"))], "found before or after? look again"
    found = store.handle(ModelFound(card("a", digest="new")), 8)
    assert found == [placement(ModelHeld("s", card("a", digest="new"), "ssd"))]


def test_a_lease_returned_before_it_was_granted_tells_placement_that_nothing_comes() -> None:
    """Found by a world: a worker died between a refused lease and its second try; its load was counted for ever."""
    store = make(held("a", "dram"), held("b"), dram=40)
    lease(store, W0, "a")
    (refused,) = lease(store, W0, "b")
    assert isinstance(refused.message, LeaseRefused)
    assert store.handle(LeaseReturned(W0, "b"), 2) == [placement(ModelHeld("s", card("b"), "ssd"))]
    assert store.handle(LeaseReturned(W0, "a"), 2) == []
