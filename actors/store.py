"""The deciding half of one server's storage tiers: what lies in DRAM, for whom, and what makes room.

Rules
* A lease keeps a model in DRAM; what is leased is never evicted. Leases are held by workers' deciding halves and
  outlive a restart of the storage driver, as the mapped pages do.
* Room is made by evicting what is not leased, least recently used first; the eviction says why.
* The driver obeys in order, so an eviction counts as done for the decisions that follow it.
* A storage driver that is lost grants nothing: who waits is refused and may try elsewhere.
* A model that was packed anew under its name is served as it was until its last lease is returned.
"""

from __future__ import annotations

import msgspec

from actors.actor import Actor, Unexpected
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
    LoadCancelTaken,
    LoadFailed,
    LoadModel,
    LookForModel,
    ModelCard,
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
    Tier,
    To,
)


class StoredModel(msgspec.Struct):
    """One model on this server. `leases` and `waiting` are keyed by worker, as ordered sets.

    `dropping`: to be deleted when nobody uses it; `deleting`: the driver is told, and for placement it is gone;
    `newer`: what replaces it then.
    """

    card: ModelCard
    tier: Tier = "ssd"
    loading: bool = False
    leases: dict[str, bool] = {}
    waiting: dict[str, bool] = {}
    used_at: int = 0
    dropping: bool = False
    deleting: bool = False
    newer: ModelCard | None = None


