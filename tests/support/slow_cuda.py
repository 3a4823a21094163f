"""A CUDA runtime in this machine's memory that copies as late as the real one may, and in any order between streams.

What CUDA promises is kept: the copies of one stream are done in order, and when an event has been synchronised all
copies before it are done. Nothing more: a source that changes before its event is what arrives.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

GARBAGE = 0xEE
ERROR = "CUDA error: an illegal memory access was encountered"


@dataclass
class Stream:
    device: int
    waiting: deque[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=deque)
    given: int = 0
    done: int = 0


class SlowCuda:
    """`eager`: how probable it is that a call lets some stream go on; 0 copies only what somebody waits for.

    `failing` devices take the first `failing[device]` copies, then raise; `lost` ones do not even say what is done by
    then. Breaking the rules of CUDA is an assertion.
    """

    def __init__(
        self, seed: int = 0, eager: float = 0.0, failing: dict[int, int] | None = None, *, lost: bool = False
    ) -> None:
        self._random = random.Random(seed)
        self._eager = eager
        self._failing = dict(failing or {})
        self._lost = lost
        self._lock = threading.RLock()
        self._streams: list[Stream] = []
        self.allocations: list[tuple[int, int]] = []
        self.registered: dict[int, int] = {}
        self.registrations = 0
        self.copies = 0
        self.latest = 0
        """The most copies that were under way at once."""

    def allocate(self, index: int, count: int) -> torch.Tensor:
        with self._lock:
            self.allocations.append((index, count))
        return torch.full((count,), GARBAGE, dtype=torch.uint8)

    def new_stream(self, index: int) -> Any:
        with self._lock:
            self._streams.append(Stream(index))
            return self._streams[-1]

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._lock:
            left = self._failing.get(stream.device)
            if left is not None:
                if left == 0:
                    raise RuntimeError(ERROR)
                self._failing[stream.device] = left - 1
            assert target.nbytes == source.nbytes
            address = source.data_ptr()
            assert any(begin <= address and address + source.nbytes <= end for begin, end in self.registered.items()), (
                "the source is not page-locked: the copy would not run beside the processor"
            )
            stream.waiting.append((target, source))
            stream.given += 1
            self.copies += 1
            self.latest = max(self.latest, sum(len(one.waiting) for one in self._streams))
            self._perhaps_go_on()

    def record(self, stream: Stream) -> Any:
        with self._lock:
            if self._lost and self._failing.get(stream.device) == 0:
                raise RuntimeError(ERROR)
            return stream, stream.given

    def synchronize(self, event: Any) -> None:
        stream, position = event
        with self._lock:
            self._perhaps_go_on()
            while stream.done < position:
                self._one(stream)

    def register(self, address: int, count: int) -> None:
        with self._lock:
            assert address not in self.registered
            self.registered[address] = address + count
            self.registrations += 1

    def unregister(self, address: int) -> None:
        with self._lock:
            begin, end = address, self.registered.pop(address)
            for stream in self._streams:
                for _, source in stream.waiting:
                    assert not begin <= source.data_ptr() < end, "unlocked while copies read from it"

    @property
    def under_way(self) -> int:
        with self._lock:
            return sum(len(stream.waiting) for stream in self._streams)

    def _perhaps_go_on(self) -> None:
        while self._random.random() < self._eager:
            self._one(self._random.choice(self._streams))

    def _one(self, stream: Stream) -> None:
        if stream.waiting:
            target, source = stream.waiting.popleft()
            target.copy_(source)
            stream.done += 1
