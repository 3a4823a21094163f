"""Where the bytes of a load go: a contract that memory of this machine and memory of devices both obey.

For each piece of a plan a reading thread asks for `room`, reads and checks there, and then says that the piece has
`arrived`, or that it is `dropped`. Pieces come in any order, from several threads at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Protocol

import torch

from loaders.dtypes import DTYPE_OF_NAME, torch_shape, view_elements
from loaders.memory import Block
from loaders.plan import DIRECT_BYTES, LoadPlan, is_aligned


class LoadTarget(Protocol):
    """Any method may raise CheckpointError. After `finish` or `abandon` nothing writes into the tensors any more."""

    huge: bool
    """Whether what is read lands on huge pages."""

    def view(self) -> dict[str, torch.Tensor]:
        """The tensors, aliases included; their numbers are there once `wait` for their pieces has returned.

        Called once, before `finish`, perhaps while pieces arrive.
        """
        ...

    def room(self, index: int) -> memoryview:
        """Where piece `index` is to be read to: its count rounded up to DIRECT_BYTES. May wait for earlier pieces."""
        ...

    def arrived(self, index: int) -> None:
        """The bytes of the piece stand in its room and are right. The room is no longer the caller's."""
        ...

    def dropped(self, index: int) -> None:
        """The piece will not arrive. The room is no longer the caller's."""
        ...

    def wait(self, indices: Iterable[int]) -> None:
        """Until the bytes of these pieces, which have all arrived, are where the tensors have them."""
        ...

    def finish(self) -> float:
        """Until all bytes are where the tensors have them; the seconds that copying them on kept threads busy."""
        ...

    def abandon(self) -> None:
        """The load has failed: until nothing is under way any more. Raises nothing."""
        ...


def room_bytes(count: int) -> int:
    return -(-count // DIRECT_BYTES) * DIRECT_BYTES


class HostTarget:
    """Memory of this machine: pieces are read straight to where tensors view them, nothing is copied."""

    def __init__(self, plan: LoadPlan, block: Block, *, huge: bool) -> None:
        self._plan, self._block, self.huge = plan, block, huge
        self._copied: dict[str, torch.Tensor] = {}
        """Tensors that stand where their dtype may not be viewed; plain files may have such."""

    @functools.cached_property
    def _data(self) -> torch.Tensor:
        """Made when it is first looked at, while the disk is at work: its first use in a process took 5 to 10 ms."""
        return torch.frombuffer(self._block.base, dtype=torch.uint8, count=self._block.bytes)

    def view(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for placed in self._plan.tensors:
            if is_aligned(placed):
                data = self._data[placed.begin : placed.end]
                tensors[placed.name] = view_elements(data, placed.dtype, placed.shape)
            else:
                shape = torch_shape(placed.dtype, placed.shape)
                tensors[placed.name] = torch.empty(shape, dtype=DTYPE_OF_NAME[placed.dtype])
                self._copied[placed.name] = tensors[placed.name]
        for alias, name in self._plan.aliases.items():
            tensors[alias] = tensors[name]
        return tensors

    def room(self, index: int) -> memoryview:
        piece = self._plan.pieces[index]
        return self._block.memory[piece.place : piece.place + room_bytes(piece.count)]

    def arrived(self, index: int) -> None:
        pass

    def dropped(self, index: int) -> None:
        pass

    def wait(self, indices: Iterable[int]) -> None:
        if self._copied:
            self._copy_out(frozenset(indices))

    def finish(self) -> float:
        self._copy_out(frozenset(range(len(self._plan.pieces))))
        return 0.0

    def abandon(self) -> None:
        pass

    def _copy_out(self, there: frozenset[int]) -> None:
        """Each tensor of `_copied` once, when all of its pieces are there."""
        for placed in self._plan.tensors:
            target = self._copied.get(placed.name)
            if target is None:
                continue
            needed = (
                index
                for index, piece in enumerate(self._plan.pieces)
                if piece.place < placed.end and piece.place + piece.count > placed.begin
            )
            if all(index in there for index in needed):
                del self._copied[placed.name]
                target.view(-1).view(torch.uint8).copy_(self._data[placed.begin : placed.end])
