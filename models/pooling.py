"""From the hidden states of a sequence to one vector, as the checkpoint says.

A checkpoint in the layout of sentence-transformers says it in `modules.json` and the folders that this names: a
transformer, then a pooling (`1_Pooling/config.json`), then perhaps a normalisation. Without `modules.json`:

* a decoder gives the hidden state of the last token, the only one that has seen the whole text;
* an encoder gives what `classifier_pooling` of its config.json says (`cls` or `mean`), else the mean over all tokens;
* nothing is normalised.

Sums are made in float32, or in float64 where the model computes in that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.errors import ModelError

FILE_LIMIT_BYTES = 1 << 20
_EMPTY = 1e-9


def _mask(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[rows, tokens, 1]: 1 for the tokens of a row, 0 for its padding on the right."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    return (places[None, :] < lengths[:, None]).to(hidden.dtype)[:, :, None]


def _cls(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _last(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]


def _max(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(_mask(hidden, lengths) == 0, -torch.inf).amax(dim=1)


def _mean(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    mask = _mask(hidden, lengths)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=_EMPTY)


def _mean_sqrt(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    mask = _mask(hidden, lengths)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=_EMPTY).sqrt()


def _weighted_mean(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
    weights = _mask(hidden, lengths) * places[None, :, None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=_EMPTY)


_MODES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""In the order in which several are put behind each other. Each takes [rows, tokens, width] and [rows]."""

_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How vectors are made. `modes` are put behind each other; `longest` is the checkpoint's own bound in tokens."""

    modes: tuple[str, ...]
    normalize: bool = False
    longest: int | None = None

    def __call__(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Vectors [rows, width * modes] of hidden states [rows, tokens, width], padded on the right to `lengths`."""
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        vectors = torch.cat([_MODES[mode](wide, lengths) for mode in self.modes], dim=1)
        return torch.nn.functional.normalize(vectors, p=2, dim=1) if self.normalize else vectors


def read_pooling(directory: Path, config: Any, *, encoder: bool) -> Pooling:
    """What a checkpoint says, or the default (see above). Raises `ModelError` for what cannot be computed here."""
    modules = _read(directory / "modules.json")
    longest = _longest(directory)
    if modules is None:
        if not encoder:
            return Pooling(("lasttoken",), longest=longest)
        return Pooling(("cls" if getattr(config, "classifier_pooling", None) == "cls" else "mean",), longest=longest)
    where = directory / "modules.json"
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{where} is not a list of modules: copy it again from the model's source.")
    pooling: Pooling | None = None
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = str(module.get("path", ""))
        if kind == "Transformer":
            if path not in ("", "."):
                raise ModelError(f"{where} says that the weights lie in {path!r}: they must lie beside it.")
        elif kind == "Pooling" and pooling is None:
            pooling = Pooling(_modes(directory, path), longest=longest)
        elif kind == "Normalize" and pooling is not None:
            pooling = Pooling(pooling.modes, True, longest)
        else:
            raise ModelError(
                f"{where} names a module of kind {kind[:64]!r}, which is not supported: "
                "one Transformer, one Pooling and at most one Normalize are."
            )
    if pooling is None:
        raise ModelError(f"{where} names no Pooling: nothing says how a vector is made of many tokens.")
    return pooling


def _modes(directory: Path, path: str) -> tuple[str, ...]:
    if not path or "/" in path or "\\" in path or path in (".", ".."):
        raise ModelError(f"{directory / 'modules.json'} has no plain folder for its Pooling: {path[:64]!r}.")
    where = directory / path / "config.json"
    said = _read(where)
    if not isinstance(said, dict):
        raise ModelError(f"{where} is missing or not an object: copy it from the model's source.")
    named = said.get("pooling_mode")
    wanted = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    wanted = [*wanted, *(mode for switch, mode in _SWITCHES.items() if said.get(switch) is True)]
    modes = tuple(mode for mode in _MODES if mode in wanted)
    unknown = [mode for mode in wanted if mode not in _MODES]
    if unknown or not modes:
        got = f"{str(unknown[0])[:64]!r}" if unknown else "none"
        raise ModelError(f"{where} asks for a pooling of kind {got}: known are {', '.join(_MODES)}.")
    return modes


def _longest(directory: Path) -> int | None:
    said = _read(directory / "sentence_bert_config.json")
    longest = said.get("max_seq_length") if isinstance(said, dict) else None
    return longest if type(longest) is int and longest > 0 else None


def _read(path: Path) -> Any:
    """The document in a small file; None where there is no such file."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > FILE_LIMIT_BYTES:
            raise ModelError(f"{path} has more than {FILE_LIMIT_BYTES} bytes: it is no such configuration.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: copy it again from the model's source.") from error
