"""A drop-in for `from_pretrained`, for people who stay with transformers: the same model, loaded by this room.

    from loaders.hf import from_pretrained

    model = from_pretrained("packed/qwen3")

Weights come by `load_checkpoint` and become the parameters as they lie in memory, without another copy. A packed
directory and a plain one with safetensors both work; what transformers converts while loading, it converts here, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loaders.conversion import quiet_transformers
from loaders.errors import CheckpointError, one_line
from loaders.load import CheckpointLoad, LoadReport, start_load
from loaders.memory import MemoryPool
from loaders.reading import looking_at, require_directory

LOAD_ATTRIBUTE = "checkpoint_load"
"""Where a loaded model carries its `CheckpointLoad`."""
_OURS = ("state_dict", "output_loading_info", "device_map", "subfolder", "gguf_file")
"""Options of transformers that say otherwise where weights come from or go to."""


def from_pretrained(
    directory: Path | str,
    *,
    model_class: Any = None,
    dtype: Any = "auto",
    device: Any = None,
    verify: bool = True,
    pool: MemoryPool | None = None,
    wait: bool = True,
    **options: Any,
) -> Any:
    """The model of a directory in Hugging Face layout, for evaluation. `finish_loading` says how it came.

    `model_class` is a class of transformers, an Auto class included; by default the one that the configuration names.
    `dtype` "auto" keeps the dtype of the weights. `options` go to transformers. Without `wait` the model of a packed
    directory comes back while its weights are on their way: a forward pass waits at each layer for the bytes of that
    layer, so that the first layers compute while the last are read; `finish_loading` waits for all of it. Raises
    CheckpointError where weights are missing, damaged or of another shape; without `wait`, from the forward pass.
    """
    import transformers

    directory = Path(directory)
    with looking_at(directory):
        require_directory(directory)
    for name in _OURS:
        if name in options:
            raise CheckpointError(
                f"from_pretrained of this room takes no {name}: name the `directory` and the `device`"
            )
    dtype = options.pop("torch_dtype", dtype)  # as it was called before
    options.setdefault("local_files_only", True)
    config = options.pop("config", None)
    try:
        if config is None or isinstance(config, str | Path):
            config = transformers.AutoConfig.from_pretrained(config or directory, local_files_only=True)
    # What reads a configuration that nobody vouches for raises whatever comes of it.
    except Exception as error:
        raise CheckpointError(f"{directory} has no configuration that transformers knows: {one_line(error)}") from error
    chosen = _class_of(model_class, config, directory)
    load = start_load(directory, verify=verify, pool=pool)
    try:
        if wait or not load.packed or dtype != "auto" or device is not None:
            load.finish()  # what is converted or copied has to be there first
        model = _model(chosen, config, load.tensors, directory, dtype, options)
    except BaseException:
        load.cancel()
        raise
    setattr(model, LOAD_ATTRIBUTE, load)
    if not load.finished:
        _wait_at_each_module(model, load)
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise CheckpointError(f"{directory} cannot be moved to {device!r}: {one_line(error)}") from error
    return model.eval()


def finish_loading(model: Any) -> LoadReport:
    """Until every weight of the model is there; how it came. CheckpointError where the load failed."""
    load = getattr(model, LOAD_ATTRIBUTE, None)
    if not isinstance(load, CheckpointLoad):
        raise CheckpointError(f"{type(model).__name__} was not loaded by loaders.hf.from_pretrained")
    return load.finish()


def _wait_at_each_module(model: Any, load: CheckpointLoad) -> None:
    """Before a module with parameters of its own computes for the first time, its bytes are there."""
    by_address = {tensor.data_ptr(): name for name, tensor in load.tensors.items()}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        wanted = [by_address[one.data_ptr()] for one in own if one.data_ptr() in by_address]
        if wanted:
            _wait_before(module, load, wanted)


def _wait_before(module: Any, load: CheckpointLoad, wanted: list[str]) -> None:
    def arrive(*_: Any) -> None:
        load.wait(wanted)
        hook.remove()

    hook = module.register_forward_pre_hook(arrive)


def _model(chosen: Any, config: Any, tensors: Any, directory: Path, dtype: Any, options: dict[str, Any]) -> Any:
    import transformers

    try:
        with quiet_transformers():
            model, found = chosen.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
                **options,
            )
    # transformers raises whatever the model's own code raises.
    except Exception as error:
        said = one_line(error)
        if "ignore_mismatched_sizes" in said:  # the report that it speaks of is not shown
            said = "its tensors have other shapes than config.json asks for"
        raise CheckpointError(f"{directory} does not fit {chosen.__name__}: {said}") from error
    missing = sorted(found["missing_keys"]) or [key for key, *_ in found["mismatched_keys"]]
    if missing:
        raise CheckpointError(
            f"{directory} has no {missing[0]!r} that fits {chosen.__name__}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; pack or download it again"
        )
    if (directory / "generation_config.json").exists() and chosen.can_generate():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:
            where = directory / "generation_config.json"
            raise CheckpointError(f"{where}: transformers cannot use it: {one_line(error)}") from error
    model.name_or_path = str(directory)
    return model


def _class_of(model_class: Any, config: Any, directory: Path) -> Any:
    import transformers

    if model_class is None:
        names = config.architectures or []
        model_class = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
        if model_class is None:
            raise CheckpointError(
                f"{directory}: transformers {transformers.__version__} has no class {names[0]!r}; name a model_class"
            )
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise CheckpointError(f"{directory}: {model_class!r} is no class of models; name another model_class")
        return model_class
    try:
        return mapping[type(config)]
    except KeyError:
        raise CheckpointError(
            f"{directory}: {model_class.__name__} knows no {type(config).__name__}; name another model_class"
        ) from None
