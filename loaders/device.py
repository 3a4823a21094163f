"""Devices that tensors may be loaded to: this machine's processor, and CUDA devices. Not yet run on a GPU.

A device allocates once, and copies on streams of its own beside whatever else it computes. A copy is not done when
`copy` returns: it is when the mark that it returns has passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from loaders.errors import CheckpointError
from loaders.memory import MemoryPool
from loaders.staging import Mark

Copy = tuple[torch.Tensor, torch.Tensor]
"""(target on the device, source in this machine's memory): bytes, equally many."""
SIDE_STREAMS = 2
"""One copies while the other's next copy is being set up; a device has one engine for this direction or two."""
_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every device, not only for the current one."""


class DeviceLost(CheckpointError):
    """The device does not answer any more: nobody knows what it still reads."""


class Device(Protocol):
    """What a load asks of a device. Safe to use from several threads."""

    name: str

    def allocate(self, count: int) -> torch.Tensor:
        """`count` bytes, aligned to 256. They live as long as anything refers to them."""
        ...

    def copy(self, copies: Sequence[Copy]) -> Mark:
        """Begin these copies. When the mark has passed, targets are there for every stream, sources may change.

        Raises CheckpointError, and then nothing of them is under way any more, or DeviceLost.
        """
        ...

    def lock_pages(self, address: int, count: int) -> Callable[[], None]:
        """Lock memory of this machine, so that copies from it to any device run beside the processor; how to unlock it.

        What is locked already must not be locked again.
        """
        ...


class _Passed:
    def wait(self) -> None:
        pass


class CpuDevice:
    """This machine's memory: a copy is done when `copy` returns."""

    name = "cpu"

    def allocate(self, count: int) -> torch.Tensor:
        block = MemoryPool(max(1, count), populate=False).take(max(1, count))
        return torch.frombuffer(block.base, dtype=torch.uint8, count=max(1, count))[:count]

    def copy(self, copies: Sequence[Copy]) -> Mark:
        for target, source in copies:
            target.copy_(source)
        return _Passed()

    def lock_pages(self, address: int, count: int) -> Callable[[], None]:
        return lambda: None


class CudaRuntime(Protocol):
    """The few calls of CUDA that a load needs, so that tests can put a runtime in their place that delays copies."""

    def allocate(self, index: int, count: int) -> torch.Tensor: ...

    def new_stream(self, index: int) -> Any:
        """A stream whose work begins after what the device's current stream has been given until now."""
        ...

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def record(self, stream: Any) -> Any:
        """An event behind everything that the stream has been given until now."""
        ...

    def synchronize(self, event: Any) -> None: ...

    def register(self, address: int, count: int) -> None: ...

    def unregister(self, address: int) -> None: ...


class TorchCuda:
    """CUDA by torch."""

    def allocate(self, index: int, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, device=f"cuda:{index}")

    def new_stream(self, index: int) -> Any:
        stream = torch.cuda.Stream(device=index)  # type: ignore[no-untyped-call]
        # The allocator gives out memory that kernels of the current stream may not have finished with.
        stream.wait_stream(torch.cuda.current_stream(index))
        return stream

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            # Should nobody wait for this copy, the allocator still must not give the memory to another too early.
            target.record_stream(stream)

    def record(self, stream: Any) -> Any:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def register(self, address: int, count: int) -> None:
        self._check(torch.cuda.cudart().cudaHostRegister(address, count, _PORTABLE), "lock memory")  # type: ignore[no-untyped-call]

    def unregister(self, address: int) -> None:
        self._check(torch.cuda.cudart().cudaHostUnregister(address), "unlock memory")  # type: ignore[no-untyped-call]

    @staticmethod
    def _check(result: Any, what: str) -> None:
        if int(result) != 0:
            raise CheckpointError(f"CUDA does not {what}: error {int(result)}; a smaller staging ring may help")


class _Event:
    def __init__(self, runtime: CudaRuntime, event: Any, name: str) -> None:
        self._runtime, self._event, self._name = runtime, event, name

    def wait(self) -> None:
        try:
            self._runtime.synchronize(self._event)
        except RuntimeError as error:
            raise CheckpointError(f"{self._name} failed while weights were copied to it: {error}") from error


class CudaDevice:
    """One GPU, with streams of its own for copies. Make it anew for each load: its streams begin after what ran."""

    def __init__(self, index: int, runtime: CudaRuntime | None = None, *, streams: int = SIDE_STREAMS) -> None:
        self.name = f"cuda:{index}"
        self._index = index
        self._runtime = runtime or TorchCuda()
        self._count = streams
        self._streams: list[Any] = []
        self._turn = itertools.count()

    def allocate(self, count: int) -> torch.Tensor:
        try:
            memory = self._runtime.allocate(self._index, count)
        except RuntimeError as error:
            first = (str(error).splitlines() or ["no reason given"])[0]
            raise CheckpointError(f"{self.name} has no room for {count / 1e9:.2f} GB of weights: {first}") from error
        # Behind the allocation, so that they wait for whatever still uses that memory.
        self._streams = [self._runtime.new_stream(self._index) for _ in range(self._count)]
        return memory

    def copy(self, copies: Sequence[Copy]) -> Mark:
        assert self._streams, "allocate comes before copy"
        stream = self._streams[next(self._turn) % len(self._streams)]
        try:
            for target, source in copies:
                self._runtime.copy(stream, target, source)
            return _Event(self._runtime, self._runtime.record(stream), self.name)
        except RuntimeError as error:
            try:
                self._runtime.synchronize(self._runtime.record(stream))
            except RuntimeError:
                raise DeviceLost(f"{self.name} does not answer any more: {error}") from error
            raise CheckpointError(f"{self.name} takes no more weights: {error}") from error

    def lock_pages(self, address: int, count: int) -> Callable[[], None]:
        self._runtime.register(address, count)
        return lambda: self._runtime.unregister(address)


def find_device(name: str | torch.device) -> Device:
    """The device that torch calls so. Raises CheckpointError where this machine has none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(f"{str(name)!r} names no device; write cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return CpuDevice()
    if device.type != "cuda":
        raise CheckpointError(f"weights cannot be loaded to {device}: only to cpu and cuda devices")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise CheckpointError(
            f"{device} is not here: torch sees {count} CUDA devices; load to cpu, or look at the driver"
        )
    return CudaDevice(index)
