"""What makes a safetensors file a packed checkpoint: alignment, checksums per chunk, a checksum of the header,
aliases, original names.

All of it stands in the header's metadata (text to text), so that the one file says everything about its tensors by
itself. docs/checkpoint-format.md describes the keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from loaders.errors import CheckpointError, enumerate_some, quote
from loaders.header import HEADER_LIMIT_BYTES, Header, TensorRecord, compose_text, parse_region, read_region
from loaders.layout import LAYER_ALIGNMENT, PADDING_PREFIX, TENSOR_ALIGNMENT
from loaders.reading import open_regular

FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CHUNK_BYTES = 8 << 20
CHUNK_LIMIT_BYTES = 1 << 30
CHECKSUM_DIGITS = 16  # of xxh3, 64 bits, hexadecimal

_PREFIX = "longshore."
_HEADER_CHECKSUM = re.compile(rb'"longshore\.header_checksum":"([0-9a-f]{16})"')
_DIGITS = re.compile(r"[0-9]{1,18}")
_CHECKSUMS = re.compile(r"([0-9a-f]{16})*")


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """The validated header of a packed file. `checksums[i]` covers bytes [i, i + 1) * chunk_bytes of the data
    section.
    """

    header: Header
    chunk_bytes: int
    checksums: tuple[int, ...]
    aliases: Mapping[str, str]
    original_names: Mapping[str, tuple[str, ...]]
    checksum: str
    digest: str

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        """The tensors of the module, padding left out, in the order of the file."""
        return tuple(record for record in self.header.tensors if not record.name.startswith(PADDING_PREFIX))

    def chunk_span(self, chunk: int) -> tuple[int, int]:
        """[begin, end) of a chunk in the data section; the last one may be shorter than chunk_bytes."""
        begin = chunk * self.chunk_bytes
        return begin, min(begin + self.chunk_bytes, self.header.data_bytes)

    def tensors_in_chunk(self, chunk: int) -> list[str]:
        """The names of all tensors, padding included, that have a byte in the chunk."""
        begin, end = self.chunk_span(chunk)
        return [record.name for record in self.header.tensors if record.begin < end and record.end > begin]


def checksum_of(data: bytes | memoryview) -> int:
    """xxh3 of 64 bits, seed 0: finds damage, not forgery."""
    return xxhash.xxh3_64_intdigest(data)


def compose_packed_region(
    tensors: tuple[TensorRecord, ...],
    chunk_bytes: int,
    checksums: Sequence[int],
    aliases: Mapping[str, str],
    original_names: Mapping[str, tuple[str, ...]],
) -> bytes:
    """Everything in front of the data, its length a multiple of LAYER_ALIGNMENT; the same input gives the same bytes.

    The length depends on the number of checksums but not on their values, so a file can be written in one pass.
    """
    metadata = {
        # transformers refuses a file that does not say which framework's layout it holds.
        "format": "pt",
        _PREFIX + "version": str(FORMAT_VERSION),
        _PREFIX + "header_checksum": "0" * CHECKSUM_DIGITS,
        _PREFIX + "chunk_bytes": str(chunk_bytes),
        _PREFIX + "chunk_checksums": "".join(f"{checksum:016x}" for checksum in checksums),
        _PREFIX + "aliases": json.dumps(dict(aliases), separators=(",", ":")),
        _PREFIX + "original_names": json.dumps(dict(original_names), separators=(",", ":")),
    }
    text = compose_text(tensors, metadata)
    text += b" " * (-(8 + len(text)) % LAYER_ALIGNMENT)
    if len(text) > HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"the header of the packed file would have {len(text)} bytes, more than the {HEADER_LIMIT_BYTES} that "
            "safetensors allows; choose larger chunks"
        )
    region = len(text).to_bytes(8, "little") + text
    checksum = f"{checksum_of(region):016x}".encode()
    match = _HEADER_CHECKSUM.search(region)
    assert match is not None
    return region[: match.start(1)] + checksum + region[match.end(1) :]


def parse_packed_region(region: bytes, file_bytes: int, path: Path) -> PackedHeader:
    """The packed header in `region`, every promise of the format checked; a CheckpointError says which one is
    broken."""
    found = _HEADER_CHECKSUM.findall(region)
    if len(found) != 1:
        # Either the header is damaged in this very place, or the file was never a packed one.
        raise CheckpointError(f"{path} holds no checksum of its header: it is damaged, or not packed; pack it again")
    stated = found[0].decode()
    blank = region.replace(b'header_checksum":"' + found[0], b'header_checksum":"' + b"0" * CHECKSUM_DIGITS)
    if f"{checksum_of(blank):016x}" != stated:
        raise CheckpointError(
            f"{path}: the header is damaged (its checksum differs); pack or copy the checkpoint again"
        )
    header = parse_region(region, file_bytes, path)
    version = header.metadata.get(_PREFIX + "version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(f"{path} has format version {quote(version)}, this program reads {FORMAT_VERSION}")
    chunk_bytes = _parse_chunk_bytes(header, path)
    checksums = _parse_checksums(header, chunk_bytes, path)
    _check_places(header, path)
    names = {record.name for record in header.tensors if not record.name.startswith(PADDING_PREFIX)}
    aliases = _parse_aliases(header, names, path)
    original_names = _parse_original_names(header, names, path)
    digest = hashlib.sha256(region).hexdigest()
    return PackedHeader(header, chunk_bytes, checksums, aliases, original_names, stated, digest)


def read_packed_header(path: Path) -> PackedHeader:
    """The validated header of a packed file."""
    descriptor = open_regular(path)
    try:
        region, file_bytes = read_region(descriptor, path)
    finally:
        os.close(descriptor)
    return parse_packed_region(region, file_bytes, path)


def check_chunk_bytes(chunk_bytes: int) -> bool:
    """Whether a chunk may have this size: 4 KiB to 1 GiB, a multiple of 4 KiB (direct I/O needs that)."""
    return LAYER_ALIGNMENT <= chunk_bytes <= CHUNK_LIMIT_BYTES and chunk_bytes % LAYER_ALIGNMENT == 0


def _parse_chunk_bytes(header: Header, path: Path) -> int:
    text = header.metadata.get(_PREFIX + "chunk_bytes", "")
    if not _DIGITS.fullmatch(text) or not check_chunk_bytes(int(text)):
        raise CheckpointError(f"{path}: the chunk size {quote(text)} is not a multiple of 4096 between 4 KiB and 1 GiB")
    return int(text)


def _parse_checksums(header: Header, chunk_bytes: int, path: Path) -> tuple[int, ...]:
    text = header.metadata.get(_PREFIX + "chunk_checksums", "")
    chunks = -(-header.data_bytes // chunk_bytes)
    if not _CHECKSUMS.fullmatch(text) or len(text) != chunks * CHECKSUM_DIGITS:
        raise CheckpointError(f"{path}: the header does not hold one checksum for each of its {chunks} chunks")
    return tuple(int(text[start : start + CHECKSUM_DIGITS], 16) for start in range(0, len(text), CHECKSUM_DIGITS))


def _check_places(header: Header, path: Path) -> None:
    if header.data_start % LAYER_ALIGNMENT:
        raise CheckpointError(f"{path}: its data starts at byte {header.data_start}, not at a multiple of 4096")
    for record in header.tensors:
        if record.name.startswith(PADDING_PREFIX):
            if record.dtype != "U8":
                raise CheckpointError(f"{path}: the padding {quote(record.name)} is not of dtype U8")
        elif record.begin % TENSOR_ALIGNMENT:
            raise CheckpointError(f"{path}: tensor {quote(record.name)} does not start at a multiple of 256 bytes")


def _parse_names(header: Header, key: str, path: Path) -> dict[str, object]:
    try:
        document = json.loads(header.metadata.get(_PREFIX + key, ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_PREFIX}{key} in its header is not valid JSON") from error
    if type(document) is not dict:
        raise CheckpointError(f"{path}: {_PREFIX}{key} in its header is not a mapping")
    return document


def _parse_aliases(header: Header, names: set[str], path: Path) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for alias, target in _parse_names(header, "aliases", path).items():
        if type(target) is not str or target not in names or alias in names or alias.startswith(PADDING_PREFIX):
            raise CheckpointError(f"{path}: the alias {quote(alias)} does not stand for one of its tensors")
        aliases[alias] = target
    return aliases


def _parse_original_names(header: Header, names: set[str], path: Path) -> dict[str, tuple[str, ...]]:
    originals: dict[str, tuple[str, ...]] = {}
    for name, listed in _parse_names(header, "original_names", path).items():
        if type(listed) is not list or not all(type(original) is str for original in listed) or name not in names:
            raise CheckpointError(f"{path}: the original names of {quote(name)} are not a list for one of its tensors")
        originals[name] = tuple(listed)
    return originals


def describe_chunk(packed: PackedHeader, chunk: int) -> str:
    """`chunk 3 of 17 (with the tensors 'a', 'b' and 2 more)`, for messages."""
    names = enumerate_some(packed.tensors_in_chunk(chunk))
    return f"chunk {chunk} of {len(packed.checksums)} (with {names})"
