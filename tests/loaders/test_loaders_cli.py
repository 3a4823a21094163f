"""`longshore pack` and `longshore verify` as a person or a script meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from actors import model_cli
from loaders import Manifest, cli

application = typer.Typer()
application.command()(model_cli.pack)
application.command()(cli.verify)


def test_pack_and_verify(sources: Callable[[str], Path], tmp_path: Path) -> None:
    run = CliRunner()
    packing = run.invoke(application, ["pack", str(sources("gpt2")), str(tmp_path / "out")])
    assert packing.exit_code == 0 and "Packed GPT2LMHeadModel" in packing.stdout
    verifying = run.invoke(application, ["verify", str(tmp_path / "out")])
    assert verifying.exit_code == 0 and "is whole" in verifying.stdout
    as_json = run.invoke(application, ["verify", str(tmp_path / "out"), "--json"])
    assert json.loads(as_json.stdout)["verified"] is True


def test_json_of_pack_is_the_manifest(sources: Callable[[str], Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(application, ["pack", str(sources("gpt2")), str(tmp_path / "out"), "--json"])
    assert json.loads(result.stdout)["architecture"] == "GPT2LMHeadModel"


def test_damage_is_one_sentence_and_exit_code_1(
    packed_copy: Path, packed: Callable[[str], tuple[Path, Manifest]]
) -> None:
    path = packed_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    result = CliRunner().invoke(application, ["verify", str(packed_copy), "--json"])
    assert result.exit_code == 1 and "is damaged" in json.loads(result.stdout)["error"]
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output


@pytest.mark.parametrize("command", ["pack", "verify"])
def test_help_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(application, [command, "--help"])
    assert result.exit_code == 0 and f"longshore {command} ~/" in " ".join(result.stdout.split())


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    script = "import sys, loaders.cli; assert not {'torch', 'numpy', 'msgspec', 'rich.progress'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
