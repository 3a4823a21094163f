"""`.bin` checkpoints: packed to the same bytes as their safetensors twins; pickles that want more are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loaders import CheckpointError, pack_checkpoint

Sources = Callable[[str], Path]


def pickle_weights(source: Path, target: Path, *, sharded: bool = False, legacy: bool = False) -> Path:
    """The checkpoint `source` with its weights as torch.save writes them."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model*"))
    shards = [load_file(path) for path in sorted(source.glob("model*.safetensors"))]
    if sharded:
        where = {}
        for number, shard in enumerate(shards):
            name = f"pytorch_model-{number + 1:05}-of-{len(shards):05}.bin"
            torch.save(shard, target / name)
            where |= dict.fromkeys(shard, name)
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        state = {name: tensor for shard in shards for name, tensor in shard.items()}
        torch.save(state, target / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return target


@pytest.mark.parametrize(
    ("name", "sharded", "legacy"),
    [("llama", True, False), ("qwen3", False, False), ("gpt2", False, True), ("mixtral", False, False)],
)
def test_packed_to_the_same_bytes(name: str, sharded: bool, legacy: bool, sources: Sources, tmp_path: Path) -> None:
    pickled = pickle_weights(sources(name), tmp_path / "pickled", sharded=sharded, legacy=legacy)
    digests = [pack_checkpoint(source, tmp_path / "packed").digest for source in (sources(name), pickled)]
    assert digests[0] == digests[1]


def test_safetensors_are_preferred(sources: Sources, tmp_path: Path) -> None:
    both = Path(shutil.copytree(sources("qwen3"), tmp_path / "both"))
    (both / "pytorch_model.bin").write_bytes(b"x")
    pack_checkpoint(both, tmp_path / "packed")


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def malicious(path: Path, touched: Path) -> None:
    torch.save({"a": torch.zeros(3), "b": Malicious(touched)}, path)


def malicious_legacy(path: Path, touched: Path) -> None:
    torch.save({"b": Malicious(touched)}, path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, touched: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(touched)))


def whole_module(path: Path, touched: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def no_tensor(path: Path, touched: Path) -> None:
    torch.save({"epoch": 3, "state": {"a": torch.zeros(3)}}, path)


def no_names(path: Path, touched: Path) -> None:
    torch.save([torch.zeros(3)], path)


def truncated(path: Path, touched: Path) -> None:
    torch.save({"a": torch.zeros(5000)}, path)
    path.write_bytes(path.read_bytes()[:-3000])


def noise(path: Path, touched: Path) -> None:
    path.write_bytes(b"\x80\x02" + bytes(range(256)))


def empty(path: Path, touched: Path) -> None:
    path.write_bytes(b"")


def sparse(path: Path, touched: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, path)


def compressed(path: Path, touched: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))


def larger_than_its_storage(path: Path, touched: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    content = path.read_bytes()
    assert content.count(b"M\xe8\x03") >= 2  # 1000, as a pickle writes it: elements of the storage, and the shape
    path.write_bytes(content.replace(b"M\xe8\x03", b"M\xff\xff"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (malicious, "holds more than tensors, and what a pickle asks to be run is not run"),
        (malicious_legacy, "holds more than tensors, and what a pickle asks to be run is not run"),
        (bare_pickle, "is damaged or no file"),
        (whole_module, "holds more than tensors"),
        (no_tensor, "holds 'epoch', which is no tensor"),
        (no_names, "holds no tensors by name"),
        (truncated, "is damaged"),
        (noise, "is damaged"),
        (empty, "is damaged"),
        (sparse, "'a' is not a plain one"),
        (compressed, r"packed in a way that torch\.save does not use"),
        (larger_than_its_storage, "is damaged"),
    ],
)
def test_pickles_that_are_no_weights_are_refused_in_one_sentence(
    spoil: Callable[[Path, Path], None],
    says: str,
    sources: Sources,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "s", ignore=shutil.ignore_patterns("model*")))
    spoil(source / "pytorch_model.bin", tmp_path / "touched")
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin.*({says})") as caught:
        pack_checkpoint(source, tmp_path / "packed")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"s"}
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_a_missing_shard_is_named(sources: Sources, tmp_path: Path) -> None:
    source = pickle_weights(sources("llama"), tmp_path / "s", sharded=True)
    sorted(source.glob("*.bin"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard 'pytorch_model-00002.*pytorch_model\.bin\.index\.json"):
        pack_checkpoint(source, tmp_path / "packed")
