"""Budgets of a store under rule version 3 on every interleaving, what goes for room, and what must not be lost."""

from __future__ import annotations

from typing import Any

import pytest
from cell_bench import SECOND, card
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.store import Store
from bus.messages import (
    CancelLoad,
    DriverLost,
    DropModel,
    EvictModel,
    HeldModel,
    LeaseGranted,
    LeaseModel,
    LeaseRefused,
    LeaseReturned,
    LoadCancelTaken,
    LoadFailed,
    LoadModel,
    Message,
    ModelFound,
    ModelGone,
    ModelHeld,
    ModelLoaded,
    ModelMissing,
    StoreStarted,
    Tier,
    To,
)

W0, W1 = "gpu/s/0", "gpu/s/1"
AT = "/models/a"


def held(model: str, tier: Tier = "ssd", weight: int = 40, source: str = "") -> HeldModel:
    return HeldModel(card(model, weight=weight), tier, source)


def make(*models: HeldModel, dram: int = 100, ssd: int = 0, rules: int = 3) -> Store:
    store = Store("store/s")
    store.rules = rules
    store.handle(StoreStarted("s", dram, models, sequence=5, ssd_bytes=ssd, address="http://s:1"), 0)
    return store


def lease(store: Store, model: str, worker: str = W0, now: int = 1, **fields: Any) -> list[To]:
    return store.handle(LeaseModel(worker, model, **fields), now)


def use(store: Store, model: str, now: int, weight: int = 40) -> list[To]:
    """A lease from beginning to end; what was evicted for it."""
    said = lease(store, model, now=now)
    if any(isinstance(to.message, LoadModel) for to in said):
        store.handle(ModelLoaded(model, weight, weight), now)
    store.handle(LeaseReturned(W0, model), now)
    return said


def kinds(said: list[To]) -> list[str]:
    return [type(to.message).__name__ for to in said]


def messages(said: list[To], kind: type[Message]) -> list[Any]:
    return [to.message for to in said if isinstance(to.message, kind)]


# ---- where models come from -----------------------------------------------------------------------------------


def test_a_model_that_another_server_holds_is_fetched_without_having_been_looked_for() -> None:
    store = make(ssd=100)
    (load,) = messages(lease(store, "a", sources=("http://t:1/a",), card=card("a")), LoadModel)
    assert load.sources == ("http://t:1/a",)
    failed = store.handle(LoadFailed("a", "connection refused"), 2)
    assert kinds(failed) == ["LeaseRefused", "FindModel", "ModelGone"] and "a" not in store.state.models
    assert kinds(store.handle(ModelFound(card("a")), 3)) == ["ModelHeld"], "it had come as far as the disk"


# ---- the disk -------------------------------------------------------------------------------------------------


def test_the_disk_makes_room_by_what_can_be_had_again() -> None:
    store = make(held("own"), held("a", source=AT), held("b", "remote", source="/b"), ssd=90)
    said = lease(store, "b")
    (evict,) = messages(said, EvictModel)
    assert (evict.model, evict.tier) == ("a", "ssd") and "makes room for b: " in evict.reason
    assert messages(said, ModelHeld) == [ModelHeld("s", card("a"), "remote", source=AT)]
    assert messages(said, LoadModel) == [LoadModel("b", "d-b", ("/b",))]
    (full,) = messages(lease(store, "a", W1), LeaseRefused)
    assert full.retry and "nothing on the SSD of s may go" in full.reason


def test_a_model_larger_than_the_disk_is_refused_for_good() -> None:
    store = make(held("a", "remote", 50, AT), ssd=49)
    (refused,) = messages(lease(store, "a"), LeaseRefused)
    assert refused == LeaseRefused("a", "a needs 50 bytes of SSD, the budget of s is 49")


