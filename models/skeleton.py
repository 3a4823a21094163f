"""A model whose parameters are somebody else's bytes: the module tree without weights, then views put in their places.

Nothing is copied: a parameter is the tensor that was given, also when that is a view of a read-only mapping. What is
in no file (rotary frequencies and other buffers that modules compute for themselves) is computed while the tree is
built: only factories that leave their numbers open go to the meta device, all others run for real. So it holds for
every architecture, without a list of names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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


def assemble(
    config: PretrainedConfig, tensors: Mapping[str, torch.Tensor], device: torch.device, *, encoder: bool = False
) -> Any:
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
    for name, tensor in tensors.items():
        _put(model, name, tensor.to(device), isinstance(own[name], torch.nn.Parameter))
    _tie(model, tensors)
    if missing := _missing(model, tensors):
        raise ModelError(_sentence(model, missing, "lacks", "the checkpoint is incomplete, pack it again"))
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device:
            _put(model, name, buffer.to(device), False)
    return model.eval()


def _common_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    counted = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    if not counted:
        raise ModelError("No floating-point tensor was given: the checkpoint holds no weights.")
    return counted.most_common(1)[0][0]


def _put(model: torch.nn.Module, name: str, tensor: torch.Tensor, parameter: bool) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if parameter:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _tie(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let tied names share the tensor that was given for either of them; names given both keep their own."""
    for one, other in dict(model.all_tied_weights_keys).items():
        for target, source in ((one, other), (other, one)):
            if target not in tensors and source in tensors:
                path, _, leaf = target.rpartition(".")
                model.get_submodule(path)._parameters[leaf] = model.get_parameter(source)


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
