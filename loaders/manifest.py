"""`longshore.json`: what the rest of the system wants to know about a packed checkpoint without opening its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from loaders.errors import CheckpointError, quote
from loaders.packed import FORMAT_VERSION, WEIGHTS_NAME, PackedHeader, checksum_of
from loaders.reading import looking_at, read_bounded, require_companion_name, require_directory

MANIFEST_NAME = "longshore.json"
MANIFEST_LIMIT_BYTES = 1 << 20
COMPANION_LIMIT_BYTES = 1 << 30

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Checksum = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}$")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class CompanionFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside the weights: its size in bytes and its xxh3 (64 bits, hexadecimal)."""

    bytes: Count
    checksum: Checksum


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a packed directory holds. Two directories with the same `digest` hold the same weights in the same
    places."""

    format_version: Count
    digest: Digest
    """SHA-256 of everything in front of the data of model.safetensors; that holds the checksums of all chunks."""
    header_checksum: Checksum
    architecture: Name
    """The class of transformers that computes it, such as LlamaForCausalLM."""
    model_type: Name
    dtype: Name
    """The dtype of most of its bytes, as torch names it: bfloat16, float16, float32, float64; of `stored` any."""
    bytes: Count
    """Size of model.safetensors: what a tier has to have room for."""
    tensor_bytes: Count
    """Bytes of the tensors alone, tied ones once."""
    parameters: Count
    tensors: Count
    """Stored tensors, without aliases and padding."""
    chunk_bytes: Count
    layers: Count
    context: Count | None
    """The longest sequence in tokens; None where the configuration sets no bound."""
    vocab_size: Count
    kv_bytes_per_token: Count
    """Bytes that one token adds to the key-value cache over all layers, in `dtype`; layers with a window count in
    full.
    """
    files: dict[str, CompanionFile]
    """The files beside the weights, by name; one in a folder of its own is `folder/name`."""
    kind: Literal["encoder", "stored"] | msgspec.UnsetType = msgspec.UNSET
    """`encoder`: it has no language-model head and makes embeddings only. `stored`: packed as it stood, to be loaded
    and not to be run. Left out for decoders.
    """
    checksum: Checksum = "0" * 16
    """xxh3 of this document with this field set to zeros."""


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of longshore.json, with its own checksum filled in."""
    stated = f"{_own_checksum(manifest):016x}"
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, checksum=stated))) + b"\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a packed directory. CheckpointError when there is none, or when it is damaged or of another
    version.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    with looking_at(path):
        require_directory(directory)
        if not path.exists():
            raise CheckpointError(
                f"{directory} is not a packed checkpoint (it has no {MANIFEST_NAME}); pack the source first"
            )
    return parse_manifest(read_bounded(path, MANIFEST_LIMIT_BYTES), path)


def parse_manifest(content: bytes, where: Path | str) -> Manifest:
    """The manifest in these bytes, which came from `where`. CheckpointError as of `read_manifest`."""
    try:
        version = msgspec.json.decode(content, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format version {version}, this program reads {FORMAT_VERSION}; pack again"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a valid manifest ({error}); pack the checkpoint again") from error
    if f"{_own_checksum(manifest):016x}" != manifest.checksum:
        raise CheckpointError(f"{where} is damaged (its checksum differs); pack the checkpoint again")
    for name in manifest.files:
        require_companion_name(name, str(where))
        if name in (WEIGHTS_NAME, MANIFEST_NAME):
            raise CheckpointError(f"{where} lists {quote(name)} among the files beside the weights; pack again")
    return manifest


def check_agreement(manifest: Manifest, packed: PackedHeader, directory: Path) -> None:
    """That the manifest and the weights beside it come from the same packing."""
    if (
        manifest.digest != packed.digest
        or manifest.header_checksum != packed.checksum
        or manifest.bytes != packed.header.data_start + packed.header.data_bytes
    ):
        raise CheckpointError(
            f"{directory / MANIFEST_NAME} describes other weights than {WEIGHTS_NAME} beside it holds; pack it again"
        )


def check_companions(manifest: Manifest, directory: Path) -> None:
    """That every file beside the weights is the one that was packed."""
    for name, stated in manifest.files.items():
        content = read_bounded(directory / name, COMPANION_LIMIT_BYTES)
        if len(content) != stated.bytes or f"{checksum_of(content):016x}" != stated.checksum:
            raise CheckpointError(f"{directory}: the file {quote(name)} is not the one that was packed; pack again")


class _Version(msgspec.Struct):
    format_version: int


def _own_checksum(manifest: Manifest) -> int:
    blank = msgspec.structs.replace(manifest, checksum="0" * 16)
    return checksum_of(msgspec.json.encode(blank))
