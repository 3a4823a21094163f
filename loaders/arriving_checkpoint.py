"""A packed checkpoint as tensors while its bytes are on their way to DRAM: views now, numbers after `wait`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from loaders.arrival import Arrival, Interrupted
from loaders.checkpoint import view_tensors
from loaders.errors import CheckpointError
from loaders.manifest import check_agreement, read_manifest
from loaders.mapping import FileMapping
from loaders.packed import WEIGHTS_NAME, read_packed_header


class ArrivingCheckpoint:
    """The model packed in `directory`, whose bytes come to the file that `arrival` names.

    `tensors` are views as those of `open_checkpoint`, of the very memory that DRAM is afterwards. Raises
    CheckpointError where file and arrival are not of one packing.
    """

    def __init__(self, directory: Path, arrival: Arrival) -> None:
        self.manifest = read_manifest(directory)
        self._packed = read_packed_header(directory / WEIGHTS_NAME)
        check_agreement(self.manifest, self._packed, directory)
        if arrival.digest != self.manifest.digest or arrival.chunks != len(self._packed.checksums):
            raise CheckpointError(f"{arrival.weights} is not what lies in {directory}")
        self._arrival = arrival
        self._mapping = FileMapping(arrival.weights, self.manifest.bytes)
        self._mapping.want_huge_pages()
        self.tensors: dict[str, torch.Tensor] = view_tensors(self._mapping, self._packed)
        self._places = {record.name: (record.begin, record.end) for record in self._packed.tensors}
        self._waited: dict[tuple[int, int], bool] = {}

    @property
    def mapped(self) -> bool:
        """Whether all tensors were waited for: none of them faults any more."""
        return len(self._waited) == len(set(self._places.values()))

    def wait(self, names: Iterable[str], stop: Callable[[], bool]) -> None:
        """Until the bytes of these tensors are in memory, checked, and mapped. Raises `Interrupted`."""
        places = sorted({self._places[self._packed.aliases.get(name, name)] for name in names} - self._waited.keys())
        size, start = self._packed.chunk_bytes, self._packed.header.data_start
        for begin, end in places:
            if begin < end:
                self._arrival.wait(begin // size, -(-end // size), stop)
                try:
                    self._mapping.populate(start + begin, start + end)
                except CheckpointError as error:
                    raise Interrupted(str(error)) from error
            self._waited[begin, end] = True

    def let_go(self) -> None:
        """Nothing here refers to the memory any more; what was made of the tensors does. The last call."""
        self.tensors = {}
        del self._mapping

    def map_pages(self) -> None:
        """Everything is in memory by now: map it. Raises CheckpointError."""
        self._mapping.populate(0, self._mapping.bytes)
