"""Fetching from elsewhere: whatever the other side does, the destination holds the old checkpoint or the new one."""

from __future__ import annotations

import errno
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from range_server import Handler, find_nginx, nginx, range_server

from loaders import (
    CheckpointError,
    Manifest,
    open_checkpoint,
    read_manifest,
    resident_bytes,
    storage,
    verify_checkpoint,
)
from loaders import http_source as http_module
from loaders.fetch import Fetch, fetch_checkpoint
from loaders.manifest import MANIFEST_NAME, encode_manifest
from loaders.remote import open_source

Packed = Callable[[str], tuple[Path, Manifest]]
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "PAUSE_SECONDS", 0.001)


def check_equal(destination: Path, origin: Path) -> None:
    verify_checkpoint(destination)
    assert sorted(path.name for path in destination.iterdir()) == sorted(path.name for path in origin.iterdir())
    for path in filter(Path.is_file, origin.rglob("*")):
        assert (destination / path.relative_to(origin)).read_bytes() == path.read_bytes(), path


def goes_on(destination: Path, origin: Path) -> None:
    """Nothing is there, and what came was kept for a source that has it right."""
    assert not destination.exists()
    assert fetch_checkpoint(origin, destination).kept_bytes > 0
    check_equal(destination, origin)
    assert [path.name for path in destination.parent.glob(f".{destination.name}*")] == []


def nothing_left(destination: Path) -> None:
    assert not destination.exists() and not list(destination.parent.glob(f".{destination.name}*"))