def test_what_is_too_much_at_the_start_goes_as_far_as_it_may() -> None:
    store = Store("store/s")
    store.rules = 3
    started = StoreStarted("s", 100, (held("own"), held("a", source=AT)), sequence=5, ssd_bytes=30)
    assert [one.model for one in messages(store.handle(started, 0), EvictModel)] == ["a"]


def test_damaged_files_with_a_source_are_fetched_again() -> None:
    store = make(held("a", source=AT))
    lease(store, "a")
    said = store.handle(LoadFailed("a", "chunk 3 is damaged", gone=True), 2)
    assert kinds(said) == ["LeaseRefused", "EvictModel", "ModelHeld"]
    assert messages(lease(store, "a"), LoadModel)[0].sources == (AT,)


def test_a_source_that_does_not_answer_now_may_later_and_a_removed_model_is_gone_at_once() -> None:
    store = make(held("a", "remote", source=AT))
    assert store.handle(ModelMissing("a", "no answer"), 2) == [] and "a" in store.state.models
    assert kinds(store.handle(DropModel("a"), 3)) == ["DeleteModel", "ModelGone"]
    assert store.handle(ModelMissing("a", "not here"), 4) == [] and not store.state.models


@pytest.mark.parametrize("rules", [4, 5])
@pytest.mark.parametrize("first", ["it fails", "it is removed"])
def test_what_broke_off_of_a_model_that_only_others_have_goes_with_it(first: str, rules: int) -> None:
    store = make()
    store.rules = rules
    lease(store, "a", sources=("http://t:1/a",), card=card("a", weight=40))
    fails, goes = LoadFailed("a", "nobody answers"), DropModel("a")
    said = [
        to for message in ((fails, goes) if first == "it fails" else (goes, fails)) for to in store.handle(message, 2)
    ]
    evicted = [EvictModel("a", "the model is being removed", "remote")]
    assert messages(said, EvictModel) == (evicted if rules >= 5 else [])
    assert messages(said, ModelGone) == [ModelGone("s", "a")] and not store.state.models
    store.handle(DriverLost("store/s", 5, "silent"), 3)
    assert store.handle(DropModel("a"), 4) == []


def test_a_copy_of_another_server_does_not_replace_where_an_operator_said_it_is() -> None:
    """Else two servers may take each other for the source, and both let it go."""
    store = make(held("a", "remote", source=AT))
    lease(store, "a", sources=("http://t:1/a", AT))
    store.handle(ModelLoaded("a", 40, 7, "remote", "http://t:1/a"), 2)
    assert store.state.models["a"].source == AT


# ---- value ----------------------------------------------------------------------------------------------------


def test_a_model_that_requests_wait_for_goes_last() -> None:
    store = make(held("a", "dram"), held("b", "dram"), held("c"), dram=80)
    use(store, "b", 2 * SECOND)
    assert [one.model for one in messages(lease(store, "c", now=3 * SECOND, keep=("a",)), EvictModel)] == ["b"]


def test_nothing_is_evicted_from_the_disk_in_vain() -> None:
    store = make(held("a", "dram", 60), held("b", source="/b"), held("c", "remote", 50, "/c"), dram=100, ssd=120)
    lease(store, "a")
    assert kinds(lease(store, "c", W1)) == ["LeaseRefused"] and store.state.models["b"].tier == "ssd"


def test_nothing_is_evicted_in_vain() -> None:
    store = make(held("a", "dram"), held("b", "dram"), held("c", weight=90), dram=100)
    lease(store, "a")
    assert kinds(lease(store, "c", W1)) == ["LeaseRefused"] and store.state.models["b"].tier == "dram"


