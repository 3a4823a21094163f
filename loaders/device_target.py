"""Loading to devices: which tensor goes where, one allocation per device, and pieces copied while others are read.

    disk ─▶ chunk of the staging ring ─▶ checksum ─▶ copies on side streams ─▶ each device's one allocation

The files do not know how many devices there are: the plan is cut here, when it is loaded.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from loaders.device import Copy, Device, DeviceLost, find_device
from loaders.dtypes import view_elements
from loaders.errors import CheckpointError, quote
from loaders.memory import round_up
from loaders.plan import LoadPlan, PlacedTensor
from loaders.staging import Chunk, Mark, StagingRing
from loaders.targets import room_bytes

TENSOR_ALIGNMENT = 256
"""What CUDA's own allocations are aligned to at least, and what kernels with vector loads want."""
RING_CHUNKS = 12
"""More than there are reading threads: some are read into while others are copied from."""

DeviceName = str | torch.device
DeviceMap = Mapping[str, DeviceName]
"""A tensor's name, or the beginning of it up to a dot, to a device; the longest that fits counts, `""` fits all."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [begin, end) of the plan's memory stand on device `device` from `offset`."""

    begin: int
    end: int
    device: int
    offset: int


def choose_devices(plan: LoadPlan, wanted: DeviceName | DeviceMap) -> dict[str, str]:
    """The device of each tensor that is stored. An alias lies where its tensor lies, whatever the map says of it."""
    names = [tensor.name for tensor in plan.tensors]
    if not isinstance(wanted, Mapping):
        return dict.fromkeys(names, str(wanted))
    chosen = {}
    for name in names:
        prefix = name
        while prefix not in wanted:
            if not prefix:
                raise CheckpointError(f"the map of devices says nothing of tensor {quote(name)}; add it, or '' for all")
            prefix = prefix.rpartition(".")[0]
        chosen[name] = str(wanted[prefix])
    return chosen


@dataclass(frozen=True, slots=True)
class Layout:
    """`spans` by rising begin; the offset of each tensor on its device; the bytes that each device needs."""

    spans: tuple[Span, ...]
    offsets: Mapping[str, int]
    device_bytes: tuple[int, ...]


def lay_out(tensors: Iterable[PlacedTensor], device_of: Mapping[str, int], devices: int) -> Layout:
    """Cut a plan over `devices`, of which `device_of` gives each tensor one.

    Tensors of one device follow each other in the order of the files, each at a multiple of TENSOR_ALIGNMENT.
    Neighbours that keep their distance are one span, so that a piece is one copy and not one per tensor.
    """
    used = [0] * devices
    spans: list[Span] = []
    offsets: dict[str, int] = {}
    for tensor in sorted(tensors, key=lambda one: (one.begin, one.end)):
        device = device_of[tensor.name]
        offset = offsets[tensor.name] = round_up(used[device], TENSOR_ALIGNMENT)
        used[device] = offset + tensor.end - tensor.begin
        last = spans[-1] if spans else None
        if (
            last is not None
            and last.device == device
            and tensor.begin - last.end < TENSOR_ALIGNMENT
            and offset - last.offset == tensor.begin - last.begin
        ):
            spans[-1] = Span(last.begin, tensor.end, device, last.offset)
        else:
            spans.append(Span(tensor.begin, tensor.end, device, offset))
    return Layout(tuple(spans), offsets, tuple(used))


