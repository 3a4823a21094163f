"""What `deploy/` says is what the program takes: commands, flags, variables, fields, ports, files, rights."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from command_lines import check_command

from bus.config_cli import all_fields
from bus.config_file import check_configuration
from bus.config_options import CONFIG_VARIABLE

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
FIELDS = {one.path: one for many in all_fields().values() for one in many}
VALUES = check_configuration(DEPLOY / "longshore.yaml", FIELDS)[0]


def check_variables(environment: dict[str, Any]) -> None:
    known = {one.variable: one for one in FIELDS.values()}
    for name, value in environment.items():
        if name.startswith("LONGSHORE_") and name != CONFIG_VARIABLE:
            assert name in known, name
            text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))
            known[name].from_text(text)


def test_the_configuration_is_in_order() -> None:
    values, _, problems = check_configuration(DEPLOY / "longshore.yaml", FIELDS)
    assert problems == [] and len(values) > 10


# ---- systemd ------------------------------------------------------------------------------------------------


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_runs_what_there_is(unit: Path) -> None:
    found = settings(unit)
    program, *words = shlex.split(found["ExecStart"][0])
    assert program in ("/opt/longshore/bin/longshore", "/opt/longshore/bin/nats-server")
    if program.endswith("longshore"):
        check_command(words)
        assert found["Type"] == ["notify"] and float(found["WatchdogSec"][0]) >= 30
        assert found["EnvironmentFile"][0].startswith("/etc/longshore/nats/")
    assert {"NoNewPrivileges", "ProtectSystem", "SystemCallFilter", "User", "Restart"} <= set(found)
    for path in found.get("StateDirectory", []):
        assert str(VALUES["node.data"]) == f"/var/lib/{path}" or path in ("longshore/nats", "longshore/generations")


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    bin_folder = str(Path(sys.executable).parent)
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/longshore/bin", bin_folder))
    units = [str(tmp_path / unit.name) for unit in UNITS]
    done = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True, timeout=30)
    ours = [line for line in done.stderr.splitlines() if "longshore-" in line]
    assert (done.returncode, ours) == (0, []), done.stderr
    for unit in units:
        done = subprocess.run(
            [analyze, "security", "--offline=true", "--threshold=25", "--no-pager", unit],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stdout[-500:]


# ---- compose ------------------------------------------------------------------------------------------------


def services(*names: str) -> dict[str, dict[str, Any]]:
    """The services, later files over earlier ones, as compose merges what we use of it."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for service, said in yaml.safe_load((DEPLOY / name).read_text())["services"].items():
            base = found.get(service, {})
            merged = base | said
            for key in ("environment", "depends_on"):
                if key in base or key in said:
                    merged[key] = base.get(key, {}) | said.get(key, {})
            found[service] = merged
    return found


COMPOSED = (("compose.yaml",), ("compose.yaml", "compose.cluster.yaml"))


@pytest.mark.parametrize("files", COMPOSED, ids=("one", "three"))
def test_compose_runs_what_there_is(files: tuple[str, ...]) -> None:
    found = services(*files)
    nats = [name for name in found if re.fullmatch(r"nats(-\d)?", name)]
    assert len(nats) == (1 if len(files) == 1 else 3)
    assert found["control"]["deploy"]["replicas"] == 2
    volumes = {name for file in files for name in yaml.safe_load((DEPLOY / file).read_text())["volumes"]}
    for name, service in found.items():
        if service.get("entrypoint") is None:
            check_command(service["command"])
        check_variables(service.get("environment", {}))
        assert set(service.get("depends_on", {})) <= set(found)
        for mount in service.get("volumes", []):
            source, place = mount.split(":")[:2]
            assert source != "./longshore.yaml" or place in service["command"]
            assert source in volumes or (DEPLOY / source).exists(), mount
        for waited, how in service.get("depends_on", {}).items():
            healthy = how["condition"] == "service_healthy"
            assert not healthy or "healthcheck" in found[waited], f"{name} waits for the health of {waited}"
    for address in found["control"]["environment"]["LONGSHORE_NATS"].split(","):
        assert urlsplit(address).hostname in nats


def test_compose_asks_for_health_where_it_is_told() -> None:
    found = services("compose.yaml")
    ports = {
        "control": VALUES["control.health"],
        "node": VALUES["node.health"],
        "gateway": f":{VALUES['gateway.port']}",
    }
    for name, address in ports.items():
        url = re.search(r"http://[^']+", found[name]["healthcheck"]["test"][-1])
        assert url is not None and url.group().split("/")[2].endswith(address.rpartition(":")[2])
        assert url.group().endswith("/health" if name == "gateway" else "/readyz")


@pytest.mark.parametrize("files", COMPOSED, ids=("one", "three"))
def test_compose_uses_the_users_that_it_makes(files: tuple[str, ...], tmp_path: Path) -> None:
    found = services(*files)
    command = [str(tmp_path) if word == "/etc/longshore/nats" else word for word in found["nats-config"]["command"]]
    done = subprocess.run([sys.executable, "-m", "bus.main", *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir()}
    for name in ("control", "node", "gateway"):
        environment = found[name]["environment"]
        assert Path(environment["LONGSHORE_NATS_PASSWORD_FILE"]).name in made
        text = (tmp_path / f"{environment['LONGSHORE_NATS_USER']}.env").read_text()
        assert f"LONGSHORE_NATS_INBOX={environment['LONGSHORE_NATS_INBOX']}" in text.splitlines()
    for name, service in found.items():
        if re.fullmatch(r"nats(-\d)?", name):
            config = Path(service["command"][-1]).name
            assert config in made
            server = Path(sys.executable).parent / "nats-server"
            checked = subprocess.run(
                [server, "-t", "-c", tmp_path / config], capture_output=True, text=True, timeout=30
            )
            assert checked.returncode == 0, checked.stderr


def test_the_image_has_every_room() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:]}
    root = DEPLOY.parent
    rooms = {path.parent.name for path in root.glob("*/__init__.py") if path.parent.name != "tests"}
    assert rooms | {"pyproject.toml", "constraints.txt"} <= copied
    assert all((root / word.rstrip("/")).exists() for word in copied if word != "./")
