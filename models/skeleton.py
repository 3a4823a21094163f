"""A model whose parameters are somebody else's bytes: the module tree without weights, then views put in their places.

Nothing is copied: a parameter is the tensor that was given, also when that is a view of a read-only mapping. What is
in no file (rotary frequencies and other buffers that modules compute for themselves) is computed while the tree is
built: only factories that leave their numbers open go to the meta device, all others run for real. So it holds for
every architecture, without a list of names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from models.errors import ModelError

_OPEN = {torch.empty, torch.empty_strided, torch.rand, torch.randn, torch.normal}
_NAMED_AT_MOST = 5


class _OpenNumbersOnMeta(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OPEN and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Place(NamedTuple):
    """Where the tensor `name` goes."""

    module: torch.nn.Module
    leaf: str
    name: str
    parameter: bool


class Skeleton:
    """A model, and every place in it where a tensor of its checkpoint goes.

    What is checked and built once holds for every further mapping of the same checkpoint: `empty` lets go of the
    tensors, `fill` puts others of the same names, shapes and numbers in their places.
    """

    def __init__(self, model: Any, places: list[_Place]) -> None:
        self.model = model
        self._places = places

    def empty(self) -> None:
        """Nothing of a checkpoint is referred to any more; the model cannot compute until it is filled."""
        hollow = {}
        for place in self._places:
            hollow[place.name] = torch.empty_like(getattr(place.module, place.leaf).detach(), device="meta")
        self._put(hollow)

    def fill(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Put the tensors of the checkpoint that this was made of; those elsewhere are copied to `device`."""
        self._put({place.name: tensors[place.name].to(device) for place in self._places})

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tied places share one parameter."""
        parameters: dict[str, torch.nn.Parameter] = {}
        for place in self._places:
            tensor = tensors[place.name]
            if not place.parameter:
                place.module._buffers[place.leaf] = tensor
                continue
            if place.name not in parameters:
                parameters[place.name] = torch.nn.Parameter(tensor, requires_grad=False)
            place.module._parameters[place.leaf] = parameters[place.name]


def assemble(
    config: PretrainedConfig, tensors: Mapping[str, torch.Tensor], device: torch.device, *, encoder: bool = False
) -> Skeleton:
    """The causal language model of `config` (with `encoder` the model without a head) whose parameters are `tensors`,
    by the module's own names.

    Tensors elsewhere are copied to `device`. Raises ModelError naming what is missing, unexpected, of another shape or
    without numbers.
    """
    builder: Any = AutoModel if encoder else AutoModelForCausalLM
    with no_init_weights(), _OpenNumbersOnMeta():
        model: Any = builder.from_config(config, dtype=_common_dtype(tensors))
    if encoder and not any(name.startswith("pooler.") for name in tensors) and hasattr(model, "pooler"):
        model.pooler = None  # embeddings do not use it, and this checkpoint was saved without one
    own = model.state_dict(keep_vars=True)
    if unexpected := [name for name in tensors if name not in own]:
        raise ModelError(_sentence(model, unexpected, "has no place for", "pack the checkpoint again"))
    if wrong := [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]:
        raise ModelError(_sentence(model, wrong, "expects other shapes of", "config.json and weights do not belong"))
    places = [_place(model, name, name, isinstance(own[name], torch.nn.Parameter)) for name in tensors]
    places += [_place(model, target, source, True) for target, source in _ties(model, tensors)]
    skeleton = Skeleton(model, places)
    skeleton.fill(tensors, device)
    if missing := _missing(model, tensors):
        raise ModelError(_sentence(model, missing, "lacks", "the checkpoint is incomplete, pack it again"))
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device:
            own_place = _place(model, name, name, False)
            own_place.module._buffers[own_place.leaf] = buffer.to(device)
    model.eval()
    return skeleton


def _common_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    counted = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    if not counted:
        raise ModelError("No floating-point tensor was given: the checkpoint holds no weights.")
    return counted.most_common(1)[0][0]


def _place(model: torch.nn.Module, where: str, name: str, parameter: bool) -> _Place:
    path, _, leaf = where.rpartition(".")
    return _Place(model.get_submodule(path), leaf, name, parameter)


def _ties(model: Any, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """(target, source): tied names share the tensor that was given for either of them; names given both keep theirs."""
    return [
        (target, source)
        for one, other in dict(model.all_tied_weights_keys).items()
        for target, source in ((one, other), (other, one))
        if target not in tensors and source in tensors
    ]


def _missing(model: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in no file and tied to none, and whatever else has no numbers."""
    given = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in tensors}
    absent = [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in given]
    hollow = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    return list(dict.fromkeys(absent + hollow))


def _sentence(model: Any, names: list[str], what: str, remedy: str) -> str:
    shown = ", ".join(names[:_NAMED_AT_MOST])
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return f"{type(model).__name__} {what} {shown}{more}: {remedy}."
