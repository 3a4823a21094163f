"""A model that computes its first layers while the bytes of the last ones are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Wait = Callable[[list[str]], None]


class LayerGate:
    """Before a part of `model` computes, `wait` is called with the names of the tensors in it.

    The parts are the entries of the outermost lists of modules (the layers, each as a whole, whatever is used by whom
    inside of it) and every module outside of these that has tensors of its own. What `wait` raises leaves the forward
    pass. `tensors` are what the parameters and buffers of the model refer to, by name.
    """

    def __init__(self, model: Any, tensors: Mapping[str, torch.Tensor], wait: Wait) -> None:
        self._wait = wait
        self._closed: dict[int, list[str]] = {}
        self._hooks: list[Any] = []
        by_address = {tensor.data_ptr(): name for name, tensor in tensors.items() if tensor.numel()}
        for number, (module, whole) in enumerate(_parts(model)):
            own = [*module.parameters(recurse=whole), *module.buffers(recurse=whole)]
            names = list(dict.fromkeys(by_address[one.data_ptr()] for one in own if one.data_ptr() in by_address))
            if names:
                self._closed[number] = names
                self._hooks.append(module.register_forward_pre_hook(self._gate(number, names)))
        self.parts = len(self._closed)
        """How many there are."""

    @property
    def closed(self) -> int:
        """How many parts nobody has waited for yet."""
        return len(self._closed)

    @property
    def passed(self) -> bool:
        """Whether every part was waited for. One that was not may have been used past its gate: nothing that a forward
        pass then computed may be relied on.
        """
        return not self._closed

    def open(self) -> None:
        """Let everything pass from now on. Not to be called while the model computes."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _gate(self, number: int, names: list[str]) -> Callable[..., None]:
        def pass_through(*_: Any) -> None:
            self._wait(names)
            self._closed.pop(number, None)

        return pass_through


def _parts(module: Any) -> Iterator[tuple[Any, bool]]:
    """Modules, and whether each stands for all that is in it."""
    if isinstance(module, torch.nn.ModuleList):
        yield from ((entry, True) for entry in module)
        return
    yield module, False
    for child in module.children():
        yield from _parts(child)
