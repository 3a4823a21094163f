"""The deciding half of one server's storage tiers: what lies on SSD and in DRAM, for whom, and what makes room.

    remote ──load──▶ ssd ──load──▶ dram          one load brings it all the way; both budgets hold
       ◀──evict── ssd ◀──evict── dram

Rules
* A lease keeps a model in DRAM; what is leased is never evicted. Leases are held by workers' deciding halves and
  outlive a restart of the storage driver, as the mapped pages do.
* Room is made by evicting what is not leased, that whose loss costs least (`actors.store_room`); the eviction says why.
  From the SSD only what can be fetched again goes.
* A model larger than the budget of DRAM is never brought there: its worker streams it, and its lease keeps the files on
  the SSD (from rule version 3 on), to which it comes from elsewhere first (from rule version 5 on).
* What an operator wants in DRAM is loaded by the same rules, after what somebody waits for, and is not leased (from
  rule version 5 on).
* A load that nobody waits for any more is broken off, if whoever wanted it says so.
* Nothing is evicted in vain: room that cannot be made is refused before anything goes.
* The driver obeys in order, so an eviction counts as done for the decisions that follow it.
* A storage driver that is lost grants nothing: who waits is refused and may try elsewhere.
* A model that was packed anew under its name is served as it was until its last lease is returned.
"""

from __future__ import annotations

from actors.actor import Actor, Unexpected
from actors.learning import LARGEST, SECOND, learned
from actors.store_room import Evictable, choose, evictable, explain, least_recent
from actors.store_state import StoredModel, StoreState
from bus.messages import (
    CancelLoad,
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
    LoadCancelTaken,
    LoadFailed,
    LoadModel,
    LookForModel,
    ModelDeleted,
    ModelEvicted,
    ModelFound,
    ModelGone,
    ModelHeld,
    ModelLoaded,
    ModelMissing,
    ModelReplaced,
    ModelWarmed,
    ServerGone,
    ServerReady,
    StoreStarted,
    Tier,
    To,
    WarmModel,
)

_WISH = "wish/"
"""Among those who wait for a load, no worker: an operator who wanted the model here, with that fact."""


