"""Packing: a Hugging Face directory in, a packed directory out, all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from loaders import storage
from loaders.destination import check_replaceable, check_space, resolve_destination
from loaders.errors import CheckpointError
from loaders.header import TensorRecord
from loaders.layout import PADDING_PREFIX, TensorShape, arrange
from loaders.manifest import MANIFEST_NAME, CompanionFile, Manifest, encode_manifest, parse_manifest
from loaders.packed import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    check_chunk_bytes,
    checksum_of,
    compose_packed_region,
    parse_packed_region,
)
from loaders.source import inspect_source, read_companions

if TYPE_CHECKING:
    import torch

    from loaders.conversion import Examiner, ModuleState

# Writes are aligned in the file to this, because the page cache then builds huge pages while it takes them (measured
# on ext4, Linux 6.18).
_WRITE_BYTES = 8 << 20


def pack_checkpoint(
    source: Path,
    destination: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    examiner: Examiner | None = None,
    as_stored: bool = False,
) -> Manifest:
    """Packs the Hugging Face directory `source` into the directory `destination`, and replaces a packed checkpoint
    there; `examiner` says whether what will run it can. With `as_stored` tensors keep their names and dtypes, fp8
    included, and nobody asks whether anything can run them.

    Loads the whole model into memory once. `progress(bytes written, bytes in all)` is called from this thread. The
    same source gives the same bytes. A crash at any moment leaves the old destination or the new one. Raises
    CheckpointError, in one sentence.
    """
    if not check_chunk_bytes(chunk_bytes):
        raise CheckpointError(
            f"a chunk of {chunk_bytes} bytes is not possible: choose a multiple of 4096, 4 KiB to 1 GiB"
        )
    source, destination = Path(source).resolve(), resolve_destination(destination)
    found = inspect_source(source, tokenizer=not as_stored)
    _check_destination(source, destination)
    companions = read_companions(source)
    # Not at the top: it brings torch and transformers, and most refusals do not need them.
    if as_stored:
        from loaders.as_stored import load_stored_state

        state = load_stored_state(found)
    else:
        from loaders.conversion import load_module_state

        state = load_module_state(found, examiner)
    records = arrange([state.shapes.get(name) or _shape_of(name, tensor) for name, tensor in state.tensors.items()])
    data_bytes = records[-1].end
    chunks = -(-data_bytes // chunk_bytes)
    region_bytes = len(compose_packed_region(records, chunk_bytes, [0] * chunks, state.aliases, state.original_names))
    check_space(destination.parent, region_bytes + data_bytes + sum(map(len, companions.values())))
    with storage.replacing_directory(destination) as temporary:
        writer = _WeightsWriter(temporary / WEIGHTS_NAME, region_bytes, data_bytes, chunk_bytes, progress)
        with writer:
            for piece in _pieces(records, state.tensors):
                writer.append(piece)
            checksums = writer.finish_data()
            region = compose_packed_region(records, chunk_bytes, checksums, state.aliases, state.original_names)
            # Read back what is about to be promised, with the eyes of a reader.
            packed = parse_packed_region(region, region_bytes + data_bytes, destination / WEIGHTS_NAME)
            writer.finish(region)
        manifest = _describe(
            state, packed.digest, packed.checksum, records, region_bytes + data_bytes, chunk_bytes, companions
        )
        for name, content in companions.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            storage.write_file(temporary / name, content)
        encoded = encode_manifest(manifest)
        manifest = parse_manifest(encoded, destination / MANIFEST_NAME)
        storage.write_file(temporary / MANIFEST_NAME, encoded)
    return manifest


class _WeightsWriter:
    """Writes the data section in order, in large aligned blocks, hashing chunk by chunk; the header comes last, into
    the room left for it.
    """

    def __init__(
        self,
        path: Path,
        region_bytes: int,
        data_bytes: int,
        chunk_bytes: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._descriptor = storage.create(path)
        self._progress = progress
        self._total = region_bytes + data_bytes
        self._chunk_bytes = chunk_bytes
        self._block = bytearray(_WRITE_BYTES)
        self._block_start = 0
        self._filled = region_bytes % _WRITE_BYTES
        if region_bytes >= _WRITE_BYTES:
            self._block_start = region_bytes - self._filled
        self._hash = xxhash.xxh3_64()
        self._hashed = 0
        self._checksums: list[int] = []

    def __enter__(self) -> _WeightsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def append(self, piece: memoryview) -> None:
        """The next bytes of the data section."""
        self._hash_piece(piece)
        while piece:
            count = min(len(piece), _WRITE_BYTES - self._filled)
            self._block[self._filled : self._filled + count] = piece[:count]
            self._filled += count
            piece = piece[count:]
            if self._filled == _WRITE_BYTES:
                self._flush()

    def finish_data(self) -> list[int]:
        """Writes what is left; the checksums of all chunks."""
        if self._filled:
            self._flush()
        if self._hashed:
            self._checksums.append(self._hash.intdigest())
        return self._checksums

    def finish(self, region: bytes) -> None:
        """Writes the header and waits until the disk has everything."""
        storage.write_all(self._descriptor, region, 0)
        storage.sync(self._descriptor)
        if self._progress:
            self._progress(self._total, self._total)

    def _hash_piece(self, piece: memoryview) -> None:
        while piece:
            count = min(len(piece), self._chunk_bytes - self._hashed)
            self._hash.update(piece[:count])
            self._hashed += count
            piece = piece[count:]
            if self._hashed == self._chunk_bytes:
                self._checksums.append(self._hash.intdigest())
                self._hash.reset()
                self._hashed = 0

    def _flush(self) -> None:
        storage.write_all(self._descriptor, memoryview(self._block)[: self._filled], self._block_start)
        self._block_start += self._filled
        self._filled = 0
        if self._progress:
            self._progress(min(self._block_start, self._total), self._total)


def _pieces(records: tuple[TensorRecord, ...], tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of the data section in order, a tensor or a padding at a time."""
    import torch

    for record in records:
        if record.name.startswith(PADDING_PREFIX):
            yield memoryview(bytes(record.end - record.begin))
        elif record.end > record.begin:
            flat = tensors[record.name].contiguous().reshape(-1).view(torch.uint8)
            piece = memoryview(flat.numpy().data)
            assert len(piece) == record.end - record.begin
            yield piece


