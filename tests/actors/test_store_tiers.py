"""Remote, SSD and DRAM of one server as its deciding half sees them: fetching, two budgets, value, breaking off."""

from __future__ import annotations

import random

import pytest
from cell_bench import card

from actors.store import Store
from actors.store_room import Evictable, choose, evictable
from bus.messages import (
    CancelLoad,
    EvictModel,
    HeldModel,
    LeaseGranted,
    LeaseModel,
    LeaseRefused,
    LeaseReturned,
    LoadFailed,
    LoadModel,
    Message,
    ModelFound,
    ModelGone,
    ModelHeld,
    ModelLoaded,
    ServerReady,
    StoreStarted,
    To,
)

W0, W1 = "gpu/s/0", "gpu/s/1"
SECOND = 1_000_000_000
FAR = "http://far/m"


def make(*models: HeldModel, dram: int = 100, ssd: int = 0, rules: int = 3) -> Store:
    store = Store("store/s")
    store.rules = rules
    store.handle(StoreStarted("s", dram, models, sequence=5, ssd_bytes=ssd), 0)
    return store


def effects(said: list[To]) -> list[Message]:
    return [to.message for to in said if to.receiver == "driver/store/s"]


def use(store: Store, model: str, now: int, **fields: object) -> list[Message]:
    """A worker needs it, gets it, and needs it no longer."""
    said = effects(store.handle(LeaseModel(W0, model, **fields), now))  # type: ignore[arg-type]
    for message in said:
        if isinstance(message, LoadModel):
            tier, source = ("remote", message.sources[0]) if message.sources else ("ssd", "")
            size = store.state.models[message.model].card.weight_bytes
            store.handle(ModelLoaded(message.model, size, size * SECOND // 100, tier, source), now)  # type: ignore[arg-type]
    store.handle(LeaseReturned(W0, model), now)
    return said


def test_a_model_that_lies_elsewhere_is_fetched_all_the_way() -> None:
    store = make()
    said = store.handle(LeaseModel(W0, "m", ("http://peer/m", FAR), card=card("m")), 1)
    assert said == [To("driver/store/s", LoadModel("m", "d-m", ("http://peer/m", FAR)))]
    assert store.handle(ModelLoaded("m", 40, 7, "remote", FAR), 2) == [
        To("placement", ModelHeld("s", card("m"), "dram", 7, "remote", FAR)),
        To(W0, LeaseGranted("m", "d-m", "remote")),
    ]
    assert store.state.models["m"].source == FAR
    found = make()
    assert found.handle(ModelFound(card("m"), "remote", FAR), 1) == [
        To("placement", ModelHeld("s", card("m"), "remote", source=FAR))
    ]
    assert effects(found.handle(LeaseModel(W0, "m"), 2)) == [LoadModel("m", "d-m", (FAR,))]


def test_nobody_has_it() -> None:
    store = make()
    (refused,) = store.handle(LeaseModel(W0, "m"), 1)
    assert isinstance(refused.message, LeaseRefused) and refused.message.retry


def test_what_can_be_fetched_again_is_known_after_a_restart() -> None:
    store = make(HeldModel(card("a"), "ssd", FAR), HeldModel(card("b")))
    (ready, *_) = store.handle(StoreStarted("s", 100, (), sequence=9), 5)
    assert ready.message == ServerReady("s", 100, (HeldModel(card("a"), "remote", FAR),))


def test_the_budget_of_the_ssd_holds_and_only_what_can_be_had_again_goes() -> None:
    store = make(HeldModel(card("own")), HeldModel(card("far"), "ssd", FAR), ssd=100)
    said = effects(store.handle(LeaseModel(W0, "m", (FAR,), card=card("m")), SECOND))
    assert [type(one) for one in said] == [EvictModel, LoadModel]
    assert isinstance(said[0], EvictModel) and (said[0].model, said[0].tier) == ("far", "ssd")
    assert said[0].reason.startswith("makes room for m: ")
    assert store.state.models["far"].tier == "remote"
    (refused,) = store.handle(LeaseModel(W1, "far"), 2 * SECOND)
    assert isinstance(refused.message, LeaseRefused) and "SSD" in refused.message.reason
    alone = make(ssd=30)
    refused, gone = alone.handle(LeaseModel(W0, "m", (FAR,), card=card("m")), 1)
    assert gone.message == ModelGone("s", "m"), "nothing is left of what was never held"
    assert isinstance(refused.message, LeaseRefused) and "the budget of s is 30" in refused.message.reason


def test_a_load_that_nobody_waits_for_is_broken_off() -> None:
    store = make(HeldModel(card("a")))
    store.handle(LeaseModel(W0, "a"), 1)
    store.handle(LeaseModel(W1, "a"), 1)
    assert store.handle(LeaseReturned(W0, "a", abandoned=True), 2) == [], "another one waits for it"
    assert effects(store.handle(LeaseReturned(W1, "a", abandoned=True), 3)) == [
        CancelLoad("a", "nobody waits for it any more")
    ]
    assert store.handle(LoadFailed("a", "broken off", cancelled=True), 4) == [
        To("placement", ModelHeld("s", card("a"), "ssd"))
    ]
    assert not store.state.models["a"].loading


def test_who_wants_it_again_before_it_is_broken_off_gets_it() -> None:
    store = make(HeldModel(card("a")))
    store.handle(LeaseModel(W0, "a"), 1)
    store.handle(LeaseReturned(W0, "a", abandoned=True), 2)
    assert store.handle(LeaseModel(W1, "a"), 3) == []
    assert effects(store.handle(LoadFailed("a", "broken off", cancelled=True), 4)) == [LoadModel("a", "d-a")]
    late = make(HeldModel(card("a")))
    late.handle(LeaseModel(W0, "a"), 1)
    late.handle(LeaseReturned(W0, "a", abandoned=True), 2)
    late.handle(LeaseModel(W1, "a"), 3)
    assert To(W1, LeaseGranted("a", "d-a", "ssd")) in late.handle(ModelLoaded("a", 40, 7), 4)


def test_the_one_wanted_soonest_stays_though_it_was_used_before() -> None:
    store = make(HeldModel(card("often")), HeldModel(card("once")), HeldModel(card("new")), dram=80)
    for at in range(1, 10):
        use(store, "often", at * SECOND)
    use(store, "once", 10 * SECOND)
    evict, _ = use(store, "new", 11 * SECOND)
    assert isinstance(evict, EvictModel) and evict.model == "once"
    assert "kept often: " in evict.reason
    old = make(HeldModel(card("often")), HeldModel(card("once")), HeldModel(card("new")), dram=80, rules=2)
    for at in range(1, 10):
        use(old, "often", at * SECOND)
    use(old, "once", 10 * SECOND)
    evict, _ = use(old, "new", 11 * SECOND)
    assert isinstance(evict, EvictModel) and evict.model == "often", "the least recently used"


@pytest.mark.parametrize("seed", range(5))
def test_value_brings_fewer_bytes_back_than_least_recently_used(seed: int) -> None:
    """Two models wanted often among many wanted once in a while, as bursts go."""

    def brought(rules: int) -> int:
        rng = random.Random(seed)
        names = [f"rare-{number}" for number in range(20)]
        store = make(*(HeldModel(card(name)) for name in ("hot-0", "hot-1", *names)), dram=160, rules=rules)
        total, now = 0, 0
        for _ in range(600):
            now += rng.randrange(1, 2 * SECOND)
            name = f"hot-{rng.randrange(2)}" if rng.random() < 0.4 else rng.choice(names)
            total += sum(isinstance(one, LoadModel) for one in use(store, name, now))
        return total

    by_value, by_recency = brought(3), brought(2)
    assert by_value < 0.9 * by_recency, (by_value, by_recency)


def test_several_small_ones_go_where_that_costs_less_than_a_large_one() -> None:
    large = Evictable("large", 100, 100 * SECOND, SECOND)
    small = [Evictable(f"small-{number}", 50, SECOND, SECOND) for number in range(3)]
    assert [one.name for one in choose([large, *small], 100) or []] == ["small-0", "small-1"]
    cheap = Evictable("cheap", 1000, SECOND, 100 * SECOND)
    assert choose([large, *small, cheap], 60) == [cheap]
    assert choose([large], 101) is None
    assert evictable("x", 50, 100, 0, 700 * SECOND).wait_ns == 700 * SECOND
