"""What a load has to read and where it goes: pieces of files into one block of memory, tensors as places in it.

A packed directory is one file whose chunks have checksums; a plain Hugging Face directory is one or several shards
whose bytes nobody vouches for. Both become the same plan, so that one loop loads either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import CheckpointError, enumerate_some
from loaders.header import DTYPE_BITS, TensorRecord, read_header
from loaders.layout import PADDING_PREFIX
from loaders.manifest import MANIFEST_NAME, check_agreement, check_companions, read_manifest
from loaders.memory import HUGE_PAGE_BYTES, round_up
from loaders.packed import WEIGHTS_NAME, read_packed_header
from loaders.reading import looking_at, require_directory
from loaders.source import check_names, check_shard, shards_of

DIRECT_BYTES = 4096
"""Direct reads begin, end and land at multiples of this."""
PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [offset, offset + count) of file `file` go to `place` in memory.

    All three are multiples of DIRECT_BYTES, but for the count of the last piece of a file.
    """

    file: int
    offset: int
    count: int
    place: int
    checksum: int | None = None


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and where its bytes stand in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything that is to be read, in the order of first use as far as the files tell it."""

    directory: Path
    files: tuple[Path, ...]
    pieces: tuple[Piece, ...]
    tensors: tuple[PlacedTensor, ...]
    aliases: Mapping[str, str]
    memory_bytes: int
    packed: bool

    @property
    def bytes(self) -> int:
        return sum(piece.count for piece in self.pieces)

    def describe(self, index: int) -> str:
        """`chunk 3 of 17 (with 'a', 'b' and 2 more)`, for messages."""
        piece = self.pieces[index]
        end = piece.place + piece.count
        names = [tensor.name for tensor in self.tensors if tensor.begin < end and tensor.end > piece.place]
        return f"chunk {index} of {len(self.pieces)} (with {enumerate_some(names)})"


def plan_load(directory: Path, *, verify: bool = True) -> LoadPlan:
    """The plan for a packed directory, or for a plain one with safetensors. Reads headers only.

    With `verify` pieces of a packed file carry their checksums, and the files beside it are checked. Raises
    CheckpointError.
    """
    directory = Path(directory)
    with looking_at(directory):
        require_directory(directory)
        if (directory / MANIFEST_NAME).exists():
            return _plan_packed(directory, verify=verify)
        return _plan_shards(directory)


def _plan_packed(directory: Path, *, verify: bool) -> LoadPlan:
    manifest = read_manifest(directory)
    path = directory / WEIGHTS_NAME
    if not path.exists():
        raise CheckpointError(f"{directory} has lost its {WEIGHTS_NAME}; pack the checkpoint again")
    packed = read_packed_header(path)
    check_agreement(manifest, packed, directory)
    if verify:
        check_companions(manifest, directory)
    start = packed.header.data_start
    pieces = []
    for chunk, checksum in enumerate(packed.checksums):
        begin, end = packed.chunk_span(chunk)
        pieces.append(Piece(0, start + begin, end - begin, begin, checksum if verify else None))
    tensors = tuple(_place(record, 0) for record in packed.tensors)
    size = round_up(packed.header.data_bytes, DIRECT_BYTES)
    return LoadPlan(directory, (path,), tuple(pieces), tensors, packed.aliases, size, True)


def _plan_shards(directory: Path) -> LoadPlan:
    shards, pickled = shards_of(directory)
    if pickled:
        raise CheckpointError(
            f"{directory} has its weights as pickles, which cannot be read in place: pack it first (`longshore pack`)"
        )
    pieces: list[Piece] = []
    tensors: list[PlacedTensor] = []
    base = 0
    for file, (path, expected) in enumerate(shards):
        header = read_header(path)
        check_shard(path, expected, header.tensors)
        file_bytes = header.data_start + header.data_bytes
        # The file as it is: its place in memory keeps its alignment, so that reads may be direct.
        first = header.data_start - header.data_start % DIRECT_BYTES
        for offset in range(first, file_bytes, PIECE_BYTES):
            count = min(PIECE_BYTES, file_bytes - offset)
            pieces.append(Piece(file, offset, count, base + offset - first))
        for record in header.tensors:
            if not record.name.startswith(PADDING_PREFIX):
                tensors.append(_place(record, base + header.data_start - first))
        base += round_up(file_bytes - first, HUGE_PAGE_BYTES)
    check_names(directory, [tensor.name for tensor in tensors])
    return LoadPlan(directory, tuple(path for path, _ in shards), tuple(pieces), tuple(tensors), {}, base, False)


def _place(record: TensorRecord, base: int) -> PlacedTensor:
    return PlacedTensor(record.name, record.dtype, record.shape, base + record.begin, base + record.end)


def is_aligned(tensor: PlacedTensor) -> bool:
    """Whether a view of this tensor's dtype may begin at its place."""
    return tensor.begin % max(1, DTYPE_BITS[tensor.dtype] // 8) == 0
