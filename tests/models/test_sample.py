"""Sample models: what was asked for, the same for the same seed, never over somebody's files."""

from __future__ import annotations

import json

import pytest
import typer
from safetensors import safe_open
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bus.errors import UserError
from models import cli
from models.errors import ModelError
from models.sample import ARCHITECTURES, make_sample


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_size_is_about_what_was_asked_for(tmp_path, arch):
    made = make_sample(tmp_path / "m", arch=arch, parameters=900_000, seed=1, context=128)
    assert abs(made.parameters - 900_000) < 30_000
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_sample(tmp_path / name, parameters=400_000, seed=seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert len({(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"}) == 1


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_and_index(tmp_path, shards):
    made = make_sample(tmp_path / "m", parameters=2_000_000, shards=shards, dtype="bfloat16")
    assert made.shards == shards
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == shards


def test_tied_and_untied(tmp_path):
    for tied in (True, False):
        make_sample(tmp_path / str(tied), parameters=400_000, tied=tied)
        with safe_open(tmp_path / str(tied) / "model.safetensors", framework="pt") as file:
            assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (a handle, not a dict)


def test_the_vocabulary_is_as_large_as_asked_for(tmp_path):
    make_sample(tmp_path / "m", parameters=3_000_000, vocabulary=6000)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == 6000


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ModelError, match="is not an empty directory"):
        make_sample(tmp_path, parameters=400_000)
    with pytest.raises(ModelError, match="is not an empty directory"):
        make_sample(tmp_path / "precious", parameters=400_000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"arch": "zeppelin"}, "choose one of llama"),
        ({"parameters": 100}, "too few"),
        ({"vocabulary": 100}, "too small"),
        ({"dtype": "int8"}, "cannot have dtype"),
        ({"std": 0.0}, "std above 0"),
    ],
)
def test_what_cannot_be_made(tmp_path, arguments, words):
    with pytest.raises(ModelError, match=words):
        make_sample(tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def app():
    made = typer.Typer()
    made.command("sample")(cli.sample)
    made.command("engine")(cli.bench_engine)
    return made


def test_the_command(tmp_path):
    runner = CliRunner()
    arguments = ["sample", str(tmp_path / "m"), "--size", "400K", "--arch", "qwen3", "--untied"]
    result = runner.invoke(app(), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["architecture"], said["tied"]) == ("qwen3", False)
    again = runner.invoke(app(), arguments)
    assert isinstance(again.exception, UserError)
    assert "is not an empty directory" in str(again.exception)
    wrong = runner.invoke(app(), ["sample", str(tmp_path / "n"), "--size", "many"])
    assert wrong.exit_code != 0
    assert "not a number of parameters" in " ".join(wrong.output.split())


def test_every_help_has_an_example():
    for command in ("sample", "engine"):
        assert "Example: longshore" in CliRunner().invoke(app(), [command, "--help"]).output


def test_sizes():
    assert [cli.parse_size(text) for text in ("60M", "1.1B", "400k", "7")] == [60_000_000, 1_100_000_000, 400_000, 7]
    for text in ("", "M", "-3M", "nan", "infB"):
        with pytest.raises(typer.BadParameter):
            cli.parse_size(text)
