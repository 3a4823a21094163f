"""What a server gives to other servers of its packed models, and everything that it does not give."""

from __future__ import annotations

import http.client
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from packed_sample import pack_sample

from actors.model_server import CONNECTIONS_LIMIT, ModelServer
from bus.errors import UserError
from loaders import fetch_checkpoint, read_manifest, verify_checkpoint

MODEL = "meta=2Ftiny-1=2E0"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("served") / "models"
    pack_sample(models, "meta/tiny-1.0", parameters=300_000)
    return models


@pytest.fixture
def models(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "models"))


@pytest.fixture
def server(models: Path) -> Iterator[ModelServer]:
    serving = ModelServer(models, "127.0.0.1:0")
    yield serving
    serving.stop()


def ask(
    server: ModelServer, target: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=10)
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_a_peer_fetches_what_lies_here(server: ModelServer, models: Path, tmp_path: Path) -> None:
    report = fetch_checkpoint(f"{server.address}/{MODEL}", tmp_path / "fetched")
    assert report.bytes == read_manifest(models / MODEL).bytes
    verify_checkpoint(tmp_path / "fetched")


def test_ranges_are_those_of_the_file(server: ModelServer, models: Path) -> None:
    weights = (models / MODEL / "model.safetensors").read_bytes()
    target = f"/{MODEL}/model.safetensors"
    status, body, headers = ask(server, target, headers={"Range": "bytes=100-299"})
    assert (status, body, headers["Content-Range"]) == (206, weights[100:300], f"bytes 100-299/{len(weights)}")
    assert ask(server, target, headers={"Range": f"bytes={len(weights) - 5}-"})[1] == weights[-5:]
    assert ask(server, target, headers={"Range": f"bytes={len(weights)}-"})[0] == 416
    assert ask(server, target, headers={"Range": "bytes=9-3"})[0] == 416
    status, body, headers = ask(server, target, headers={"Range": "lines=1-2"})
    assert (status, body) == (200, weights)
    assert headers["ETag"] == f'"{read_manifest(models / MODEL).digest}"'
    status, body, headers = ask(server, target, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(weights)))


@pytest.mark.parametrize(
    "target",
    [
        "/",
        f"/{MODEL}",
        f"/{MODEL}/",
        "/longshore.json",
        f"/{MODEL}/../{MODEL}/model.safetensors",
        f"/{MODEL}/../../secret",
        f"/{MODEL}/%2e%2e/secret",
        f"/{MODEL}/..%2fsecret",
        "/..%2f/secret",
        "/%2e%2e/secret",
        "//secret",
        "/meta%2Ftiny-1.0/model.safetensors",
        "/.writing/model.safetensors",
        f"/{MODEL}/longshore-source.json",
        f"/{MODEL}/unlisted",
        f"/{MODEL}/link",
        "/linked/model.safetensors",
        "/half/model.safetensors",
        f"/{MODEL}/model.safetensors%00",
        f"/{MODEL}/" + "a" * 5000,
        "/" + "=FF" * 20 + "/model.safetensors",
    ],
)
def test_nothing_else_is_given(server: ModelServer, models: Path, target: str) -> None:
    for place in (models.parent / "secret", models / "secret", models / MODEL / "unlisted"):
        place.write_text("secret")
    (models / MODEL / "longshore-source.json").write_text('{"source": "/secret"}')
    (models / MODEL / "link").symlink_to(models.parent / "secret")
    (models / "linked").symlink_to(models / MODEL)
    shutil.copytree(models / MODEL, models / ".writing")
    shutil.copytree(models / MODEL, models / "half")
    (models / "half" / "longshore.json").unlink()
    status, body, _ = ask(server, target)
    assert (status, body) == (404, b"")


def test_a_listed_file_that_became_a_link_or_another_one_is_not_given(server: ModelServer, models: Path) -> None:
    folder = models / MODEL
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    assert ask(server, f"/{MODEL}/config.json")[0] == 404
    with (folder / "model.safetensors").open("ab") as weights:
        weights.write(b"more")
    assert ask(server, f"/{MODEL}/model.safetensors")[0] == 404


def test_it_is_read_only(server: ModelServer, models: Path) -> None:
    before = sorted(path.name for path in (models / MODEL).iterdir())
    for method in ("PUT", "POST", "DELETE"):
        assert ask(server, f"/{MODEL}/config.json", method)[0] == 501
    assert ask(server, f"/{MODEL}/config.json", headers={"Content-Length": "5"})[0] == 400
    assert sorted(path.name for path in (models / MODEL).iterdir()) == before


def test_connections_are_bounded_and_given_back(server: ModelServer) -> None:
    place = urlsplit(server.address)
    held = [socket.create_connection((place.hostname, place.port), timeout=10) for _ in range(CONNECTIONS_LIMIT)]
    one_more = socket.create_connection((place.hostname, place.port), timeout=10)
    assert one_more.recv(1) == b""
    one_more.close()
    for connection in held:
        connection.close()
    for _ in range(1000):
        try:
            if ask(server, f"/{MODEL}/longshore.json")[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
    raise AssertionError("connections that were closed are not given back")


def test_it_stops_although_a_connection_is_open(models: Path) -> None:
    serving = ModelServer(models, "127.0.0.1:0")
    place = urlsplit(serving.address)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(f"GET /{MODEL}/longshore.json HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        serving.stop()
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("listen", ["0.0.0.0:8090", "[::]:8090", ":8090", "192.0.2.1:8090", "127.0.0.1:port"])
def test_an_address_that_is_none_for_others_is_refused(models: Path, listen: str) -> None:
    with pytest.raises(UserError, match="--serve-models"):
        ModelServer(models, listen)
