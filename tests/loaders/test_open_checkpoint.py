"""Opening, populating, evicting: views without copies, and damage found wherever it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loaders import (
    CheckpointError,
    Manifest,
    open_checkpoint,
    populate_checkpoint,
    read_manifest,
    release_checkpoint,
    resident_bytes,
    verify_checkpoint,
)
from loaders.packed import read_packed_header

Packed = Callable[[str], tuple[Path, Manifest]]


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0] ^ (1 << bit)
        file.seek(position)
        file.write(bytes([value]))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tensors_are_views_of_the_mapping(name: str, packed: Packed) -> None:
    with open_checkpoint(packed(name)[0], verify=False, populate=False) as mapped:
        begin, end = mapped.address_range
        for tensor in mapped.tensors.values():
            assert begin <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
            assert tensor.data_ptr() % 256 == 0
        assert mapped.report.bytes == 0 and mapped.bytes == mapped.manifest.bytes


def test_views_outlive_close(packed: Packed) -> None:
    mapped = open_checkpoint(packed("llama")[0])
    tensor = mapped.tensors["model.norm.weight"]
    mapped.close()
    mapped.close()
    assert not mapped.tensors
    assert torch.equal(tensor, torch.ones(64))
    with pytest.raises(CheckpointError, match="closed"):
        mapped.page_kind()


@pytest.mark.filterwarnings("error")
def test_opening_warns_about_nothing(packed: Packed) -> None:
    open_checkpoint(packed("llama")[0]).close()


def test_a_flipped_bit_in_any_chunk_is_refused_with_its_tensors(packed_copy: Path) -> None:
    path = packed_copy / "model.safetensors"
    header = read_packed_header(path)
    assert len(header.checksums) > 3
    for chunk in range(len(header.checksums)):
        begin, end = header.chunk_span(chunk)
        # The first byte, the last byte and one inside; the last byte of the file is padding.
        for position in (begin, (begin + end) // 2, end - 1):
            flip(path, header.header.data_start + position, chunk % 8)
            for check in (verify_checkpoint, populate_checkpoint, open_checkpoint):
                with pytest.raises(CheckpointError, match=rf"chunk {chunk} of {len(header.checksums)} ") as caught:
                    check(packed_copy)
                assert repr(header.tensors_in_chunk(chunk)[0]) in str(caught.value)
            flip(path, header.header.data_start + position, chunk % 8)
    verify_checkpoint(packed_copy)


def test_several_damaged_chunks_are_all_named(packed_copy: Path) -> None:
    header = read_packed_header(packed_copy / "model.safetensors")
    for chunk in (0, 2):
        flip(packed_copy / "model.safetensors", header.header.data_start + header.chunk_span(chunk)[0])
    with pytest.raises(CheckpointError, match=r"chunk 0 of .* so are the chunks 2;"):
        verify_checkpoint(packed_copy)


def test_a_flipped_bit_anywhere_in_the_header_is_refused(packed_copy: Path) -> None:
    path = packed_copy / "model.safetensors"
    region = read_packed_header(path).header.data_start
    for position in [*range(64), *range(64, region, 97), region - 1]:
        flip(path, position, position % 8)
        # Also without the manifest, which would notice by itself.
        with pytest.raises(CheckpointError):
            read_packed_header(path)
        flip(path, position, position % 8)
    for position in (3, 40, region - 1):
        flip(path, position)
        with pytest.raises(CheckpointError):
            open_checkpoint(packed_copy, verify=False, populate=False)
        flip(path, position)
    open_checkpoint(packed_copy).close()


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(packed_copy: Path) -> None:
    path = packed_copy / "longshore.json"
    manifest = read_manifest(packed_copy)
    for position in range(path.stat().st_size):
        flip(path, position, position % 8)
        try:
            # White space between the fields can change without meaning anything else.
            assert read_manifest(packed_copy) == manifest
        except CheckpointError:
            pass
        flip(path, position, position % 8)


def test_a_changed_file_beside_the_weights_is_refused(packed_copy: Path) -> None:
    flip(packed_copy / "tokenizer.json", 100)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.* not the one that was packed"):
        open_checkpoint(packed_copy)
    (packed_copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        verify_checkpoint(packed_copy)


def test_weights_of_another_packing_are_refused(packed: Packed, packed_copy: Path) -> None:
    (packed_copy / "model.safetensors").write_bytes((packed("llama")[0] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="describes other weights"):
        open_checkpoint(packed_copy, verify=False, populate=False)


@pytest.mark.parametrize("cut", [0, 5, 100, 4096, -4096, -1])
def test_a_truncated_file_is_refused(packed_copy: Path, cut: int) -> None:
    path = packed_copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    with pytest.raises(CheckpointError):
        open_checkpoint(packed_copy, verify=False, populate=False)


def test_what_is_not_packed_is_refused(tmp_path: Path, packed_copy: Path, packed: Packed) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        read_manifest(tmp_path)
    (packed_copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lost its model\.safetensors"):
        open_checkpoint(packed_copy)


def test_populate_and_release_move_the_file_in_and_out_of_memory(packed: Packed) -> None:
    directory, manifest = packed("mixtral")
    if release_checkpoint(directory) != 0:
        pytest.skip("this file system keeps its files in memory")
    assert resident_bytes(directory) == 0
    seen: list[tuple[int, int]] = []
    report = populate_checkpoint(directory, progress=lambda done, total: seen.append((done, total)))
    assert resident_bytes(directory) == manifest.bytes == report.bytes
    assert report.verified and report.gigabytes_per_second > 0 and report.chunks == len(seen)
    assert seen[-1] == (manifest.bytes, manifest.bytes) and seen == sorted(seen)
    assert report.pages in ("huge", "mixed", "small", "unknown")
    assert release_checkpoint(directory) == 0 == resident_bytes(directory)
    report = populate_checkpoint(directory, verify=False)
    assert resident_bytes(directory) == manifest.bytes and not report.verified


def test_without_populate_read_the_pages_are_touched_instead(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes
    import errno

    from loaders import mapping

    class OldKernel:
        mincore = mapping._libc.mincore

        def madvise(self, address: int, length: int, advice: int) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    directory, manifest = packed("mixtral")
    release_checkpoint(directory)
    monkeypatch.setattr(mapping, "_libc", OldKernel())
    populate_checkpoint(directory, verify=False)
    assert resident_bytes(directory) == manifest.bytes


def test_a_page_that_cannot_be_read_is_an_error_and_not_a_signal(packed_copy: Path) -> None:
    from loaders.mapping import FileMapping

    path = packed_copy / "model.safetensors"
    mapping = FileMapping(path)
    with path.open("r+b") as file:
        file.truncate(8192)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: bytes .* cannot be read"):
        mapping.populate(16_384, mapping.bytes)


def test_populating_needs_no_torch_and_importing_loaders_needs_nothing(packed: Packed) -> None:
    script = (
        "import sys, loaders\n"
        "assert not {'numpy', 'xxhash', 'msgspec', 'torch'} & set(sys.modules)\n"
        f"loaders.populate_checkpoint({str(packed('llama')[0])!r})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
