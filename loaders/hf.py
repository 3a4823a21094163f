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
from loaders.errors import CheckpointError
from loaders.load import LoadReport, load_checkpoint
from loaders.memory import MemoryPool

REPORT_ATTRIBUTE = "load_report"
"""Where a loaded model carries its `LoadReport`."""


def from_pretrained(
    directory: Path | str,
    *,
    model_class: Any = None,
    dtype: Any = "auto",
    device: Any = None,
    verify: bool = True,
    pool: MemoryPool | None = None,
    **options: Any,
) -> Any:
    """The model of a directory in Hugging Face layout, for evaluation; its attribute `load_report` says how it came.

    `model_class` is a class of transformers, an Auto class included; by default the one that the configuration names.
    `dtype` "auto" keeps the dtype of the weights. `options` go to transformers. Raises CheckpointError where weights
    are missing, damaged or of another shape.
    """
    import transformers

    directory = Path(directory)
    try:
        config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{directory} has no configuration that transformers knows: {first}") from error
    chosen = _class_of(model_class, config, directory)
    loaded = load_checkpoint(directory, verify=verify, pool=pool)
    try:
        with quiet_transformers():
            model, found = chosen.from_pretrained(
                None,
                config=config,
                state_dict=dict(loaded.tensors),
                dtype=dtype,
                output_loading_info=True,
                **options,
            )
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} does not fit {chosen.__name__}: {error}") from error
    missing = sorted(found["missing_keys"]) or [key for key, *_ in found["mismatched_keys"]]
    if missing:
        raise CheckpointError(
            f"{directory} has no {missing[0]!r} that fits {chosen.__name__}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; pack or download it again"
        )
    if (directory / "generation_config.json").exists() and chosen.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    model.name_or_path = str(directory)
    setattr(model, REPORT_ATTRIBUTE, loaded.report)
    return (model if device is None else model.to(device)).eval()


def report_of(model: Any) -> LoadReport:
    """How a model came that `from_pretrained` of this module loaded."""
    report = getattr(model, REPORT_ATTRIBUTE, None)
    if not isinstance(report, LoadReport):
        raise CheckpointError(f"{type(model).__name__} was not loaded by loaders.hf.from_pretrained")
    return report


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
        return model_class
    try:
        return mapping[type(config)]
    except KeyError:
        raise CheckpointError(
            f"{directory}: {model_class.__name__} knows no {type(config).__name__}; name another model_class"
        ) from None