# ---- loads that are given up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["ssd", "remote"])
def test_the_last_who_waits_gives_up_the_load(tier: Tier) -> None:
    store = make(held("a", tier, source=AT), ssd=100)
    lease(store, "a")
    lease(store, "a", W1)
    assert store.handle(LeaseReturned(W1, "a", abandoned=True), 2) == []
    (cancel,) = messages(store.handle(LeaseReturned(W0, "a", abandoned=True), 3), CancelLoad)
    assert cancel == CancelLoad("a", "nobody waits for it any more")
    assert (
        store.handle(LeaseReturned(W0, "a", abandoned=True), 3) == []
        and store.handle(LoadCancelTaken("a", True), 4) == []
    )
    said = store.handle(LoadFailed("a", "given up", cancelled=True), 5)
    assert messages(said, ModelHeld) == [ModelHeld("s", card("a"), tier, source=AT)]
    assert not store.state.dram_used() and store.state.ssd_used() == (40 if tier == "ssd" else 0)


def test_what_was_loaded_before_it_could_be_given_up_stays_in_dram_for_nobody() -> None:
    store = make(held("a"))
    lease(store, "a")
    store.handle(LeaseReturned(W0, "a", abandoned=True), 2)
    assert kinds(store.handle(ModelLoaded("a", 40, 1), 5)) == ["ModelHeld"]
    assert kinds(lease(store, "a")) == ["LeaseGranted"]


# ---- whatever happens -----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 1)), max_size=60))
def test_budgets_hold_and_everybody_is_answered_on_every_interleaving(steps: list[tuple[int, int, int]]) -> None:
    """A driver that obeys in order; its answers, leases, returns and restarts come in any order."""
    weights = {"m0": 40, "m1": 60, "m2": 30, "m3": 50, "m4": 20}
    own = {"m0": True}
    store = make(held("m0"), *(held(n, "remote", w, f"/{n}") for n, w in weights.items() if n != "m0"), ssd=130)
    disk, loads = dict(own), list[str]()
    asked: dict[tuple[str, str], str] = {}
    time, epoch = 1, 5

    def take(said: list[To]) -> None:
        for to in said:
            match to.message:
                case LoadModel(model=model):
                    assert model not in loads
                    loads.append(model)
                case EvictModel(model=model, tier="ssd"):
                    assert model not in own and model not in loads
                    disk.pop(model, None)
                case LeaseGranted(model=model) | LeaseRefused(model=model):
                    if asked.get((to.receiver, model)) == "asked":
                        granted = isinstance(to.message, LeaseGranted)
                        asked[to.receiver, model] = "granted" if granted else "refused"
                case CancelLoad(model=model):
                    assert model in loads and not any(k[1] == model and v == "asked" for k, v in asked.items())
        assert store.state.dram_used() <= 100 and store.state.ssd_used() <= 130
        assert sum(weights[name] for name in {**disk, **dict.fromkeys(loads)}) <= 130

    def end(model: str, failed: bool) -> list[To]:
        loads.remove(model)
        state = store.state.models[model]
        if failed:
            return store.handle(LoadFailed(model, "given up", cancelled=state.cancelling), time)
        disk[model] = True
        return store.handle(ModelLoaded(model, weights[model], 10, state.tier), time)

    for what, number, worker in steps:
        time += SECOND
        name, who = f"m{number}", (W0, W1)[worker]
        if what <= 1 and asked.get((who, name)) not in ("asked", "granted"):
            asked[who, name] = "asked"
            take(lease(store, name, who, time))
        elif what == 2 and asked.pop((who, name), None):
            take(store.handle(LeaseReturned(who, name, abandoned=True), time))
        elif what in (3, 4) and loads:
            take(end(loads[number % len(loads)], what == 4))
        elif what == 5 and number == 0:
            loads.clear()
            epoch += 1
            found = tuple(held(n, "ssd", weights[n], "" if n in own else f"/{n}") for n in disk)
            take(store.handle(StoreStarted("s", 100, found, sequence=epoch, ssd_bytes=130), time))
    while loads:
        take(end(loads[0], False))
    assert "asked" not in asked.values()
    granted = {key for key, how in asked.items() if how == "granted"}
    assert granted == {(who, name) for name, model in store.state.models.items() for who in model.leases}
