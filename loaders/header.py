"""The safetensors header, read as if an adversary had written it.

A safetensors file is: 8 bytes little-endian header length, that many bytes of JSON (padded with spaces), data. A header
that this module returns is whole: types, shapes and sizes agree, tensors follow each other without hole or overlap,
and the last one ends where the file ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loaders.errors import CheckpointError, quote
from loaders.reading import open_regular, read_exactly

# What the reference implementation allows; a header of this size still parses in seconds, not minutes.
HEADER_LIMIT_BYTES = 100_000_000
TENSOR_LIMIT = 500_000
NAME_LIMIT = 1_024
RANK_LIMIT = 32
_SIGNS_LIMIT = 8 * TENSOR_LIMIT
"""A tensor has four colons and two brackets; names, aliases and other metadata may have some."""
# Beyond any file; keeps every product and sum small enough for other languages' 64-bit readers.
OFFSET_LIMIT = 1 << 62

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "F64": 64,
        "I64": 64,
        "U64": 64,
        "C64": 64,
    }
)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor: bytes [begin, end) of the data section hold `shape` elements of `dtype`, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of one file by rising offset, its metadata, and where in the file the data section starts and
    ends."""

    tensors: tuple[TensorRecord, ...]
    metadata: Mapping[str, str]
    data_start: int
    data_bytes: int


def bytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of all elements. A product above OFFSET_LIMIT is not finished: what comes back is above it, too."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > OFFSET_LIMIT * 8:
            break
    return bits // 8


def read_region(descriptor: int, path: Path) -> tuple[bytes, int]:
    """(the first 8 + header length bytes, the size of the file), the length checked before anything of it is read."""
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes < 8:
        raise CheckpointError(f"{path} has {file_bytes} bytes and so is no safetensors file; copy or download it again")
    header_bytes = int.from_bytes(read_exactly(descriptor, 8, 0, path), "little")
    if header_bytes > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{path}: its header claims {header_bytes} bytes; at most {HEADER_LIMIT_BYTES} are read")
    if 8 + header_bytes > file_bytes:
        raise CheckpointError(
            f"{path}: its header claims {header_bytes} bytes but the file has {file_bytes}; copy or download it again"
        )
    return read_exactly(descriptor, 8 + header_bytes, 0, path), file_bytes


def parse_region(region: bytes, file_bytes: int, path: Path) -> Header:
    """The header in `region` (length field and JSON) of a file of `file_bytes`; a CheckpointError names the tensor."""
    text = region[8:]
    # Counted before parsing: objects cost a hundred times the bytes that describe them.
    if text.count(b'"dtype"') > TENSOR_LIMIT or any(text.count(sign) > _SIGNS_LIMIT for sign in (b":", b"[", b"{")):
        raise CheckpointError(f"{path}: its header lists more than {TENSOR_LIMIT} tensors")
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise CheckpointError(f"{path}: its header is nested too deeply to be one") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error})") from error
    if type(document) is not dict:
        raise CheckpointError(f"{path}: its header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str and _is_text(value) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in its header is not a mapping from text to text")
    records = [_parse_record(name, entry, path) for name, entry in document.items()]
    records.sort(key=lambda record: (record.begin, record.end))
    position = 0
    for record in records:
        if record.begin != position:
            kind = "overlaps the one before" if record.begin < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {quote(record.name)} at byte {record.begin} of the data {kind}")
        position = record.end
    data_bytes = file_bytes - len(region)
    if position > data_bytes:
        last = quote(records[-1].name)
        raise CheckpointError(
            f"{path} is truncated: tensor {last} ends at byte {position} of {data_bytes}; copy or download it again"
        )
    if position < data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - position} bytes at its end belong to no tensor")
    return Header(tuple(records), MappingProxyType(metadata), len(region), data_bytes)


def read_header(path: Path) -> Header:
    """The validated header of a safetensors file."""
    descriptor = open_regular(path)
    try:
        region, file_bytes = read_region(descriptor, path)
    finally:
        os.close(descriptor)
    return parse_region(region, file_bytes, path)


def compose_text(tensors: tuple[TensorRecord, ...], metadata: Mapping[str, str]) -> bytes:
    """The header's JSON, compact, metadata first, tensors in the given order."""
    document: dict[str, object] = {"__metadata__": dict(metadata)}
    for tensor in tensors:
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.begin, tensor.end],
        }
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different: of two equal names, readers disagree which one counts."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {quote(name)} stands there twice")
            seen.add(name)
    return result


def _parse_record(name: str, entry: Any, path: Path) -> TensorRecord:
    where = f"{path}: tensor {quote(name)}"
    if not name or len(name) > NAME_LIMIT:
        raise CheckpointError(f"{where} has a name of {len(name)} characters; 1 to {NAME_LIMIT} are allowed")
    if not _is_text(name):
        raise CheckpointError(f"{where} has a name that is no valid Unicode")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {quote(str(dtype))}")
    if type(shape) is not list or len(shape) > RANK_LIMIT or not all(_is_offset(size) for size in shape):
        raise CheckpointError(f"{where} has a shape that is not a list of at most {RANK_LIMIT} sizes")
    if type(offsets) is not list or len(offsets) != 2 or not all(_is_offset(offset) for offset in offsets):
        raise CheckpointError(f"{where} has data_offsets that are not two byte positions")
    begin, end = offsets
    row, bits = shape[-1] if shape else 1, DTYPE_BITS[dtype]
    if row * bits % 8:
        raise CheckpointError(
            f"{where} has rows of {row} elements of {bits} bits, which end within a byte; pad its last dimension to a "
            f"multiple of {8 // gcd(bits, 8)}"
        )
    expected = bytes_of(dtype, shape)
    if expected > OFFSET_LIMIT:
        raise CheckpointError(f"{where} has a shape larger than any file")
    if end - begin != expected:
        raise CheckpointError(f"{where} needs {expected} bytes for its shape and dtype, its offsets give {end - begin}")
    return TensorRecord(name, dtype, tuple(shape), begin, end)


def _is_text(value: str) -> bool:
    """JSON can write halves of characters, which other readers refuse."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _is_offset(value: object) -> bool:
    # `type() is int` because True is an int to isinstance.
    return type(value) is int and 0 <= value <= OFFSET_LIMIT