class Store(Actor):
    """See the head of this file. Its name is that of its driver: `store/<server>`."""

    State = StoreState
    state: StoreState

    # ---- the life of the driver -------------------------------------------------------------------------------

    def on_StoreStarted(self, message: StoreStarted, now: int) -> list[To]:
        if self.name != f"store/{message.server}":
            raise Unexpected(f"{self.name} is not the store of server {message.server}")
        said: list[To] = []
        before, self.state.models = self.state.models, {}
        self.state.server, self.state.epoch = message.server, message.sequence
        self.state.dram_bytes, self.state.ssd_bytes = message.dram_bytes, message.ssd_bytes
        self.state.dram_tier = message.dram_tier
        for held in message.models:
            known = before.pop(held.card.model, None)
            model = StoredModel(held.card, held.tier, leases={}, waiting={}, source=held.source)
            if known is not None:
                model.wanted_at, model.interval_ns = known.wanted_at, known.interval_ns
            if known is not None and known.card.digest == held.card.digest:
                model.source = held.source or known.source
                model.leases, model.used_at, model.dropping = known.leases, known.used_at, known.dropping
                model.tier = "dram" if any(known.leases.values()) else held.tier
                said += self._refuse(held.card.model, known, "the storage driver restarted", retry=True)
            elif known is not None:
                said += self._refuse(held.card.model, known, "the model was replaced", retry=True)
            self.state.models[held.card.model] = model
        for name, gone in before.items():
            said += self._refuse(name, gone, f"server {message.server} no longer holds {name}", retry=True)
            if gone.source and not gone.dropping and not gone.deleting:
                known_far = StoredModel(gone.card, "remote", leases={}, waiting={}, source=gone.source)
                self.state.models[name] = known_far
        models = tuple(HeldModel(model.card, model.tier, model.source) for model in self.state.models.values())
        ready = ServerReady(message.server, message.dram_bytes, models, message.ssd_bytes, message.address)
        said += [To("placement", ready), *self._fit(), *self._fit_ssd(now)]
        for name, model in list(self.state.models.items()):
            said += self._release(name, model)
        return said

    def on_DriverLost(self, message: DriverLost, now: int) -> list[To]:
        """Also of a later epoch: one whose `started` could not be taken."""
        if not self.state.epoch or message.epoch < self.state.epoch:
            return []
        self.state.epoch = 0
        said = [To("placement", ServerGone(self.state.server))]
        for name, model in self.state.models.items():
            said += self._refuse(name, model, f"the storage driver of {self.state.server} is lost", retry=True)
            model.loading = model.deleting = model.cancelling = False
        return said

    def _fit(self) -> list[To]:
        """After a start, what was found in DRAM may be more than the budget."""
        said: list[To] = []
        while self.state.dram_used() > self.state.dram_bytes:
            victim = least_recent(self.state)
            if victim is None:
                break
            said += self._evict(victim, "the DRAM budget is smaller than what was found there")
        return said

    def _fit_ssd(self, now: int) -> list[To]:
        """What was found on the SSD may be more than the budget; what cannot be fetched again stays all the same."""
        short = self.state.ssd_used() - self.state.ssd_bytes
        if not self.state.ssd_bytes or short <= 0:
            return []
        candidates = self._candidates("remote", now)
        victims = choose(candidates, short)
        said: list[To] = []
        for one in candidates if victims is None else victims:
            said += self._evict_from_ssd(one.name, "the SSD budget is smaller than what was found there")
        return said

    # ---- leases -----------------------------------------------------------------------------------------------

    def on_LeaseModel(self, message: LeaseModel, now: int) -> list[To]:
        model = self._wanted(message)
        if isinstance(model, str):
            return [To(message.worker, LeaseRefused(message.model, model, retry=True))]
        if model.wanted_at:
            model.interval_ns = learned(model.interval_ns or now - model.wanted_at, now - model.wanted_at)
        model.used_at = model.wanted_at = now
        if model.tier == "dram":
            model.leases[message.worker] = True
            return [To(message.worker, LeaseGranted(message.model, model.card.digest, "dram"))]
        if model.loading:
            model.waiting[message.worker] = True
            return []
        if model.tier == "ssd" and self.rules >= 3 and self.state.streams(model.card):
            model.leases[message.worker] = False
            return [To(message.worker, LeaseGranted(message.model, model.card.digest, "ssd", streamed=True))]
        return self._bring(message.worker, message, model, now, urgent=message.urgent)

    def on_WarmModel(self, message: WarmModel, now: int) -> list[To]:
        """As a lease that ends when the model is there, and that goes before nobody (from rule version 5 on)."""
        model, waiting = self._wanted(message), f"{_WISH}{message.asked}"
        if isinstance(model, str):
            return [self._answer(waiting, message.model, reason=model)]
        model.used_at = now
        if model.tier == "dram":
            return [self._answer(waiting, message.model)]
        if model.loading:
            model.waiting[waiting] = True
            return []
        return self._bring(waiting, message, model, now, urgent=False)

    def _wanted(self, message: LeaseModel | WarmModel) -> StoredModel | str:
        """The model that is to come to DRAM; one sentence where there is none here."""
        model = self.state.models.get(message.model)
        if self.state.epoch and model is None and message.card is not None and message.sources:
            model = self.state.models[message.model] = StoredModel(message.card, "remote", leases={}, waiting={})
        where = f"server {self.state.server}"
        if not self.state.epoch:
            return f"the storage driver of {where} is not up"
        if model is None or model.dropping or model.deleting:
            return f"{where} does not hold {message.model}"
        return model

    def _bring(
        self, who: str, message: LeaseModel | WarmModel, model: StoredModel, now: int, *, urgent: bool
    ) -> list[To]:
        """Order the load, with the room that it needs; or say to `who` why that cannot be."""
        if model.tier == "remote":
            model.card = message.card or model.card
            model.sources = message.sources or ((model.source,) if model.source else ())
        leased = isinstance(message, LeaseModel) and self.rules >= 5
        streamed = leased and self._comes_to_ssd_only(model)
        refused, said = self._never_fits(message.model, model, streamed=streamed), list[To]()
        never = bool(refused)
        refused = refused or self._make_room(message.model, model, message.keep, now, said)
        if refused:
            said.append(self._refusal(who, message.model, refused, retry=not never))
            return [*said, *self._forget_unless_held(message.model, model)]
        model.loading, model.urgent = True, urgent
        model.waiting[who] = True
        return [*said, self._load(message.model, model)]

    def on_LeaseReturned(self, message: LeaseReturned, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None:
            return []
        model.leases.pop(message.worker, None)
        model.waiting.pop(message.worker, None)
        model.used_at = now
        if message.abandoned and model.loading and not (model.leases or model.waiting or model.cancelling):
            model.cancelling = True
            return [To(self._driver, CancelLoad(message.model, "nobody waits for it any more"))]
        if model.tier != "dram" and not model.loading and not model.deleting:
            # It never came, and placement may count on its coming.
            return [self._held(model), *self._release(message.model, model)]
        return self._release(message.model, model)

    def on_ModelLoaded(self, message: ModelLoaded, now: int) -> list[To]:
        model = self.state.models[message.model]
        streamed = self._comes_to_ssd_only(model)
        model.loading, model.used_at, model.cancelling = False, now, False
        model.tier = "ssd" if streamed else "dram"
        # Where an operator said it is outlasts a copy that another server happened to have.
        model.source = model.source or message.source
        if message.duration_ns:
            rate = min(LARGEST, message.loaded_bytes * SECOND // message.duration_ns)
            if message.tier == "remote":
                self.state.remote_rate = learned(self.state.remote_rate, rate)
            else:
                self.state.ssd_rate = learned(self.state.ssd_rate, rate)
        said = [self._held(model, message.duration_ns, message.tier)]
        for worker in model.waiting:
            if worker.startswith(_WISH):
                reason = self._too_large_for_dram(message.model, model) if streamed else ""
                said.append(self._answer(worker, message.model, reason=reason))
                continue
            model.leases[worker] = not streamed
            granted = LeaseGranted(message.model, model.card.digest, message.tier, streamed=streamed)
            said.append(To(worker, granted))
        model.waiting = {}
        if model.newer is not None:
            said.append(To("placement", ModelReplaced(self.state.server, message.model)))
        return [*said, *self._release(message.model, model)]

    def on_LoadFailed(self, message: LoadFailed, now: int) -> list[To]:
        model = self.state.models[message.model]
        if message.cancelled and model.waiting:
            model.cancelling = False  # somebody wants it again
            return [self._load(message.model, model)]
        model.loading = model.cancelling = False
        said = self._refuse(message.model, model, message.reason, retry=True)
        if message.gone and model.newer is None:
            if model.tier == "remote" or not model.source:
                return [*said, *self._forget(message.model)]
            # What lies here is of no use, and can be fetched again.
            return [*said, *self._evict_from_ssd(message.model, message.reason)]
        if model.tier == "remote":
            # It may have come as far as the SSD.
            said.append(To(self._driver, FindModel(message.model)))
            if model.newer is None and (forgotten := self._forget_unless_held(message.model, model)):
                return [*said, *forgotten]
        said.append(self._held(model))
        return [*said, *self._release(message.model, model)]

    def on_LoadCancelTaken(self, message: LoadCancelTaken, now: int) -> list[To]:
        return []

    def on_ModelEvicted(self, message: ModelEvicted, now: int) -> list[To]:
        return []

    # ---- which models there are -------------------------------------------------------------------------------

    def on_LookForModel(self, message: LookForModel, now: int) -> list[To]:
        known = self.state.models.get(message.model)
        if known is not None:
            known.dropping = False
        return [To(self._driver, FindModel(message.model, message.source))] if self.state.epoch else []

    def on_ModelFound(self, message: ModelFound, now: int) -> list[To]:
        card = message.card
        known = self.state.models.get(card.model)
        far = message.tier == "remote"
        if known is not None and known.deleting:
            known.newer, known.newer_remote = card, far
            return []
        if known is None:
            known = StoredModel(card, message.tier, leases={}, waiting={}, used_at=now, source=message.source)
            self.state.models[card.model] = known
            return [self._held(known), *self._fit_ssd(now)]
        if known.card.digest != card.digest:
            known.source = message.source
            known.newer, known.newer_remote = card, far
            replaced = To("placement", ModelReplaced(self.state.server, card.model))
            return self._release(card.model, known) or [replaced]
        known.source = message.source or known.source
        known.card, known.newer = card, None
        if known.tier == "remote" and not far and not known.loading:
            known.tier = "ssd"
        return [self._held(known), *self._fit_ssd(now)]

    def on_ModelMissing(self, message: ModelMissing, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None or model.leases or model.loading:
            return []
        if model.deleting:
            return self.on_ModelDeleted(ModelDeleted(message.model), now)
        if model.tier == "remote" and model.source:
            # It does not lie here, as was known; that its source did not answer may pass.
            return []
        return self._forget(message.model)

    def on_DropModel(self, message: DropModel, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None:
            return self._drop_partial(message.model) if self.rules >= 5 else []
        model.dropping = True
        if model.loading and model.waiting and all(who.startswith(_WISH) for who in model.waiting):
            reason = "the model is being removed"
            said, again = self._refuse(message.model, model, reason, retry=False), model.cancelling
            model.cancelling = True
            return said if again else [*said, To(self._driver, CancelLoad(message.model, reason))]
        return self._release(message.model, model)

    def on_ModelDeleted(self, message: ModelDeleted, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None or not model.deleting:
            return []
        del self.state.models[message.model]
        # Something was found meanwhile, before or after the deletion: only another look can tell.
        look = FindModel(message.model, model.source if model.newer_remote else "")
        return [To(self._driver, look)] if model.newer is not None and self.state.epoch else []

    # ---- what they have in common -----------------------------------------------------------------------------

    @property
    def _driver(self) -> str:
        return f"driver/{self.name}"

    def _evict(self, name: str, reason: str) -> list[To]:
        model = self.state.models[name]
        model.tier = "ssd"
        return [To(self._driver, EvictModel(name, reason)), self._held(model)]

    def _evict_from_ssd(self, name: str, reason: str) -> list[To]:
        model = self.state.models[name]
        said = self._evict(name, reason) if model.tier == "dram" else []
        model.tier = "remote"
        return [*said, To(self._driver, EvictModel(name, reason, "ssd")), self._held(model)]

    def _comes_to_ssd_only(self, model: StoredModel) -> bool:
        """Whether its load ends on the SSD, where its workers read it themselves. None is begun before version 5."""
        return model.tier == "remote" and self.state.streams(model.card)

    def _too_large_for_dram(self, wanted: str, model: StoredModel) -> str:
        size, budget = model.card.weight_bytes, self.state.dram_bytes
        return f"{wanted} needs {size} bytes of DRAM, the budget of {self.state.server} is {budget}"

    def _never_fits(self, wanted: str, model: StoredModel, *, streamed: bool) -> str:
        """One sentence where a budget is too small for this model whatever goes."""
        size, server = model.card.weight_bytes, self.state.server
        if self.state.streams(model.card) and not streamed:
            return self._too_large_for_dram(wanted, model)
        if model.tier == "remote" and 0 < self.state.ssd_bytes < size:
            return f"{wanted} needs {size} bytes of SSD, the budget of {server} is {self.state.ssd_bytes}"
        return ""

    def _make_room(self, wanted: str, model: StoredModel, keep: tuple[str, ...], now: int, said: list[To]) -> str:
        """Adds to `said` what makes room for the model; one sentence where that cannot be made."""
        size = model.card.weight_bytes
        full = f"everything in the DRAM of {self.state.server} is in use, {wanted} finds no room"
        if self.rules < 3 and model.tier != "remote":
            while self.state.dram_used() + size > self.state.dram_bytes:
                victim = least_recent(self.state)
                if victim is None:
                    return full
                said += self._evict(victim, f"least recently used, makes room for {wanted}")
            return ""
        disk, on_disk = list[Evictable](), self._candidates("remote", now, keep)
        if model.tier == "remote":
            if not model.sources:
                return f"nobody is known who has {wanted}"
            short = self.state.ssd_used() + size - self.state.ssd_bytes
            found = choose(on_disk, short) if self.state.ssd_bytes and short > 0 else []
            if found is None:
                return f"nothing on the SSD of {self.state.server} may go, {wanted} finds no room"
            disk = found
        leaving = [one.name for one in disk]
        freed = sum(one.size for one in disk if self.state.models[one.name].tier == "dram")
        if self._comes_to_ssd_only(model):
            size = 0  # of DRAM
        short = self.state.dram_used() - freed + size - self.state.dram_bytes
        in_dram = [one for one in self._candidates("ssd", now, keep) if one.name not in leaving]
        victims = choose(in_dram, short) if short > 0 else []
        if victims is None:
            return full
        for one in disk:
            said += self._evict_from_ssd(one.name, explain(one, wanted, on_disk, disk))
        for one in victims:
            said += self._evict(one.name, explain(one, wanted, in_dram, victims))
        return ""

    def _candidates(self, below: Tier, now: int, keep: tuple[str, ...] = ()) -> list[Evictable]:
        """Who may go to the tier below, and what that would cost."""
        rate = self.state.ssd_rate if below == "ssd" else self.state.remote_rate
        return [
            evictable(
                name, model.card.weight_bytes, rate, model.interval_ns, now - model.used_at, wanted_now=name in keep
            )
            for name, model in self.state.models.items()
            if (model.leaves_ssd if below == "remote" else model.tier == "dram" and model.idle)
        ]

    def _load(self, name: str, model: StoredModel) -> To:
        sources = model.sources if model.tier == "remote" else ()
        streamed = self._comes_to_ssd_only(model)
        return To(self._driver, LoadModel(name, model.card.digest, sources, model.urgent, streamed))

    def _held(self, model: StoredModel, duration_ns: int = 0, origin: Tier = "ssd") -> To:
        held = ModelHeld(self.state.server, model.card, model.tier, duration_ns, origin, model.source)
        return To("placement", held)

    def _forget(self, name: str) -> list[To]:
        model = self.state.models.pop(name)
        said = self._drop_partial(name) if self.rules >= 5 and model.dropping else []
        return [*said, To("placement", ModelGone(self.state.server, name))]

    def _drop_partial(self, name: str) -> list[To]:
        """What a fetch that broke off has left stays to be gone on with; but not of a model that is being removed."""
        if not self.state.epoch:
            return []
        return [To(self._driver, EvictModel(name, "the model is being removed", "remote"))]

    def _forget_unless_held(self, name: str, model: StoredModel) -> list[To]:
        """What was only to be fetched from another server, and did not come, is nothing that this one has."""
        return self._forget(name) if model.tier == "remote" and not model.source else []

    def _refuse(self, name: str, model: StoredModel, reason: str, *, retry: bool) -> list[To]:
        said = [self._refusal(worker, name, reason, retry=retry) for worker in model.waiting]
        model.waiting = {}
        return said

    def _refusal(self, who: str, name: str, reason: str, *, retry: bool) -> To:
        if who.startswith(_WISH):
            return self._answer(who, name, reason=reason)
        return To(who, LeaseRefused(name, reason, retry))

    def _answer(self, wish: str, name: str, *, reason: str = "") -> To:
        """What became of the wish of an operator who waits."""
        asked = int(wish.removeprefix(_WISH))
        return To("placement", ModelWarmed(name, asked, self.state.server, reason))

    def _release(self, name: str, model: StoredModel) -> list[To]:
        """Replace or delete a model that is to be, once nobody uses it and no load is under way."""
        if model.leases or model.loading or model.deleting or not self.state.epoch:
            return []
        said: list[To] = []
        if model.newer is not None:
            said += self._evict(name, "the model was replaced") if model.tier == "dram" else []
            if model.newer_remote and model.tier == "ssd":
                said += self._evict_from_ssd(name, "the model was replaced")
            if not model.newer_remote:
                model.tier = "ssd"
            model.card, model.newer, model.newer_remote = model.newer, None, False
            said.append(self._held(model))
        if model.dropping:
            said += self._evict(name, "the model is being removed") if model.tier == "dram" else []
            model.deleting = True
            said += [
                To(self._driver, DeleteModel(name, model.card.digest)),
                To("placement", ModelGone(self.state.server, name)),
            ]
        return said
