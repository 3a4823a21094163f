"""Samples that tests share: made once per session, small enough for float64 on one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from models.sample import make_sample

SIZES = {"opt": 1_000_000, "gpt2": 1_000_000, "llama": 1_500_000, "mixtral": 2_000_000}

MakeSample = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sample_directory(tmp_path_factory: pytest.TempPathFactory) -> MakeSample:
    """A function from architecture and dtype (and overrides of its config) to the directory of a sample."""
    made: dict[str, Path] = {}

    def make(arch: str, dtype: str = "float64", **overrides: object) -> Path:
        key = repr((arch, dtype, sorted(overrides.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp(arch) / "sample"
            size = SIZES.get(arch, 500_000)
            make_sample(directory, arch=arch, parameters=size, seed=1, dtype=dtype, context=256, overrides=overrides)
            made[key] = directory
        return made[key]

    return make
