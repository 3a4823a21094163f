"""From a Hugging Face directory to the state of the module that computes it, by way of transformers.

transformers renames and fuses tensors while it loads (the experts of a Mixtral, for example), so the keys of a
checkpoint are not the parameters of the module. What is packed is the module's side of that conversion.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from loaders.errors import CheckpointError, enumerate_some, one_line, quote
from loaders.first_use import probe_forward
from loaders.layout import TensorShape
from loaders.room import memory_ceiling
from loaders.source import SourceCheckpoint

_MODULE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class ModuleState:
    """The state of a loaded module. `tensors` is in order of first use and holds tied tensors once."""

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    """Other names of stored tensors: alias -> name in `tensors`."""
    original_names: dict[str, tuple[str, ...]]
    """Names in the source, for the tensors that were renamed or made of several."""
    architecture: str
    model_type: str
    dtype: str
    parameters: int
    layers: int
    context: int | None
    vocab_size: int
    kv_bytes_per_token: int
    kind: Literal["decoder", "encoder", "stored"] = "decoder"
    """`encoder`: it has no language-model head and makes embeddings only. `stored`: nobody looked what it is."""
    shapes: Mapping[str, TensorShape] = field(default_factory=dict)
    """Dtype and shape as safetensors names them, of tensors for which torch's own do not tell."""


class Examiner(Protocol):
    """Whoever will run a decoder says here whether it can, before anything is written; raises CheckpointError."""

    def configuration(self, config: Any) -> None:
        """Asked before the weights are read."""

    def module(self, model: Any) -> None:
        """Asked with the weights in place."""

    def encoder(self, model: Any) -> None:
        """Asked instead of both for a model that makes embeddings only."""


def load_module_state(source: SourceCheckpoint, examiner: Examiner | None = None) -> ModuleState:
    """Loads the whole model into memory, in the dtype it is stored in. CheckpointError if anything is missing or left
    over, or if `examiner` refuses the model.
    """
    encoder = check_architecture(source)
    dtype = _MODULE_DTYPES.get(source.main_dtype)
    if dtype is None:
        raise CheckpointError(
            f"{source.directory}: its weights are stored as {source.main_dtype}; "
            "quantised checkpoints can be packed as they are stored, and not run (--as-stored)"
        )
    _check_memory(source)
    with quiet_transformers():
        config = _check_config(source.directory)
        _check_tokenizer(source.directory)
        if examiner and not encoder:
            examiner.configuration(config)
        model = _load(source, dtype, encoder=encoder)
        if examiner and encoder:
            examiner.encoder(model)
        elif examiner:
            examiner.module(model)
        state = _state_of(model, source.directory)
        probe = probe_forward(model.config, dtype, builder=_builder(encoder))
        order = [name for name in probe.order if name in state]
        order += [name for name in state if name not in set(order)]
        tensors, aliases = _untie({name: state[name] for name in order}, set(model.all_tied_weights_keys))
        text_config = model.config.get_text_config()
        return ModuleState(
            tensors=tensors,
            aliases=aliases,
            original_names=_original_names(model, source, tensors, aliases),
            architecture=type(model).__name__,
            model_type=str(model.config.model_type),
            dtype=str(dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=int(text_config.num_hidden_layers),
            context=_context(text_config),
            vocab_size=int(text_config.vocab_size),
            kv_bytes_per_token=0 if encoder else probe.kv_bytes_per_token,
            kind="encoder" if encoder else "decoder",
        )


def check_architecture(source: SourceCheckpoint) -> bool:
    """That transformers itself can compute this model, as a decoder (False) or as an encoder (True); no code from the
    checkpoint is ever run.
    """
    where, config = source.directory / "config.json", source.config
    model_type = config.get("model_type")
    if type(model_type) is not str:
        raise CheckpointError(f"{where} names no model_type, so nobody knows how to compute this model")
    version = transformers.__version__
    auto: Any = transformers.models.auto
    known = auto.configuration_auto.CONFIG_MAPPING_NAMES
    if model_type not in known:
        if "auto_map" in config:
            raise CheckpointError(
                f"{where}: {quote(model_type)} needs code that comes with the checkpoint; such code is not run"
            )
        raise CheckpointError(f"{where}: transformers {version} does not know the model type {quote(model_type)}")
    architectures = config.get("architectures")
    if type(architectures) is list and architectures and not hasattr(transformers, str(architectures[0])):
        raise CheckpointError(
            f"{where}: transformers {version} does not know the architecture {quote(str(architectures[0]))}"
        )
    encoder = _is_encoder(config, model_type)
    causal = auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.get("is_encoder_decoder") or not (encoder or model_type in causal):
        raise CheckpointError(
            f"{where}: {quote(model_type)} is not a decoder-only language model, nor an encoder that makes embeddings; "
            "only those can be packed"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where}: the checkpoint is quantised; it can be packed as it is stored, and not run (--as-stored)"
        )
    return encoder


