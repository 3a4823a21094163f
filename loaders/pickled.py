"""What a `.bin` file of PyTorch holds, by torch's weights-only reader: a pickle that asks for anything but tensors is
refused, and nothing that it names is ever called.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

from loaders.errors import CheckpointError, quote
from loaders.header import TensorRecord
from loaders.reading import open_regular

# What describes the tensors, without their numbers: a checkpoint of a trillion parameters stays far below.
_PICKLE_LIMIT_BYTES = 256 << 20


def read_pickled(path: Path) -> tuple[TensorRecord, ...]:
    """Names, dtypes, shapes and sizes of all tensors in a file that torch.save wrote; offsets count from 0 in the
    order of the file. Raises CheckpointError for everything else.

    The numbers are mapped and not read, except in files of PyTorch before 1.6, which are read whole.
    """
    import torch

    from loaders.dtypes import NAME_OF_DTYPE, stored_shape

    os.close(open_regular(path))
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors, and what a pickle asks to be run is not run: "
                "take the checkpoint in safetensors, or save its state_dict alone"
            ) from error
        raise CheckpointError(f"{path} is damaged or no file of torch.save; download it again") from error
    # The reader meets whatever bytes somebody put there; it is documented to raise UnpicklingError only.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no file of torch.save; download it again") from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds no tensors by name; save the model's state_dict there")
    records: list[TensorRecord] = []
    begin = 0
    for name, tensor in state.items():
        if type(name) is not str or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path} holds {quote(str(name))}, which is no tensor; save the state_dict alone")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype not in NAME_OF_DTYPE:
            raise CheckpointError(f"{path}: the tensor {quote(name)} is not a plain one, and only those can be packed")
        size = tensor.numel() * tensor.element_size()
        records.append(TensorRecord(name, NAME_OF_DTYPE[tensor.dtype], stored_shape(tensor), begin, begin + size))
        begin += size
    return tuple(records)


def _check_archive(path: Path) -> None:
    """That the archive claims no more than it holds, before anything in it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no file of torch.save; download it again") from error
    for entry in entries:
        pickled = entry.filename.endswith(".pkl")
        if entry.compress_type != zipfile.ZIP_STORED or (pickled and entry.file_size > _PICKLE_LIMIT_BYTES):
            raise CheckpointError(f"{path} is packed in a way that torch.save does not use; save it again")
