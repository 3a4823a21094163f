"""The dtypes of safetensors as torch has them. What torch has no dtype for is shown as the bytes that hold it."""

from __future__ import annotations

from types import MappingProxyType

import torch

from loaders.header import DTYPE_BITS

SHOWN_AS_BYTES = MappingProxyType({"F6_E2M3": "float6_e2m3fn", "F6_E3M2": "float6_e3m2fn"})
"""Four elements in three bytes; the names are those that other libraries use."""
DTYPE_OF_NAME = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F4": torch.float4_e2m1fn_x2,
        "F6_E2M3": torch.uint8,
        "F6_E3M2": torch.uint8,
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
NAME_OF_DTYPE = MappingProxyType({dtype: name for name, dtype in DTYPE_OF_NAME.items() if name not in SHOWN_AS_BYTES})


def torch_name(dtype: str) -> str:
    """`bfloat16` for `BF16`: as torch calls it, or as it would."""
    return SHOWN_AS_BYTES.get(dtype) or str(DTYPE_OF_NAME[dtype]).removeprefix("torch.")


def view_elements(data: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """`data`, bytes in one dimension, as a tensor of this dtype and shape as safetensors names and counts them."""
    return data.view(DTYPE_OF_NAME[dtype]).view(torch_shape(dtype, shape))


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as torch counts it: elements of less than a byte are counted in bytes, along the last dimension."""
    bits = DTYPE_BITS[dtype]
    return (*shape[:-1], shape[-1] * bits // 8) if bits < 8 else shape


def stored_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape as safetensors counts it. Without a dimension two elements of F4 become one of two."""
    shape = tuple(tensor.shape)
    if tensor.dtype != torch.float4_e2m1fn_x2:
        return shape
    return (*shape[:-1], shape[-1] * 2) if shape else (2,)