class DeviceTarget:
    """A `LoadTarget` over devices. `ring` may be shared with other loads; one that is not given is made and closed."""

    def __init__(
        self, plan: LoadPlan, devices: Mapping[str, Device], chosen: Mapping[str, str], ring: StagingRing | None = None
    ):
        """`devices` by the names that `chosen` gives to tensors."""
        self._plan = plan
        self._devices = list(devices.values())
        numbers = {name: number for number, name in enumerate(devices)}
        self._device_of = {name: numbers[device] for name, device in chosen.items()}
        self._layout = lay_out(plan.tensors, self._device_of, len(devices))
        self._begins = [span.begin for span in self._layout.spans]
        largest = max((room_bytes(piece.count) for piece in plan.pieces), default=1)
        if ring is not None and ring.chunk_bytes < largest:
            raise CheckpointError(
                f"{plan.directory} comes in pieces of {largest >> 10} KiB, the staging ring has chunks of "
                f"{ring.chunk_bytes >> 10} KiB; make one with larger chunks"
            )
        sizes = self._layout.device_bytes
        self._memory = [device.allocate(count) for device, count in zip(self._devices, sizes, strict=True)]
        self._owns_ring = ring is None
        # Locked by one of them, pages are locked for all.
        lock = next((device.lock_pages for device in self._devices if device.name != "cpu"), None)
        self._ring = ring or StagingRing(largest, RING_CHUNKS, lock)
        self.huge = self._ring.huge
        self._lock = threading.Lock()
        self._chunks: dict[int, Chunk] = {}
        self._marks: dict[int, list[Mark]] = {}
        self._copy_seconds = 0.0

    def view(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for placed in self._plan.tensors:
            memory = self._memory[self._device_of[placed.name]]
            begin = self._layout.offsets[placed.name]
            data = memory[begin : begin + placed.end - placed.begin]
            tensors[placed.name] = view_elements(data, placed.dtype, placed.shape)
        for alias, name in self._plan.aliases.items():
            tensors[alias] = tensors[name]
        return tensors

    def room(self, index: int) -> memoryview:
        began = time.perf_counter()
        chunk = self._ring.take()
        with self._lock:
            self._chunks[index] = chunk
            self._copy_seconds += time.perf_counter() - began
        return chunk.memory[: room_bytes(self._plan.pieces[index].count)]

    def arrived(self, index: int) -> None:
        began = time.perf_counter()
        with self._lock:
            chunk = self._chunks.pop(index)
        marks: list[Mark] = []
        try:
            for device, copies in self._copies(index, chunk).items():
                marks.append(self._devices[device].copy(copies))
        except BaseException as error:
            if isinstance(error, DeviceLost):
                self._ring.lose(chunk)
            else:
                self._ring.give_back(chunk, marks)
            raise
        finally:
            with self._lock:
                self._marks[index] = marks
                self._copy_seconds += time.perf_counter() - began
        self._ring.give_back(chunk, marks)

    def dropped(self, index: int) -> None:
        with self._lock:
            chunk = self._chunks.pop(index, None)
        if chunk is not None:
            self._ring.give_back(chunk)

    def wait(self, indices: Iterable[int]) -> None:
        for index in indices:
            with self._lock:
                marks = self._marks.get(index, [])
            for mark in marks:
                mark.wait()

    def finish(self) -> float:
        began = time.perf_counter()
        try:
            self.wait(range(len(self._plan.pieces)))
        except BaseException:
            self.abandon()
            raise
        self._close()
        return self._copy_seconds + time.perf_counter() - began

    def abandon(self) -> None:
        with self._lock:
            marks = [mark for marks in self._marks.values() for mark in marks]
        for mark in marks:
            try:
                mark.wait()
            except CheckpointError:
                continue  # its device is gone, and what is to be told of that is told already
        try:
            self._close()
        except CheckpointError:
            pass

    def _close(self) -> None:
        if self._owns_ring:
            self._ring.close()

    def _copies(self, index: int, chunk: Chunk) -> dict[int, list[Copy]]:
        """By device: what of this piece goes there."""
        piece = self._plan.pieces[index]
        end = piece.place + piece.count
        found: dict[int, list[Copy]] = {}
        number = max(0, bisect.bisect_right(self._begins, piece.place) - 1)
        spans = self._layout.spans
        while number < len(spans) and spans[number].begin < end:
            span = spans[number]
            low, high = max(span.begin, piece.place), min(span.end, end)
            if low < high:
                to = span.offset + low - span.begin
                target = self._memory[span.device][to : to + high - low]
                found.setdefault(span.device, []).append((target, chunk.data[low - piece.place : high - piece.place]))
            number += 1
        return found


def open_device_target(plan: LoadPlan, wanted: DeviceName | DeviceMap, ring: StagingRing | None = None) -> DeviceTarget:
    """The target for `wanted`. Raises CheckpointError where a device is not here, or has no room."""
    chosen = choose_devices(plan, wanted)
    devices = {name: find_device(name) for name in dict.fromkeys(chosen.values())}
    return DeviceTarget(plan, devices, chosen, ring)
