"""The dtypes of safetensors as torch has them."""

from __future__ import annotations

from types import MappingProxyType

import torch

DTYPE_OF_NAME = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F4": torch.float4_e2m1fn_x2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "F64": torch.float64,
        "I64": torch.int64,
        "U64": torch.uint64,
        "C64": torch.complex64,
    }
)
NAME_OF_DTYPE = MappingProxyType({dtype: name for name, dtype in DTYPE_OF_NAME.items()})


def view_elements(data: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """`data`, bytes in one dimension, as a tensor of this dtype and shape as safetensors names and counts them."""
    return data.view(DTYPE_OF_NAME[dtype]).view(torch_shape(dtype, shape))


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` in elements as torch counts it: two of F4 are one element of torch, along the last dimension."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape


def stored_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape as safetensors counts it. Without a dimension two elements of F4 become one of two."""
    shape = tuple(tensor.shape)
    if tensor.dtype != torch.float4_e2m1fn_x2:
        return shape
    return (*shape[:-1], shape[-1] * 2) if shape else (2,)