def _is_encoder(config: Mapping[str, Any], model_type: str) -> bool:
    """Whether the checkpoint holds a model without a language-model head, or one with a head for masked words, which
    is left out. A decoder that was saved without its head counts, too: all it can do is make embeddings.
    """
    auto: Any = transformers.models.auto.modeling_auto
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if model_type not in auto.MODEL_MAPPING_NAMES or not (model_type in causal or model_type in masked):
        return False
    architectures = config.get("architectures")
    if type(architectures) is not list or not architectures:
        return model_type in masked and not config.get("is_decoder")
    named = str(architectures[0])
    bare = auto.MODEL_MAPPING_NAMES[model_type]
    if named in ((bare,) if isinstance(bare, str) else bare):
        return True
    return bool(named == masked.get(model_type) and named != causal.get(model_type))


def _builder(encoder: bool) -> Any:
    return transformers.AutoModel if encoder else transformers.AutoModelForCausalLM


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and no progress bars of transformers: what goes wrong here is said in one sentence of ours."""
    log: Any = transformers.utils.logging
    verbosity, progress = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if progress:
            log.enable_progress_bar()


def _load(source: SourceCheckpoint, dtype: torch.dtype, *, encoder: bool) -> Any:
    directory = source.directory
    try:
        loader: Any = _builder(encoder)
        model, found = loader.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=not source.pickled,
            weights_only=True,
            # Not to accept them: so that they are named below, beside what is missing, instead of in a traceback.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # transformers raises whatever the model's own code raises; a user's broken checkpoint must not become a traceback.
    except Exception as error:
        raise CheckpointError(f"{directory}: transformers cannot load it: {one_line(error)}") from error
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"])
    if mismatched:
        raise CheckpointError(
            f"{directory}: the shape of {enumerate_some(mismatched)} is not the one that config.json asks for"
        )
    if encoder:
        _leave_out_heads(model, found)
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(f"{directory}: the weights lack {enumerate_some(missing)}, which the model needs")
    unexpected = sorted(key for key in found["unexpected_keys"] if not key.startswith("__padding__."))
    if unexpected:
        raise CheckpointError(
            f"{directory}: the weights hold {enumerate_some(unexpected)}, which the model does not use"
        )
    if found["error_msgs"]:
        raise CheckpointError(f"{directory}: transformers cannot load it: {found['error_msgs'][0]}")
    return model.eval()


def _leave_out_heads(model: Any, found: dict[str, Any]) -> None:
    """An encoder's heads are of no use for embeddings: the one for masked words that a checkpoint has beside the model
    itself, and the pooler of a checkpoint that was saved without one.
    """
    if type(model).__name__ not in (model.config.architectures or []):
        own = f"{model.base_model_prefix}."
        found["unexpected_keys"] = [key for key in found["unexpected_keys"] if key.startswith(own)]
    if any(key.startswith("pooler.") for key in found["missing_keys"]):
        model.pooler = None
        found["missing_keys"] = [key for key in found["missing_keys"] if not key.startswith("pooler.")]


def _check_config(directory: Path) -> Any:
    """Separately and first, so that a broken config.json is not blamed on the tokenizer, which reads it too."""
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        where = directory / "config.json"
        raise CheckpointError(f"{where}: transformers cannot use it: {one_line(error)}") from error


def _check_tokenizer(directory: Path) -> None:
    try:
        transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{directory}: its tokenizer cannot be used: {one_line(error)}") from error


def _check_memory(source: SourceCheckpoint) -> None:
    available = available_memory_bytes()
    if available is not None and source.bytes > available:
        raise CheckpointError(
            f"{source.directory} holds {source.bytes / 1e9:.1f} GB of weights but only {available / 1e9:.1f} GB "
            "of memory are free; pack it on a larger machine"
        )


def available_memory_bytes() -> int | None:
    """What the machine and the control groups of this process leave; None where nothing is told."""
    ceiling = memory_ceiling()
    return None if ceiling is None else ceiling.free


def _state_of(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, in module order."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise CheckpointError(f"{directory}: the state {quote(name)} of the model is no plain tensor")
        if tensor.is_meta:
            raise CheckpointError(f"{directory}: transformers left {quote(name)} without a value")
        state[name] = tensor.detach()
    return state


def _untie(state: Mapping[str, torch.Tensor], tied_targets: set[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(every tensor once, the other names of those that have several). Of several names the one that transformers
    loads is kept.
    """
    names_by_memory: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        # An empty tensor has no address that could tell it from another empty one.
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        names_by_memory.setdefault(place, []).append(name)
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for names in names_by_memory.values():
        kept = next((name for name in names if name not in tied_targets), names[0])
        tensors[kept] = state[kept]
        aliases.update({name: kept for name in names if name != kept})
    return tensors, dict(sorted(aliases.items()))


def _original_names(
    model: Any, source: SourceCheckpoint, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """For every tensor that is not stored under its own name alone: the names in the source that it was made from."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}
    found: dict[str, list[str]] = {}
    for record in source.tensors:
        name, _ = rename_source_key(record.name, renamings, converters, model.base_model_prefix, state)
        if name not in state and record.name in state:
            name = record.name
        found.setdefault(aliases.get(name, name), []).append(record.name)
    return {name: tuple(found[name]) for name in tensors if found.get(name, [name]) != [name]}


def _context(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        value = getattr(config, name, None)
        if type(value) is int and value > 0:
            return value
    return None
