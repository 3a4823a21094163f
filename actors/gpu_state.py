"""What the deciding half of one worker keeps: instances, sequences, who follows, and epochs to seal."""

from __future__ import annotations

from typing import Literal

import msgspec

from bus.messages import AddReader, ModelCard, Tier, WorkerStarted


class Instance(msgspec.Struct):
    """One model on this device. `evicting`: models that are detached first; `asked`: for its lease; `leased`: it
    lies in DRAM for us."""

    slots: int
    kv_bytes: int
    context: int
    status: Literal["waiting", "attaching", "running", "detaching"] = "waiting"
    evicting: list[str] = []
    asked: bool = True
    leased: bool = False
    digest: str = ""
    tier: Tier = "ssd"
    streamed: bool = False
    sources: tuple[str, ...] = ()
    urgent: bool = True
    card: ModelCard | None = None
    keep: tuple[str, ...] = ()


class HeldSequence(msgspec.Struct):
    """A sequence that the driver was told to run; `next` as last reported. Its pages stand behind page `after`.

    `several`: it is one of several answers, whose readers' streams end only behind all of them.
    """

    request: str
    attempt: int
    model: str
    next: int
    after: int = 0
    several: bool = False
    prompt_tokens: int = 0


class Standby(msgspec.Struct):
    """A sequence that runs elsewhere and is followed here; `dropping`: it is to be forgotten."""

    request: str
    attempt: int
    model: str
    several: bool = False
    dropping: bool = False


class Sealing(msgspec.Struct):
    """A closed epoch whose token subject is not sealed yet. `parts`: which parts of the statement have come.

    `left`: its worker was told to end, which is no death of its sequences.
    """

    sequences: dict[str, HeldSequence]
    parts: dict[int, bool] = {}
    left: bool = False


class GpuState(msgspec.Struct):
    server: str = ""
    epoch: int = 0
    last_page: int = 0
    started: WorkerStarted | None = None
    instances: dict[str, Instance] = {}
    sequences: dict[str, HeldSequence] = {}
    standbys: dict[str, Standby] = {}
    readers: list[AddReader] = []
    sealing: dict[int, Sealing] = {}
