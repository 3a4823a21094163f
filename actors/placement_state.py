"""What placement knows: models, servers, workers, instances, who waits, and how fast things went so far.

Times are nanoseconds, sizes bytes. Dictionaries serve as ordered sets; everything here can be written and read back.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from bus.messages import ModelCard, PlacementConfigured, Tier

SECOND = 1_000_000_000


class KnownModel(msgspec.Struct):
    """`servers`: the nearest tier per server that holds it; `instances`: workers on which it starts or runs."""

    card: ModelCard
    servers: dict[str, Tier] = {}
    instances: dict[str, bool] = {}
    removed: bool = False
    failures: int = 0
    attach_ns: int = SECOND // 10
    service_ns: int = SECOND


class Server(msgspec.Struct):
    """`loading`: bytes still to come from SSD, per model; `ssd_rate`: bytes per second, learned from finished loads."""

    dram_bytes: int
    up: bool = True
    loading: dict[str, int] = {}
    ssd_rate: int = 1_000_000_000


class RunningInstance(msgspec.Struct):
    """`memory`: weights and KV cache reserved on the device; `active`: attempts by request that hold a slot."""

    slots: int
    memory: int
    status: Literal["starting", "running", "draining", "stopping"] = "starting"
    active: dict[str, int] = {}
    used_at: int = 0
    ready_at: int = 0
    tier: Tier = "ssd"


class Worker(msgspec.Struct):
    server: str
    memory_bytes: int
    max_slots: int
    instances: dict[str, RunningInstance] = {}

    def free(self) -> int:
        """Bytes of device memory that nothing has reserved."""
        return self.memory_bytes - sum(instance.memory for instance in self.instances.values())


class Waiting(msgspec.Struct):
    attempt: int
    accepted: int
    since: int


class Placed(msgspec.Struct):
    worker: str
    model: str
    attempt: int
    since: int


class PlacementState(msgspec.Struct):
    """`queues`: waiting requests by model, each in order of acceptance; `room`: the worker drained for a model,
    `removing`: models that go as soon as they are idle."""

    models: dict[str, KnownModel] = {}
    servers: dict[str, Server] = {}
    workers: dict[str, Worker] = {}
    queues: dict[str, dict[str, Waiting]] = {}
    placed: dict[str, Placed] = {}
    room: dict[str, str] = {}
    removing: dict[str, bool] = {}
    waiting: int = 0
    configuration: PlacementConfigured = PlacementConfigured()

    def head(self, model: str) -> int:
        """Ledger sequence of the request that waits longest for this model."""
        queue = self.queues[model]
        return queue[next(iter(queue))].accepted

    def retry_ms(self, model: KnownModel) -> int:
        """Until those who wait are served: waiting requests x service time / slots, at least 100 ms."""
        slots = sum(self.workers[worker].instances[model.card.model].slots for worker in model.instances)
        waiting = len(self.queues.get(model.card.model, ())) or 1
        return max(100, waiting * model.service_ns // max(1, slots) // 1_000_000)


def kv_plan(card: ModelCard, memory_bytes: int, max_slots: int) -> tuple[int, int]:
    """How many slots an instance gets on a device, and the bytes of KV cache for them; (0, 0) where it does not fit.

    At most a quarter of the device goes to one instance's KV cache, so that several models can share it, but always
    one slot of full context.
    """
    per_slot = card.context * card.kv_bytes_per_token
    room = memory_bytes - card.weight_bytes
    if room < per_slot:
        return 0, 0
    slots = max(1, min(max_slots, min(room, max(memory_bytes // 4, per_slot)) // per_slot))
    return slots, slots * per_slot


def learned(old: int, seen: int) -> int:
    """A quarter of what was just seen, three quarters of what was known."""
    return max(1, (3 * old + seen) // 4)
