"""What the deciding half of one server's storage tiers keeps: its models, its budgets, how fast it loaded so far.

Times are nanoseconds, sizes bytes.
"""

from __future__ import annotations

import msgspec

from actors.learning import SECOND
from bus.messages import ModelCard, Tier


class StoredModel(msgspec.Struct):
    """One model on this server. `leases` and `waiting` are keyed by worker; a lease is false where it is streamed.

    `dropping`: to be deleted when nobody uses it; `deleting`: the driver is told, and for placement it is gone;
    `newer`: what replaces it then, to be fetched if `newer_remote`. `source`: where it can be fetched; `sources`: where
    this load looks, in order; `urgent`: somebody waits for it; `cancelling`: the driver is told to break it off.
    `interval_ns`: between leases.
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
    newer_remote: bool = False
    source: str = ""
    sources: tuple[str, ...] = ()
    urgent: bool = True
    cancelling: bool = False
    wanted_at: int = 0
    interval_ns: int = 0

    @property
    def idle(self) -> bool:
        """Whether nothing keeps it where it is."""
        return not (self.leases or self.waiting or self.loading or self.deleting)

    @property
    def leaves_ssd(self) -> bool:
        """Whether it may go from the SSD: it can be fetched again, and is neither in use nor to be replaced."""
        whole = self.newer is None and not self.dropping
        return self.tier != "remote" and self.idle and bool(self.source) and whole


class StoreState(msgspec.Struct):
    """`ssd_bytes` 0: no budget. Rates in bytes per second, learned from finished loads. `dram_tier`: for people."""

    server: str = ""
    epoch: int = 0
    dram_bytes: int = 0
    models: dict[str, StoredModel] = {}
    ssd_bytes: int = 0
    ssd_rate: int = SECOND
    remote_rate: int = SECOND // 2
    dram_tier: str = ""

    def dram_used(self) -> int:
        """Bytes of DRAM that are taken or promised."""
        return sum(
            m.card.weight_bytes
            for m in self.models.values()
            if m.tier == "dram" or (m.loading and not self.streams(m.card))
        )

    def streams(self, card: ModelCard) -> bool:
        """Whether it is larger than the budget of DRAM, so that a worker reads it from the SSD itself."""
        return card.weight_bytes > self.dram_bytes

    def ssd_used(self) -> int:
        """Bytes of the SSD that are taken or promised."""
        return sum(m.card.weight_bytes for m in self.models.values() if m.tier != "remote" or m.loading)
