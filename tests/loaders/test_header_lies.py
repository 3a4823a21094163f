"""Headers that lie: one clear sentence each, at no cost; what is accepted, other readers accept too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loaders import CheckpointError, Manifest
from loaders.header import DTYPE_BITS, HEADER_LIMIT_BYTES, bytes_of, parse_region, read_header
from loaders.packed import checksum_of, parse_packed_region, read_packed_header

SOME = Path("some.safetensors")


def region_of(document: object) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text


def entry(begin: Any, end: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"a": entry(0, 8), "b": entry(4, 16)}, "overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 16)}, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, "hole"),
        ({"a": entry(4, 16)}, "hole"),
        ({"a": entry(0, 32)}, "truncated"),
        ({"a": entry(0, 8)}, "belong to no tensor"),
        ({"a": entry(-8, 8)}, "two byte positions"),
        ({"a": entry(16, 0, shape=[-16])}, "sizes"),
        ({"a": entry(16, 0, shape=[16])}, "needs 16 bytes"),
        ({"a": entry(0, 16, dtype="F32")}, "needs 64 bytes"),
        ({"a": entry(0, 16, dtype="F31")}, "unknown dtype"),
        ({"a": entry(0, 16, dtype=["F32"])}, "unknown dtype"),
        ({"a": entry(0, 16, dtype="F4", shape=[32, 1])}, "rows of 1 elements of 4 bits"),
        ({"a": entry(0, 16, dtype="F4", shape=[])}, "multiple of 2"),
        ({"a": entry(0, 15, dtype="F6_E2M3", shape=[10, 2])}, "rows of 2 elements of 6 bits"),
        ({"a": entry(0, 15, dtype="F6_E3M2", shape=[])}, "multiple of 4"),
        ({"a": entry(0, 16, dtype="F6_E3M2", shape=[5, 4])}, "needs 15 bytes"),
        ({"a": entry(0, 16, dtype="F4", shape=[2, 32])}, "needs 32 bytes"),
        ({"\ud800": entry(0, 16)}, "no valid Unicode"),
        ({"__metadata__": {"a": "\udc00"}, "a": entry(0, 16)}, "text to text"),
        ({"a": entry(0, 16, shape=[2**40, 2**40])}, "larger than any file"),
        ({"a": entry(0, 2**70)}, "sizes"),
        ({"a": entry(0, True, shape=[1])}, "two byte positions"),
        ({"a": entry(0, 16.0, shape=[16])}, "two byte positions"),
        ({"a": entry(0, 16, shape=[1] * 40)}, "at most 32 sizes"),
        ({"a": {"dtype": "U8", "shape": [16]}}, "exactly dtype"),
        ({"a": {**entry(0, 16), "more": 1}}, "exactly dtype"),
        ({"a": None}, "exactly dtype"),
        ({"": entry(0, 16)}, "name of 0"),
        ({"n" * 2000: entry(0, 16)}, "name of 2000"),
        ({"__metadata__": {"a": 1}}, "text to text"),
        ({"__metadata__": []}, "text to text"),
        ([], "not a JSON object"),
        (b'{"a":1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}',
         "twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[16],"data_offsets":[0,16]}}', "twice"),
    ],
)  # fmt: skip
def test_a_lie_is_named(document: object, says: str) -> None:
    region = region_of(document)
    with pytest.raises(CheckpointError, match=says) as caught:
        parse_region(region, len(region) + 16, SOME)
    assert str(caught.value).startswith("some.safetensors") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("claim", [2**64 - 1, 2**63, HEADER_LIMIT_BYTES + 1, HEADER_LIMIT_BYTES, 17])
def test_a_header_longer_than_the_file_or_the_limit_is_not_read(claim: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(claim.to_bytes(8, "little") + b"{}" + b" " * 14)
    with pytest.raises(CheckpointError, match="claims"):
        read_header(tmp_path / "file")


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        (b'"x":{"dtype":"U8","shape":[],"data_offsets":[0,0]},', 1_000_000),
        (b'"x" :0,', 5_000_000),
        (b"[],", 5_000_000),
    ],
)
def test_a_million_entries_are_refused_before_they_become_objects(entry: bytes, count: int) -> None:
    text = entry * count
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="more than 500000 tensors"):
        parse_region(region_of(b"{" + text), 1 << 40, SOME)
    assert time.perf_counter() - started < 5


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


numbers = st.one_of(st.integers(-4, 80), st.integers(), st.booleans(), st.floats(), st.none(), st.text(max_size=3))
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(sorted(DTYPE_BITS)), numbers),
            "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
            "data_offsets": st.one_of(st.lists(numbers, min_size=1, max_size=3), numbers),
        }
    ),
    st.builds(lambda begin, size: entry(begin, begin + size), st.integers(0, 48), st.integers(0, 32)),
    st.builds(
        lambda dtype, shape: {"dtype": dtype, "shape": shape, "data_offsets": [0, bytes_of(dtype, shape)]},
        st.sampled_from(["F4", "F6_E2M3", "F6_E3M2"]),
        st.lists(st.integers(0, 8), max_size=3),
    ),
    numbers,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entries), st.integers(0, 80))
@example({"a": entry(0, 16), "b": entry(16, 16, shape=[0]), "c": entry(16, 32)}, 32)
@example({"a": entry(0, 6, "F6_E2M3", [2, 4]), "b": entry(6, 9, "F6_E3M2", [4]), "c": entry(9, 13, "F4", [8])}, 13)
@settings(max_examples=150, deadline=None)
def test_what_is_accepted_other_readers_accept(document: dict[str, Any], data_bytes: int) -> None:
    region = region_of(document)
    try:
        header = parse_region(region, len(region) + data_bytes, SOME)
    except CheckpointError:
        return
    assert sum(record.end - record.begin for record in header.tensors) == data_bytes
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(region + bytes(data_bytes))
        file.flush()
        with safe_open(file.name, "np") as opened:
            assert set(opened.keys()) == {record.name for record in header.tensors}


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_region(len(noise).to_bytes(8, "little") + noise, 10_000, SOME)


def resigned(region: bytes, old: bytes, new: bytes) -> bytes:
    """The region with `old` replaced and a right checksum: a forgery that only validation can find."""
    assert old in region
    text = region[8:].replace(old, new)
    text = text.rstrip(b" ")
    text += b" " * (-(8 + len(text)) % 4096)
    region = len(text).to_bytes(8, "little") + text
    start = region.index(b'header_checksum":"') + len(b'header_checksum":"')
    blank = region[:start] + b"0" * 16 + region[start + 16 :]
    return region[:start] + f"{checksum_of(blank):016x}".encode() + region[start + 16 :]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"longshore.version":"1"', b'"longshore.version":"2"', "format version '2'"),
        (b'"longshore.chunk_bytes":"65536"', b'"longshore.chunk_bytes":"65535"', "chunk size"),
        (b'"longshore.chunk_bytes":"65536"', b'"longshore.chunk_bytes":"0"', "chunk size"),
        (b'"longshore.chunk_bytes":"65536"', b'"longshore.chunk_bytes":"-65536"', "chunk size"),
        (b'"longshore.chunk_bytes":"65536"', b'"longshore.chunk_bytes":"4096"', "one checksum for each"),
        (b'"longshore.chunk_checksums":"', b'"longshore.chunk_checksums":"0123456789abcdef', "one checksum for each"),
        (b"lm_head.weight", b"model.norm.weight", "alias 'model.norm.weight'"),
        (b'\\"model.embed_tokens.weight\\"}', b'\\"elsewhere\\"}', "alias 'lm_head.weight'"),
        (b'"longshore.aliases":"{', b'"longshore.aliases":"[', "not valid JSON"),
        (b'"longshore.aliases":"{', b'"longshore.unknown":"{', "not valid JSON"),
        (b'"longshore.original_names":"{}"', b'"longshore.original_names":"{\\"x\\":[]}"', "original names of 'x'"),
        (b'"model.norm.weight"', b'"__padding__.77"', "not of dtype U8"),
        (b'"longshore.header_checksum"', b'"header_checksum"', "no checksum of its header"),
    ],
)
def test_a_packed_header_that_lies_under_a_right_checksum_is_named(
    old: bytes, new: bytes, says: str, packed: Callable[[str], tuple[Path, Manifest]]
) -> None:
    path = packed("qwen3")[0] / "model.safetensors"
    header = read_packed_header(path)
    region = path.read_bytes()[: header.header.data_start]
    forged = resigned(region, old, new)
    with pytest.raises(CheckpointError, match=says):
        parse_packed_region(forged, len(forged) + header.header.data_bytes, path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_packed_header_with_any_forged_bytes_never_crashes(
    data: st.DataObject, packed: Callable[[str], tuple[Path, Manifest]]
) -> None:
    path = packed("qwen3")[0] / "model.safetensors"
    content = path.read_bytes()
    region = content[: read_packed_header(path).header.data_start]
    text = region.rstrip(b" ")
    position = data.draw(st.integers(8, len(text) - 1))
    length = data.draw(st.integers(1, 8))
    replacement = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"-", b"9" * 30, b'"', b"{", b"[0"]))
    )
    old = text[position : position + length]
    try:
        forged = resigned(text[:position] + old + text[position + length :], old, replacement)
    except ValueError:
        return  # the checksum's field itself is gone
    try:
        header = parse_packed_region(forged, len(forged) + len(content) - len(region), path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert header.header.data_bytes == len(content) - len(region)