@pytest.mark.parametrize("keep", [True, False])
def test_from_a_directory(keep: bool, packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    report = fetch_checkpoint(origin, tmp_path / "copy", keep_in_memory=keep)
    check_equal(tmp_path / "copy", origin)
    assert report.bytes == (origin / WEIGHTS).stat().st_size and report.limit in report.stages


def test_what_is_kept_lies_in_memory_and_what_is_not_does_not(packed: Packed, tmp_path: Path) -> None:
    origin, manifest = packed("llama")
    fetch_checkpoint(origin, tmp_path / "kept")
    assert resident_bytes(tmp_path / "kept") == manifest.bytes
    fetch_checkpoint(origin, tmp_path / "dropped", keep_in_memory=False)
    assert resident_bytes(tmp_path / "dropped") <= manifest.bytes // 4


def test_by_ranges_over_several_connections(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    with range_server(origin) as server:
        fetch_checkpoint(server.url, tmp_path / "copy")
        asked = [asked for name, asked in server.seen if name == WEIGHTS]
    check_equal(tmp_path / "copy", origin)
    assert len(asked) > 3 and all(asked) and len(set(asked)) == len(asked), "each range once"


@pytest.mark.skipif(find_nginx() is None, reason="nginx is not installed (apt-get install nginx-light)")
def test_from_a_real_nginx(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("mixtral")
    (tmp_path / "www").mkdir(mode=0o755)
    shutil.copytree(origin, tmp_path / "www" / "a model")
    with nginx(tmp_path / "www", tmp_path / "nginx") as url:
        fetch_checkpoint(f"{url}/a%20model/", tmp_path / "copy")
        with pytest.raises(CheckpointError, match=r"no such file \(status 404\)"):
            fetch_checkpoint(f"{url}/elsewhere", tmp_path / "none")
    check_equal(tmp_path / "copy", origin)
    nothing_left(tmp_path / "none")


def test_a_server_that_ignores_ranges_is_read_in_order(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")

    def ignore(handler: Handler, name: str, number: int) -> bool:
        handler.give(origin / name, ranges=False)
        return True

    with range_server(origin, ignore) as server:
        fetch_checkpoint(server.url, tmp_path / "copy")
        bodies = [asked for name, asked in server.seen if name == WEIGHTS and not asked]
    check_equal(tmp_path / "copy", origin)
    assert len(bodies) == 1, "the body is read once, on and on"


@pytest.mark.parametrize("ranges", [True, False])
def test_connections_that_break_are_tried_again(ranges: bool, packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")

    broken: dict[str, int] = {}

    def cut(handler: Handler, name: str, number: int) -> bool:
        asked = handler.headers.get("Range", "")
        broken[asked] = broken.get(asked, 0) + 1
        whole = name != WEIGHTS or asked == "bytes=0-0" or broken[asked] > 2
        handler.give(origin / name, ranges=ranges, cut=None if whole else 3000 * broken[asked])
        return True

    with range_server(origin, cut) as server:
        fetch_checkpoint(server.url, tmp_path / "copy")
    check_equal(tmp_path / "copy", origin)


def test_trouble_that_passes(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    troubled: set[tuple[str, str]] = set()

    def trouble(handler: Handler, name: str, number: int) -> bool:
        asked = (name, handler.headers.get("Range", ""))
        if asked in troubled:
            return False
        troubled.add(asked)
        handler.answer(500, b"oh")
        return True

    with range_server(origin, trouble) as server:
        fetch_checkpoint(server.url, tmp_path / "copy")
    check_equal(tmp_path / "copy", origin)


def test_trouble_that_stays(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")

    def trouble(handler: Handler, name: str, number: int) -> bool:
        if name != WEIGHTS or handler.headers.get("Range") == "bytes=0-0":
            return False
        handler.answer(503, b"oh")
        return True

    with range_server(origin, trouble) as server, pytest.raises(CheckpointError, match=r"status 503; given up after 5"):
        fetch_checkpoint(server.url, tmp_path / "copy")
    nothing_left(tmp_path / "copy")


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CheckpointError, match=r"given up after 5 attempts"):
            fetch_checkpoint(url, tmp_path / "copy")
    nothing_left(tmp_path / "copy")


def test_a_file_that_changes_between_requests(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")

    def change(handler: Handler, name: str, number: int) -> bool:
        if name != WEIGHTS or number < 12:
            return False
        handler.give(origin / name, etag='"another"')
        return True

    with range_server(origin, change) as server, pytest.raises(CheckpointError, match="changed while it was read"):
        fetch_checkpoint(server.url, tmp_path / "copy")
    goes_on(tmp_path / "copy", origin)


def test_a_server_that_forgets_ranges_midway(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")

    def forget(handler: Handler, name: str, number: int) -> bool:
        if name != WEIGHTS or number < 12:
            return False
        handler.give(origin / name, ranges=False)
        return True

    with range_server(origin, forget) as server, pytest.raises(CheckpointError, match="changed while it was read"):
        fetch_checkpoint(server.url, tmp_path / "copy")
    goes_on(tmp_path / "copy", origin)


def test_another_range_than_asked_for(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    size = (origin / WEIGHTS).stat().st_size

    def shift(handler: Handler, name: str, number: int) -> bool:
        if name != WEIGHTS or handler.headers.get("Range") == "bytes=0-0":
            return False
        handler.answer(206, b"x" * 100, {"Content-Range": f"bytes 5-104/{size}"})
        return True

    with range_server(origin, shift) as server, pytest.raises(CheckpointError, match="another range"):
        fetch_checkpoint(server.url, tmp_path / "copy")
    nothing_left(tmp_path / "copy")


def test_a_chunk_that_comes_damaged(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    spoiled = Path(shutil.copytree(origin, tmp_path / "spoiled"))
    with (spoiled / WEIGHTS).open("r+b") as file:
        file.seek(-5000, 2)
        byte = file.read(1)[0]
        file.seek(-5000, 2)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(CheckpointError, match=r"chunk \d+ of \d+ \(with .* came damaged"):
        fetch_checkpoint(spoiled, tmp_path / "copy")
    goes_on(tmp_path / "copy", origin)


def test_the_old_one_stays_when_the_new_one_fails(packed: Packed, packed_copy: Path, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    before = {path.name: path.read_bytes() for path in packed_copy.iterdir()}

    def gone(handler: Handler, name: str, number: int) -> bool:
        if number < 12:
            return False
        handler.answer(404, b"gone")
        return True

    with range_server(origin, gone) as server, pytest.raises(CheckpointError, match="no such file"):
        fetch_checkpoint(server.url, packed_copy)
    assert {path.name: path.read_bytes() for path in packed_copy.iterdir()} == before
    fetch_checkpoint(origin, packed_copy)
    check_equal(packed_copy, origin)


def test_a_file_that_vanishes_from_a_directory(packed_copy: Path, tmp_path: Path) -> None:
    (packed_copy / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be opened"):
        fetch_checkpoint(packed_copy, tmp_path / "copy")
    nothing_left(tmp_path / "copy")


def test_every_write_fails_in_turn(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, _ = packed("qwen3")
    real_write, real_sync = storage.write, storage.sync
    failing, count = 0, 0

    def fail_at() -> None:
        nonlocal count
        count += 1
        if count - 1 == failing:
            raise OSError(errno.ENOSPC, "full")

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        fail_at()
        return real_write(descriptor, data, offset)

    def sync(descriptor: int) -> None:
        fail_at()
        real_sync(descriptor)

    monkeypatch.setattr(storage, "write", write)
    monkeypatch.setattr(storage, "sync", sync)
    while True:
        count = 0
        destination = tmp_path / "copy"
        if failing > 100:
            raise AssertionError("it never gets through")
        try:
            fetch_checkpoint(origin, destination)
            break
        except CheckpointError as error:
            assert "disk is full" in str(error)
            if destination.exists():  # the last sync failed, after the swap: then it is the new one, whole
                check_equal(destination, origin)
                shutil.rmtree(destination)
            nothing_left(destination)
        failing += 1
    assert failing > 6
    monkeypatch.undo()
    check_equal(tmp_path / "copy", origin)


def test_a_cancelled_fetch_ends_soon_and_leaves_nothing(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    hanging, release = threading.Event(), threading.Event()

    def hang(handler: Handler, name: str, number: int) -> bool:
        if name != WEIGHTS or number < 12:
            return False
        hanging.set()
        release.wait(30)
        return True

    with range_server(origin, hang) as server:
        fetch = Fetch(open_source(server.url), tmp_path / "copy")
        ended: list[BaseException] = []

        def run() -> None:
            try:
                fetch.run()
            except CheckpointError as error:
                ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert hanging.wait(30)
        fetch.cancel()
        thread.join(10)
        assert not thread.is_alive() and "cancelled" in str(ended[0])
        release.set()
    nothing_left(tmp_path / "copy")


def test_other_weights_than_wanted(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    with pytest.raises(CheckpointError, match="holds other weights"):
        fetch_checkpoint(origin, tmp_path / "copy", digest="0" * 64)
    nothing_left(tmp_path / "copy")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("ftp://host/model", "no place to load from"),
        ("http://", "no address"),
        ("http://user:word@host/x", "credentials"),
        ("http://host:99999/x", "no address"),
        ("http://a host/x", "no address"),
        ("http://host/x\n", "no address"),
        ("/nowhere/at/all", "no directory"),
        ("/usr", "not a packed checkpoint"),
        ("/usr/" + "n" * 300, "too long"),
    ],
)
def test_addresses_that_are_none(address: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        fetch_checkpoint(address, tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["../config.json", "/config.json", "a/../config.json", "a/b/c", WEIGHTS, MANIFEST_NAME]
)
def test_a_manifest_that_names_files_elsewhere(name: str, packed_copy: Path, tmp_path: Path) -> None:
    manifest = read_manifest(packed_copy)
    forged = msgspec.structs.replace(manifest, files={name: manifest.files["config.json"]})
    (packed_copy / MANIFEST_NAME).write_bytes(encode_manifest(forged))
    with pytest.raises(CheckpointError, match=r"plain file name|beside the weights"):
        fetch_checkpoint(packed_copy, tmp_path / "copy")
    nothing_left(tmp_path / "copy")


def test_destinations_that_cannot_be_are_refused_before_anything_is_read(
    packed: Packed, packed_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, _ = packed("llama")
    (tmp_path / "link").symlink_to(packed_copy)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for destination, says in (
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "nowhere", "symbolic link"),
        (packed_copy / "config.json" / "below", "is a file"),
        (tmp_path / ("n" * 300), "too long"),
    ):
        with pytest.raises(CheckpointError, match=says):
            fetch_checkpoint(origin, destination)
    monkeypatch.setattr("loaders.destination.os.access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="may not write to"):
        fetch_checkpoint(origin, packed_copy)
    assert read_manifest(packed_copy).model_type == "qwen3" and (tmp_path / "link").is_symlink()


def test_into_the_directory_where_one_stands(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, _ = packed("llama")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fetch_checkpoint(origin, ".")
    check_equal(tmp_path / "here", origin)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"Location": "http://[::1"}, "no http address"),
        ({"Location": "http://127.0.0.1:99999/x"}, "no http address"),
        ({"Location": "http://127.0.0.1:1/a b"}, "no http address"),
        ({"Location": "file:///etc/passwd"}, "no http address"),
        ({}, "does not say where"),
    ],
)
def test_a_server_that_sends_us_nowhere(headers: dict[str, str], says: str, packed: Packed, tmp_path: Path) -> None:
    def elsewhere(handler: Handler, name: str, number: int) -> bool:
        handler.answer(302, b"", headers)
        return True

    with range_server(packed("llama")[0], elsewhere) as server, pytest.raises(CheckpointError, match=says):
        fetch_checkpoint(server.url, tmp_path / "copy")


@pytest.mark.parametrize("length", ["\u00b2", "9" * 5000, "-5", ""])
def test_a_length_that_is_none(length: str, packed: Packed, tmp_path: Path) -> None:
    def lie(handler: Handler, name: str, number: int) -> bool:
        if name != WEIGHTS:
            return False
        handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{{}}".encode("latin-1"))
        handler.close_connection = True
        return True

    with range_server(packed("llama")[0], lie) as server, pytest.raises(CheckpointError, match="how long the file is"):
        fetch_checkpoint(server.url, tmp_path / "copy")
    nothing_left(tmp_path / "copy")


def test_an_answer_that_is_no_http_is_told_in_one_line(packed: Packed, tmp_path: Path) -> None:
    def babble(handler: Handler, name: str, number: int) -> bool:
        handler.wfile.write(b"\0\x1b[2J\xff" * 1000 + b"\r\n")
        handler.close_connection = True
        return True

    with range_server(packed("llama")[0], babble) as server, pytest.raises(CheckpointError, match="given up") as caught:
        fetch_checkpoint(server.url, tmp_path / "copy")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_server_that_gives_a_byte_at_a_time(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "PIECE_SECONDS", 0.02)
    stopped = threading.Event()

    def drip(handler: Handler, name: str, number: int) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not stopped.wait(0.002):
            handler.wfile.write(b" ")
        return True

    with range_server(packed("llama")[0], drip) as server, pytest.raises(CheckpointError, match="too slow"):
        fetch_checkpoint(server.url, tmp_path / "copy")
    stopped.set()


def test_what_was_fetched_can_be_computed_with(packed: Packed, tmp_path: Path) -> None:
    origin, _ = packed("llama")
    with range_server(origin) as server:
        fetch_checkpoint(server.url, tmp_path / "copy")
    expected = open_checkpoint(origin).tensors
    for name, tensor in open_checkpoint(tmp_path / "copy").tensors.items():
        assert torch.equal(tensor, expected[name])
