"""What a node tells a worker's process at its start, and where that process begins: light, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bus.credentials import ConnectionOptions


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """`memory_bytes`: weights and KV cache together; `threads`: those of its steps.

    `catch_up` false: who moves here is let go by its source at once and recomputed after that; for benches.
    """

    nats: ConnectionOptions
    cell: str
    server: str
    index: int
    models: str
    """The directory of packed models."""
    memory_bytes: int
    max_slots: int
    dram: str = ""
    """Where their copies in shared memory lie; empty for none."""
    arrivals: str = ""
    """Where the node's store tells what it is bringing to DRAM; empty for nowhere."""
    device: str = "cpu"
    threads: int = 1
    log_json: bool = False
    catch_up: bool = True


class Beat(Protocol):
    """Memory shared with the node, two numbers: when the worker last had an epoch and a connection, by the monotonic
    clock, and which epoch it has (0 between two)."""

    def __getitem__(self, index: int) -> float: ...

    def __setitem__(self, index: int, value: float) -> None: ...


def start_worker(settings: WorkerSettings, beat: Beat) -> None:
    """The whole life of a worker's process."""
    from actors.worker_process import run_worker

    run_worker(settings, beat)
