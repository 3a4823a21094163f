"""In which order a model first uses its parameters, and what a token costs in its cache: asked of the model itself,
on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ForwardProbe:
    """`order`: names of parameters and buffers as a forward pass comes to them; shorter than the model if the pass
    failed.
    """

    order: tuple[str, ...]
    kv_bytes_per_token: int
    complete: bool


def probe_forward(config: Any, dtype: torch.dtype, *, builder: Any = None) -> ForwardProbe:
    """Runs one forward pass without data, of what `builder` (a class of transformers, AutoModelForCausalLM by default)
    makes. Where the model's code needs data (some routers do), the pass ends early:
    then the order
    is what was seen until there, and the cache is computed from the configuration instead of measured."""
    order: dict[str, None] = {}
    try:
        with torch.device("meta"):
            builder = builder or transformers.AutoModelForCausalLM
            model = builder.from_config(config, dtype=dtype).eval()
        hooks = [
            module.register_forward_pre_hook(_note_names(order, [f"{path}.{name}" if path else name for name in own]))
            for path, module in model.named_modules()
            if (own := [*module._parameters, *module._buffers])
        ]
        with torch.no_grad():
            tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
            cache = getattr(model(input_ids=tokens, use_cache=True), "past_key_values", None)
        for hook in hooks:
            hook.remove()
        return ForwardProbe(tuple(order), _measure_cache(cache) if cache is not None else 0, True)
    # Any model's own code runs here, and all it can cost is an order that is a little less good.
    except Exception:
        return ForwardProbe(tuple(order), _compute_cache(config.get_text_config(), dtype), False)


def _note_names(order: dict[str, None], names: list[str]) -> Any:
    def note(module: torch.nn.Module, arguments: object) -> None:
        for name in names:
            order.setdefault(name)

    return note


def _measure_cache(cache: Any) -> int:
    """Bytes per token over all layers; layers whose state does not grow with the sequence count nothing."""
    total = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None and tensor.dim() == 4 and tensor.shape[-2] == _PROBE_TOKENS:
                total += tensor.numel() * tensor.element_size() // _PROBE_TOKENS
    return total


def _compute_cache(config: Any, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(head_dim) * dtype.itemsize
