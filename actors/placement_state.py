"""What placement knows: models, servers, workers, instances, who waits, and how fast things went so far.

Times are nanoseconds, sizes bytes. Dictionaries serve as ordered sets; everything here can be written and read back.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from actors.learning import LARGEST, SECOND, learned
from actors.resume_times import ResumeTimes
from bus.messages import ModelCard, PlacementConfigured, Tier

FAILURES_LIMIT = 10
"""Starts of one model that may fail in a row before its waiting requests are told."""


class KnownModel(msgspec.Struct):
    """`servers`: the nearest tier per server that holds it; `source`: where it can be fetched; `instances`: workers on
    which it starts or runs.

    `open`: of those, the running ones with free slots, by how many; `failed_on`: starts that failed since the last
    one that did not, per worker; `enough`: requests that may wait without another look for a place to start;
    `replaced`: servers where a newer version waits until no instance there holds the old one any more.
    """

    card: ModelCard
    servers: dict[str, Tier] = {}
    source: str = ""
    instances: dict[str, bool] = {}
    removed: bool = False
    replaced: dict[str, bool] = {}
    failures: int = 0
    failed_on: dict[str, int] = {}
    open: dict[int, dict[str, bool]] = {}
    enough: int = 0
    attach_ns: int = SECOND // 10
    service_ns: int = SECOND


class Lease(msgspec.Struct):
    """A model that instances of one server keep in DRAM, on `workers` of them, with this many bytes."""

    workers: int
    weight_bytes: int


class Server(msgspec.Struct):
    """`loading`: bytes still to come to DRAM, per model; `fetching`: those of them that come from remote,
    and the server that is asked first, empty for the model's source; `leased`:
    models of instances, whatever their status; `address`: where others can fetch from its SSD; `ssd_bytes`:
    the budget of that, 0 for none, and `own`: what lies there and nowhere else, `own_bytes` in all; rates: bytes per
    second from SSD and from remote, learned from finished loads; errors: mean difference of a load from its estimate,
    in nanoseconds."""

    dram_bytes: int
    up: bool = True
    loading: dict[str, int] = {}
    leased: dict[str, Lease] = {}
    ssd_rate: int = 1_000_000_000
    fetching: dict[str, str] = {}
    address: str = ""
    remote_rate: int = 500_000_000
    ssd_bytes: int = 0
    own: dict[str, int] = {}
    own_bytes: int = 0
    ssd_error_ns: int = 0
    remote_error_ns: int = 0

    def streams(self, card: ModelCard) -> bool:
        """Whether the model is larger than the budget of DRAM, so that its worker reads it from the SSD itself."""
        return card.weight_bytes > self.dram_bytes

    def note_own(self, name: str, size: int) -> None:
        """That the model lies on the SSD and can be had nowhere else, with this many bytes; 0: that it is not so."""
        self.own_bytes += size - self.own.pop(name, 0)
        if size:
            self.own[name] = size

    def error_ns(self, tier: Tier) -> int:
        """By how much loads from this tier differed from what was estimated."""
        return {"ssd": self.ssd_error_ns, "remote": self.remote_error_ns}.get(tier, 0)

    def rate(self, model: str) -> int:
        """Bytes per second of the load of this model that is under way."""
        return self.remote_rate if model in self.fetching else self.ssd_rate

    def learn(self, origin: Tier, size: int, duration_ns: int) -> None:
        """From a finished load."""
        rate = size * SECOND // max(1, duration_ns)
        if origin == "remote":
            error = abs(min(LARGEST, size * SECOND // self.remote_rate) - duration_ns)
            self.remote_error_ns = learned(self.remote_error_ns, error)
            self.remote_rate = learned(self.remote_rate, rate)
        else:
            error = abs(min(LARGEST, size * SECOND // self.ssd_rate) - duration_ns)
            self.ssd_error_ns = learned(self.ssd_error_ns, error)
            self.ssd_rate = learned(self.ssd_rate, rate)


class RunningInstance(msgspec.Struct):
    """`memory`: weights and KV cache reserved on the device; `active`: attempts by request that hold a slot;
    `free`: under how many free slots it stands in its model's index, 0 for not at all; `outdated`: a newer version
    lies on its server, so it takes no more sequences and stops when idle.
    """

    slots: int
    memory: int
    status: Literal["starting", "running", "draining", "stopping"] = "starting"
    active: dict[str, int] = {}
    free: int = 0
    used_at: int = 0
    ready_at: int = 0
    tier: Tier = "ssd"
    outdated: bool = False


class Worker(msgspec.Struct):
    server: str
    memory_bytes: int
    max_slots: int
    instances: dict[str, RunningInstance] = {}

    def free(self) -> int:
        """Bytes of device memory that nothing has reserved."""
        return self.memory_bytes - sum(instance.memory for instance in self.instances.values())


class WorkerSize(msgspec.Struct):
    """What a worker had to give when it was last up: a lost one may come back."""

    server: str
    memory_bytes: int
    max_slots: int


class Room(msgspec.Struct):
    """Room that is made for a model: on which worker, by draining which (worker, model)."""

    worker: str
    victims: list[tuple[str, str]]


class Waiting(msgspec.Struct, omit_defaults=True):
    """`deadline` 0: none, or none that is known here."""

    attempt: int
    accepted: int
    since: int
    priority: int = 0
    deadline: int = 0
    tokens: int = 0


class Placed(msgspec.Struct, omit_defaults=True):
    worker: str
    model: str
    attempt: int
    since: int
    priority: int = 0
    deadline: int = 0


class SlotWish(msgspec.Struct):
    """A running sequence wants a slot elsewhere than on `source`: on the server or worker `to`, anywhere if empty.
    `starts`: how often the model was started for it."""

    attempt: int
    model: str
    source: str
    to: str
    since: int
    starts: int = 0


class Drain(msgspec.Struct, omit_defaults=True):
    """A server that takes nothing new. `until`: when what is left there is left to recovery; `told`: that is over.

    `asked`: workers that have not said yet how much context they hold, in this step; `tokens`: what the others said.
    """

    until: int
    leave: bool = False
    told: bool = False
    asked: dict[str, bool] = {}
    tokens: dict[str, int] = {}


class RunningSequence(msgspec.Struct):
    """What placement knows of a sequence that has a slot. `tokens`: prompt and answer when it got it (0: no text);
    `moves`: how often placement has moved it, or tried to, the last time at `moved_at`."""

    tokens: int
    moves: int = 0
    moved_at: int = 0


class ExchangeUnderWay(msgspec.Struct):
    """What runs on `worker` is going elsewhere, for `request`. `moving`: the sequences that have not got away yet;
    `until`: when it is no longer waited for."""

    worker: str
    request: str
    moving: dict[str, bool]
    until: int


class ExchangeState(msgspec.Struct):
    """`rooms`: exchanges by the model that is to start; `tried`: how often for a waiting request, and when last;
    `sequences` that have a slot, by request; `resume`: a and b by model; `token_ns`: mean time per token by model;
    `spread_at`: when to look again for what shares a device."""

    rooms: dict[str, ExchangeUnderWay] = {}
    tried: dict[str, tuple[int, int]] = {}
    sequences: dict[str, RunningSequence] = {}
    resume: dict[str, ResumeTimes] = {}
    token_ns: dict[str, int] = {}
    spread_at: int = 0


class PlacementState(msgspec.Struct):
    """`queues`: waiting requests by model, each in order of acceptance; `room`: what is drained for a model;
    `placed`: slots in use, and `kept`: slots for those who run elsewhere still, by request; `wishes`: who wants such;
    `draining`: servers that take nothing new; `sources`: where an operator said that models can be fetched;
    `removing`: models that go as soon as they are idle; `sizes`: all workers that were ever up; `refused`: the request
    whose several answers were the last not to find room in the queue."""

    models: dict[str, KnownModel] = {}
    servers: dict[str, Server] = {}
    workers: dict[str, Worker] = {}
    queues: dict[str, dict[str, Waiting]] = {}
    placed: dict[str, Placed] = {}
    kept: dict[str, Placed] = {}
    wishes: dict[str, SlotWish] = {}
    draining: dict[str, Drain] = {}
    sources: dict[str, str] = {}
    sizes: dict[str, WorkerSize] = {}
    room: dict[str, Room] = {}
    removing: dict[str, bool] = {}
    replacing: dict[str, bool] = {}
    waiting: int = 0
    refused: str = ""
    exchange: ExchangeState = msgspec.field(default_factory=ExchangeState)
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
