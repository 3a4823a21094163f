"""A model that an operator wants in DRAM before requests come: where it is brought, by which rules, what is said."""

from __future__ import annotations

from typing import Any

import pytest
from test_placement_tiers import Tiers
from world import card

from actors.store import Store
from bus.messages import (
    CancelLoad,
    DeleteModel,
    DriverLost,
    DropModel,
    EvictModel,
    HeldModel,
    LeaseGranted,
    LeaseModel,
    LoadFailed,
    LoadModel,
    Message,
    ModelGone,
    ModelHeld,
    ModelLoaded,
    ModelRemoved,
    ModelWanted,
    ModelWarmed,
    ServerGone,
    StartInstance,
    StoreStarted,
    To,
    WarmModel,
)

AT = "http://far/a"
W0 = "gpu/s/0"


def servers(rules: int = 5) -> Tiers:
    """The model lies on the SSD of s; t can fetch it from there."""
    table = Tiers()
    table.actor.rules = rules
    table.holds("t", None, address="http://t")
    table.holds("s", "ssd", address="http://s")
    return table


def store(*models: HeldModel, dram: int = 100, rules: int = 5) -> Store:
    made = Store("store/s")
    made.rules = rules
    made.handle(StoreStarted("s", dram, models, sequence=5), 0)
    return made


def kept(name: str, tier: Any = "ssd") -> HeldModel:
    return HeldModel(card(name, weight=40), tier)


def messages(said: list[To]) -> list[Message]:
    return [to.message for to in said]


def test_it_is_brought_where_it_is_soonest_or_where_the_operator_says() -> None:
    table = servers()
    (to,) = table.tell(ModelWanted("a", sequence=7))
    assert to.receiver == "store/s" and isinstance(to.message, WarmModel)
    assert (to.message.asked, to.message.tier, to.message.weighed, to.message.sources) == (7, "ssd", 2, ())
    (to,) = table.tell(ModelWanted("a", "t", sequence=8))
    assert to.receiver == "store/t" and isinstance(to.message, WarmModel)
    assert (to.message.tier, to.message.sources, to.message.card) == ("remote", ("http://s/a",), card("a"))
    table.tell(ModelHeld("s", card("a"), "dram"))
    assert messages(table.tell(ModelWanted("a", sequence=9))) == [ModelWarmed("a", 9, "s")], "it is there already"


@pytest.mark.parametrize(
    ("prepared", "asked", "reason"),
    [
        (None, ModelWanted("x"), "no server of this cell holds a model 'x'"),
        (ModelRemoved("a"), ModelWanted("a"), "no server of this cell holds a model 'a'"),
        (None, ModelWanted("a", "z"), "there is no server 'z' in this cell"),
        (ServerGone("s"), ModelWanted("a", "s"), "server s is not up"),
        (ServerGone("s"), ModelWanted("a"), "nobody is known from whom t can fetch a; server s is not up"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(prepared: Message | None, asked: ModelWanted, reason: str) -> None:
    table = servers()
    if prepared is not None:
        table.tell(prepared)
    (to,) = table.tell(asked)
    assert to == To("record", ModelWarmed(asked.model, 0, asked.server, reason))


def test_older_rules_know_of_no_such_wish() -> None:
    (to,) = servers(rules=4).tell(ModelWanted("a"))
    assert isinstance(to.message, ModelWarmed) and "rule version" in to.message.reason


def test_room_that_is_taken_by_its_load_is_promised_to_nobody_and_comes_free_when_that_fails() -> None:
    table = Tiers()
    table.actor.rules = 5
    table.server("s", kept("a"), kept("b"), dram=70)
    table.worker("gpu/s/0", memory=60, slots=1)
    table.tell(ModelWanted("a", sequence=7))
    (to,) = table.tell(ModelWanted("b", sequence=8))
    assert isinstance(to.message, ModelWarmed) and "everything in the DRAM of s is in use" in to.message.reason
    assert not [one for one in messages(table.ask("r1", "b")) if isinstance(one, StartInstance)]
    said = messages(table.tell(ModelWarmed("a", 7, "s", "it is damaged")))
    assert [one.model for one in said if isinstance(one, StartInstance)] == ["b"]


def test_it_is_loaded_as_for_a_lease_behind_all_others_and_not_kept() -> None:
    here = store(kept("a"), kept("b", "dram"), dram=70)
    evicted, _, load = messages(here.handle(WarmModel("a", 7, "ssd", 1), 1))
    assert isinstance(evicted, EvictModel) and evicted.model == "b" and "makes room for a" in evicted.reason
    assert load == LoadModel("a", "d-a", urgent=False)
    assert here.handle(WarmModel("a", 9, "ssd", 1), 2) == [], "it joins"
    said = here.handle(ModelLoaded("a", 40, 5), 3)
    assert said[1:] == [To("placement", ModelWarmed("a", asked, "s")) for asked in (7, 9)]
    assert here.state.models["a"].idle
    assert messages(here.handle(WarmModel("a", 10, "ssd", 1), 4)) == [ModelWarmed("a", 10, "s")]
    assert next(type(one) for one in messages(here.handle(LeaseModel(W0, "b"), 5))) is EvictModel, "nothing keeps it"


def test_a_worker_that_wants_it_meanwhile_gets_it_with_the_wish() -> None:
    here = store(kept("a"))
    here.handle(WarmModel("a", 7, "ssd", 1), 1)
    assert here.handle(LeaseModel(W0, "a"), 2) == []
    said = messages(here.handle(ModelLoaded("a", 40, 5), 3))
    assert said[1:] == [ModelWarmed("a", 7, "s"), LeaseGranted("a", "d-a", "ssd")]
    assert here.state.models["a"].leases == {W0: True}


def test_its_load_is_broken_off_where_the_model_is_removed() -> None:
    here = store(kept("a"))
    here.handle(WarmModel("a", 7, "ssd", 1), 1)
    said = messages(here.handle(DropModel("a"), 2))
    assert said == [
        ModelWarmed("a", 7, "s", "the model is being removed"),
        CancelLoad("a", "the model is being removed"),
    ]
    assert DeleteModel("a", "d-a") in messages(here.handle(LoadFailed("a", "cancelled", cancelled=True), 3))


def test_every_wish_is_answered() -> None:
    far = WarmModel("a", 7, "remote", 1, 1, (AT,), card("a", weight=40))
    here = store()
    (load,) = messages(here.handle(far, 1))
    assert isinstance(load, LoadModel) and (load.sources, load.urgent) == ((AT,), False)
    said = messages(here.handle(LoadFailed("a", "nobody answers"), 2))
    assert said[0] == ModelWarmed("a", 7, "s", "nobody answers") and said[-1] == ModelGone("s", "a")
    here.handle(far, 3)
    said = messages(here.handle(DriverLost("store/s", 5, "silent"), 4))
    assert said[1] == ModelWarmed("a", 7, "s", "the storage driver of s is lost")
    (refused,) = messages(here.handle(WarmModel("a", 8, "ssd", 1), 5))
    assert isinstance(refused, ModelWarmed) and "is not up" in refused.reason
    small = store(kept("a"), dram=30)
    (refused,) = messages(small.handle(WarmModel("a", 9, "ssd", 1), 1))
    assert isinstance(refused, ModelWarmed) and "needs 40 bytes of DRAM" in refused.reason
