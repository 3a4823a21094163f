"""A tiny packed model for tests of storage and workers: real files, random weights."""

from __future__ import annotations

from pathlib import Path

from bus.subjects import escape_model
from loaders import pack_checkpoint
from models.sample import make_sample


def pack_sample(
    models: Path,
    name: str,
    *,
    seed: int = 1,
    arch: str = "llama",
    parameters: int = 1_500_000,
    dtype: str = "float32",
    context: int = 512,
) -> Path:
    """Make a sample and pack it under `models` as the model `name`; its packed directory."""
    source = models.parent / f"source-{escape_model(name)}-{seed}"
    make_sample(source, arch=arch, parameters=parameters, seed=seed, dtype=dtype, context=context)
    directory = models / escape_model(name)
    models.mkdir(parents=True, exist_ok=True)
    pack_checkpoint(source, directory)
    return directory