class StoreState(msgspec.Struct):
    server: str = ""
    epoch: int = 0
    dram_bytes: int = 0
    models: dict[str, StoredModel] = {}


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
        self.state.dram_bytes = message.dram_bytes
        for held in message.models:
            known = before.pop(held.card.model, None)
            model = StoredModel(held.card, held.tier, leases={}, waiting={})
            if known is not None and known.card.digest == held.card.digest:
                model.leases, model.used_at, model.dropping = known.leases, known.used_at, known.dropping
                model.tier = "dram" if known.leases else held.tier
                said += self._refuse(held.card.model, known, "the storage driver restarted", retry=True)
            elif known is not None:
                said += self._refuse(held.card.model, known, "the model was replaced", retry=True)
            self.state.models[held.card.model] = model
        for name, gone in before.items():
            said += self._refuse(name, gone, f"server {message.server} no longer holds {name}", retry=True)
        models = tuple(HeldModel(model.card, model.tier) for model in self.state.models.values())
        said += [To("placement", ServerReady(message.server, message.dram_bytes, models)), *self._fit()]
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
            model.loading = model.deleting = False
        return said

    def _fit(self) -> list[To]:
        """After a start, what was found in DRAM may be more than the budget."""
        said: list[To] = []
        while self._used() > self.state.dram_bytes:
            victim = self._least_recent()
            if victim is None:
                break
            said += self._evict(victim, "the DRAM budget is smaller than what was found there")
        return said

    # ---- leases -----------------------------------------------------------------------------------------------

    def on_LeaseModel(self, message: LeaseModel, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if not self.state.epoch or model is None or model.dropping or model.deleting:
            where = f"server {self.state.server}"
            reason = f"the storage driver of {where} is not up"
            if self.state.epoch:
                reason = f"{where} does not hold {message.model}"
            return [To(message.worker, LeaseRefused(message.model, reason, retry=True))]
        model.used_at = now
        if model.tier == "dram":
            model.leases[message.worker] = True
            return [To(message.worker, LeaseGranted(message.model, model.card.digest, "dram"))]
        if model.loading:
            model.waiting[message.worker] = True
            return []
        size, budget = model.card.weight_bytes, self.state.dram_bytes
        if size > budget:
            reason = f"{message.model} needs {size} bytes of DRAM, the budget of {self.state.server} is {budget}"
            return [To(message.worker, LeaseRefused(message.model, reason))]
        said: list[To] = []
        while self._used() + size > budget:
            victim = self._least_recent()
            if victim is None:
                reason = f"everything in the DRAM of {self.state.server} is in use, {message.model} finds no room"
                return [*said, To(message.worker, LeaseRefused(message.model, reason, retry=True))]
            said += self._evict(victim, f"least recently used, makes room for {message.model}")
        model.loading = True
        model.waiting[message.worker] = True
        return [*said, To(self._driver, LoadModel(message.model, model.card.digest))]

    def on_LeaseReturned(self, message: LeaseReturned, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None:
            return []
        model.leases.pop(message.worker, None)
        model.waiting.pop(message.worker, None)
        model.used_at = now
        if model.tier == "ssd" and not model.loading and not model.deleting:
            # It never came, and placement may count on its coming.
            held = To("placement", ModelHeld(self.state.server, model.card, "ssd"))
            return [held, *self._release(message.model, model)]
        return self._release(message.model, model)

    def on_ModelLoaded(self, message: ModelLoaded, now: int) -> list[To]:
        model = self.state.models[message.model]
        model.loading, model.tier, model.used_at = False, "dram", now
        said = [To("placement", ModelHeld(self.state.server, model.card, "dram", message.duration_ns))]
        for worker in model.waiting:
            model.leases[worker] = True
            said.append(To(worker, LeaseGranted(message.model, model.card.digest, "ssd")))
        model.waiting = {}
        if model.newer is not None:
            said.append(To("placement", ModelReplaced(self.state.server, message.model)))
        return [*said, *self._release(message.model, model)]

    def on_LoadFailed(self, message: LoadFailed, now: int) -> list[To]:
        model = self.state.models[message.model]
        model.loading = False
        said = self._refuse(message.model, model, message.reason, retry=True)
        if message.gone and model.newer is None:
            del self.state.models[message.model]
            return [*said, To("placement", ModelGone(self.state.server, message.model))]
        said.append(To("placement", ModelHeld(self.state.server, model.card, "ssd")))
        return [*said, *self._release(message.model, model)]

    def on_ModelEvicted(self, message: ModelEvicted, now: int) -> list[To]:
        return []

    def on_LoadCancelTaken(self, message: LoadCancelTaken, now: int) -> list[To]:
        return []

    # ---- which models there are -------------------------------------------------------------------------------

    def on_LookForModel(self, message: LookForModel, now: int) -> list[To]:
        known = self.state.models.get(message.model)
        if known is not None:
            known.dropping = False
        return [To(self._driver, FindModel(message.model))] if self.state.epoch else []

    def on_ModelFound(self, message: ModelFound, now: int) -> list[To]:
        card = message.card
        known = self.state.models.get(card.model)
        if known is not None and known.deleting:
            known.newer = card
            return []
        if known is None:
            self.state.models[card.model] = StoredModel(card, leases={}, waiting={}, used_at=now)
            return [To("placement", ModelHeld(self.state.server, card, "ssd"))]
        if known.card.digest != card.digest:
            known.newer = card
            replaced = To("placement", ModelReplaced(self.state.server, card.model))
            return self._release(card.model, known) or [replaced]
        known.card, known.newer = card, None
        return [To("placement", ModelHeld(self.state.server, card, known.tier))]

    def on_ModelMissing(self, message: ModelMissing, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None or model.leases or model.loading:
            return []
        if model.deleting:
            return self.on_ModelDeleted(ModelDeleted(message.model), now)
        del self.state.models[message.model]
        return [To("placement", ModelGone(self.state.server, message.model))]

    def on_DropModel(self, message: DropModel, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None:
            return []
        model.dropping = True
        return self._release(message.model, model)

    def on_ModelDeleted(self, message: ModelDeleted, now: int) -> list[To]:
        model = self.state.models.get(message.model)
        if model is None or not model.deleting:
            return []
        del self.state.models[message.model]
        # Something was found meanwhile, before or after the deletion: only another look can tell.
        return [To(self._driver, FindModel(message.model))] if model.newer is not None and self.state.epoch else []

    # ---- what they have in common -----------------------------------------------------------------------------

    @property
    def _driver(self) -> str:
        return f"driver/{self.name}"

    def _used(self) -> int:
        """Bytes of DRAM that are taken or promised."""
        return sum(m.card.weight_bytes for m in self.state.models.values() if m.tier == "dram" or m.loading)

    def _least_recent(self) -> str | None:
        best: str | None = None
        for name, model in self.state.models.items():
            evictable = model.tier == "dram" and not model.leases
            if evictable and (best is None or model.used_at < self.state.models[best].used_at):
                best = name
        return best

    def _evict(self, name: str, reason: str) -> list[To]:
        model = self.state.models[name]
        model.tier = "ssd"
        return [
            To(self._driver, EvictModel(name, reason)),
            To("placement", ModelHeld(self.state.server, model.card, "ssd")),
        ]

    def _refuse(self, name: str, model: StoredModel, reason: str, *, retry: bool) -> list[To]:
        said = [To(worker, LeaseRefused(name, reason, retry)) for worker in model.waiting]
        model.waiting = {}
        return said

    def _release(self, name: str, model: StoredModel) -> list[To]:
        """Replace or delete a model that is to be, once nobody uses it and no load is under way."""
        if model.leases or model.loading or model.deleting or not self.state.epoch:
            return []
        said: list[To] = []
        if model.newer is not None:
            said += self._evict(name, "the model was replaced") if model.tier == "dram" else []
            model.card, model.newer = model.newer, None
            said.append(To("placement", ModelHeld(self.state.server, model.card, "ssd")))
        if model.dropping:
            said += self._evict(name, "the model is being removed") if model.tier == "dram" else []
            model.deleting = True
            said += [
                To(self._driver, DeleteModel(name, model.card.digest)),
                To("placement", ModelGone(self.state.server, name)),
            ]
        return said