def _shape_of(name: str, tensor: torch.Tensor) -> TensorShape:
    from loaders.dtypes import NAME_OF_DTYPE, stored_shape

    if tensor.dtype not in NAME_OF_DTYPE:
        raise CheckpointError(f"the tensor {name!r} has the dtype {tensor.dtype}, which safetensors cannot hold")
    return TensorShape(name, NAME_OF_DTYPE[tensor.dtype], stored_shape(tensor))


def _describe(
    state: ModuleState,
    digest: str,
    header_checksum: str,
    records: tuple[TensorRecord, ...],
    file_bytes: int,
    chunk_bytes: int,
    companions: Mapping[str, bytes],
) -> Manifest:
    stored = [record for record in records if not record.name.startswith(PADDING_PREFIX)]
    return Manifest(
        format_version=FORMAT_VERSION,
        digest=digest,
        header_checksum=header_checksum,
        architecture=state.architecture,
        model_type=state.model_type,
        dtype=state.dtype,
        bytes=file_bytes,
        tensor_bytes=sum(record.end - record.begin for record in stored),
        parameters=state.parameters,
        tensors=len(stored),
        chunk_bytes=chunk_bytes,
        layers=state.layers,
        context=state.context,
        vocab_size=state.vocab_size,
        kv_bytes_per_token=state.kv_bytes_per_token,
        kind=state.kind if state.kind != "decoder" else msgspec.UNSET,
        files={
            name: CompanionFile(bytes=len(content), checksum=f"{checksum_of(content):016x}")
            for name, content in companions.items()
        },
    )


def _check_destination(source: Path, destination: Path) -> None:
    """Never replace what is not a packed checkpoint, and never the source itself."""
    if source.is_relative_to(destination):
        raise CheckpointError(f"{destination} is or contains the source; choose another destination")
    check_replaceable(destination)
