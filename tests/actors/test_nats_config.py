"""`longshore nats-config`: a cell runs under the users that it writes, and each user is refused what is not its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as RawClient

from actors.children import Child
from actors.stub_node import MODEL
from actors.up import cell_status
from bus.answer import RequestFailed
from bus.client import Client
from bus.contract import NotAllowed, Unreachable
from bus.credentials import VARIABLES
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.jetstream_api import stream_info
from bus.main import main
from bus.messages import FACTS, kind_of
from bus.nats_config import ConfigOptions, Member, Tls, write_configuration
from bus.permissions import FACT_KINDS
from tests.support.nats_servers import ConfiguredServer, free_ports, login, variables

CELL = "guarded"


@dataclass
class Guarded:
    """A real server with users; the folder has what they need."""

    folder: Path
    port: int

    async def bus(self, user: str, **options: Any) -> JetStreamBus:
        return await JetStreamBus.connect(login(self.folder, user), CELL, **options)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    (port,) = free_ports(1)
    folder = tmp_path / "config"
    options = ConfigOptions(
        folder, CELL, ("shop", "web"), ("n0", "n1"), 2, "nkey", port=port, store=str(tmp_path / "streams")
    )
    write_configuration(options)
    server = ConfiguredServer(folder / "nats-server.conf", port)
    server.start()
    try:
        yield Guarded(folder, port)
    finally:
        server.stop()


# ---- a cell under these users ---------------------------------------------------------------------------------


async def command(guarded: Guarded, user: str, *arguments: str) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES.values()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bus.main", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=environment | variables(guarded.folder / f"{user}.env"),
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def status_of(bus: JetStreamBus, reached: Callable[[dict[str, Any]], bool]) -> None:
    while True:
        found = await cell_status(bus, CELL)
        if found is not None and reached(found):
            return
        await asyncio.sleep(0.05)


@asynccontextmanager
async def cell_of(guarded: Guarded, folder: Path) -> AsyncIterator[list[Child]]:
    """A control and a node, each as its own user."""
    node = [
        "--nats",
        login(guarded.folder, "node-n0").address,
        "--cell",
        CELL,
        "--server",
        "n0",
        "--step-seconds",
        "0.002",
    ]
    children = [
        Child("control", ["control"], folder / "control.log", environment=variables(guarded.folder / "control.env")),
        Child("node", node, folder / "node.log", module="actors.stub_node",
              environment=variables(guarded.folder / "node-n0.env")),
    ]  # fmt: skip
    operator = await guarded.bus("operator")
    try:
        for child in children:
            await child.start()
            # The node needs the streams, which the control makes.
            await status_of(operator, lambda found: True)
        await status_of(operator, lambda found: bool(found["workers"] and found["models"]))
        yield children
    except BaseException:
        print("\n".join(child.last_words(20) for child in children))
        raise
    finally:
        await operator.close()
        for child in reversed(children):
            await child.stop()


async def test_a_whole_cell_runs_under_the_written_users(guarded: Guarded, tmp_path: Path) -> None:
    async with cell_of(guarded, tmp_path) as children:
        bus = await guarded.bus("shop")
        client = Client(bus, CELL, name="shop", parts_from_bytes=2000)
        answer = client.infer(MODEL, prompt="hello", max_tokens=20, key="k1")
        text = await answer.text()
        assert text and answer.end == "length"
        assert await client.resume(answer.request_id).text() == text
        left = await client.submit(MODEL, prompt="hello", max_tokens=5, key="k2")
        assert await client.resume(left).text()
        # A worker shows the end of an answer before the cell has heard of it.
        while (await client.result(left)).status == "running":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert len((await client.embed(MODEL, ["one", "two"], key="k4")).vectors) == 2
        in_parts = Client(bus, CELL, name="shop", parts_from_bytes=100)
        assert await in_parts.infer(MODEL, prompt="large " * 100, max_tokens=5, key="k5").text()
        running = client.infer(MODEL, prompt="long", max_tokens=8000, key="k3")
        await anext(running)
        await client.cancel(running.request_id)
        async for _ in running:
            pass
        assert running.end == "cancelled"
        assert [one["model"] for one in await client.models()] == [MODEL]
        moved = client.infer(MODEL, prompt="in parts " * 500, max_tokens=300, key="moved")
        async for chunk in moved:
            if chunk.position == 5:
                # Recovery seals and reads as control; the node goes on behind what stands in TOKENS.
                children[1].signal(signal.SIGKILL)
                await children[1].wait()
                await children[1].start()
        assert (moved.end, moved.position) == ("length", 300)
        with pytest.raises((RequestFailed, NotAllowed), match="not allow this user to publish"):
            await client.remove_model(MODEL)
        await bus.close()

        recording = str(tmp_path / "r.lsrec")
        results = await asyncio.gather(
            command(guarded, "operator", "tail", "--no-follow", "--kind", "request.ended"),
            command(guarded, "operator", "status", "--json"),
            command(guarded, "operator", "record", recording),
            command(guarded, "operator", "model", "list"),
            command(guarded, "operator", "difference", "accept", "1", "0"),
            command(guarded, "operator", "backup", str(tmp_path / "b.lsbak")),
        )
        assert [code for code, _, _ in results] == [0] * 6, results
        assert "request.ended" in results[0][1] and "was cancelled" in results[0][1]
        code, out, _ = await command(guarded, "shop", "ask", MODEL, "hello", "--max-tokens", "3")
        assert code == 0 and out.strip()
        for arguments in (["tail", "--no-follow"], ["record", str(tmp_path / "other")]):
            code, out, err = await command(guarded, "shop", *arguments)
            assert code == 1 and not out and "does not allow this user to publish on $JS.API.STREAM.INFO" in err
        code, out, _ = await command(guarded, "operator", "replay", recording, "--verify")
        assert code == 0 and "verified" in out
        for child in children:
            assert "ermission" not in child.log.read_text() and "allow" not in child.log.read_text()


# ---- attempts -------------------------------------------------------------------------------------------------

LEDGER, TOKENS, INTAKE = f"LEDGER_{CELL}", f"TOKENS_{CELL}", f"INTAKE_{CELL}"
SNAPSHOTS, PARTS = f"SNAPSHOTS_{CELL}", f"PARTS_{CELL}"
HERE = f"longshore.{CELL}"
KINDS = [kind_of(kind) for kind in FACTS]
API = "$JS.API"
COPY = [f"{API}.STREAM.SNAPSHOT.{stream}" for stream in (LEDGER, TOKENS, INTAKE, PARTS, SNAPSHOTS)]

MAY: dict[str, dict[str, list[str]]] = {
    "shop": {
        "publish": [f"{HERE}.infer.m", f"{HERE}.submit.m", f"{HERE}.cancel.r", f"{HERE}.resume.r", f"{HERE}.result.r",
                    f"{HERE}.admin.models", f"{HERE}.admin.status", f"{HERE}.embed.m", f"{HERE}.part.u.0"],
        "subscribe": ["_INBOX.shop.x", "_INBOX.shop.>"],
    },
    "node-n0": {
        "publish": [f"{HERE}.fact.store/n0.store.started", f"{HERE}.fact.gpu/n0/1.sequence.finished",
                    f"{HERE}.tokens.gpu/n0/1.17", f"{HERE}.heartbeat.gpu/n0/0", "_INBOX.shop.x",
                    f"{API}.STREAM.MSG.GET.{LEDGER}", f"{API}.STREAM.MSG.GET.{PARTS}"],
        "subscribe": ["_INBOX.node-n0.>", f"{HERE}.heartbeat.store/n0"],
    },
    "control": {
        "publish": [f"{HERE}.fact.requests.request.accepted", f"{HERE}.fact.gpu/n0/0.driver.lost",
                    f"{HERE}.said.requests.placement.request.place", f"{HERE}.tokens.gpu/n0/0.17", "_INBOX.shop.x",
                    f"{HERE}.refused.m"],
        "subscribe": [f"{HERE}.infer.>", f"{HERE}.heartbeat.>", "$SRV.PING"],
    },
    "operator": {
        "publish": [f"{HERE}.fact.cell.difference.accepted", f"{HERE}.fact.cell.rules.activated",
                    f"{HERE}.admin.model.add", "$SRV.PING", f"{API}.STREAM.INFO.{LEDGER}", *COPY],
        "subscribe": [f"{HERE}.>", f"{HERE}.said.>", "$JS.EVENT.ADVISORY.>"],
    },
}  # fmt: skip

DESTROY = [
    f"{API}.{verb}.{stream}"
    for stream in (LEDGER, TOKENS, INTAKE, SNAPSHOTS, PARTS)
    for verb in ("STREAM.DELETE", "STREAM.PURGE", "STREAM.MSG.DELETE", "STREAM.SNAPSHOT", "STREAM.RESTORE")
]
OPERATES = [
    *COPY,
    *(f"{API}.STREAM.RESTORE.{stream}" for stream in (LEDGER, TOKENS, INTAKE, PARTS, SNAPSHOTS)),
    f"{API}.STREAM.UPDATE.{LEDGER}",
    f"{API}.STREAM.UPDATE.{TOKENS}",
    f"{API}.STREAM.PURGE.{LEDGER}",
]
"""What backup and restore, `longshore ledger limit` and `ledger rotate` need."""
CLEAR = (f"{API}.STREAM.PURGE.{SNAPSHOTS}", f"{API}.STREAM.PURGE.{LEDGER}")
CHANGE = [
    f"{API}.{verb}.{stream}"
    for stream in (LEDGER, TOKENS, INTAKE, SNAPSHOTS, PARTS)
    for verb in ("STREAM.CREATE", "STREAM.UPDATE")
]
READ = [
    f"{API}.{verb}.{stream}{rest}"
    for stream in (LEDGER, TOKENS, INTAKE, SNAPSHOTS, PARTS)
    for verb, rest in (
        ("STREAM.INFO", ""),
        ("STREAM.MSG.GET", ""),
        ("DIRECT.GET", ""),
        ("CONSUMER.CREATE", ".c"),
        ("CONSUMER.CREATE", f".c.{HERE}.fact.requests.request.accepted"),
        ("CONSUMER.DURABLE.CREATE", ".c"),
        ("CONSUMER.MSG.NEXT", ".intake"),
        ("CONSUMER.DELETE", ".intake"),
    )
]
DECIDE = [f"{HERE}.said.requests.placement.request.place", f"{HERE}.said.gpu.driver/gpu/n0/0.model.attach"]
MANAGE = [
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.ACCOUNT.PING",
    f"{API}.META.LEADER.STEPDOWN",
    f"{API}.STREAM.CREATE.other",
    f"{API}.STREAM.LEADER.STEPDOWN.{LEDGER}",
]
OTHERS = ["_INBOX.>", "_INBOX.web.>", ">", "$SYS.>", "$JS.>"]

MAY_NOT: dict[str, dict[str, list[str]]] = {
    "shop": {
        "publish": [*DESTROY, *CHANGE, *READ, *DECIDE, *MANAGE, "_INBOX.web.x", f"{HERE}.admin.model.add",
                    f"{HERE}.admin.model.remove", f"{HERE}.refused.m", f"{HERE}.heartbeat.gpu/n0/0",
                    f"{HERE}.tokens.gpu/n0/0.17", "longshore.other.infer.m", f"$JS.ACK.{INTAKE}.intake.1.1.1.1.0",
                    *(f"{HERE}.fact.{actor}.{kind}" for kind in KINDS for actor in ("requests", "gpu/n0/0"))],
        "subscribe": [*OTHERS, f"{HERE}.>", f"{HERE}.infer.>", f"{HERE}.said.>", f"{HERE}.fact.>", f"{HERE}.tokens.>",
                      f"{HERE}.part.>",
                      f"{HERE}.refused.*", "_INBOX.control.>"],
    },
    "node-n0": {
        "publish": [*DESTROY, *CHANGE, *DECIDE, *MANAGE, f"{HERE}.infer.m", f"{HERE}.submit.m", f"{HERE}.admin.models",
                    f"{HERE}.fact.gpu/n1/0.sequence.finished", f"{HERE}.fact.store/n1.store.started",
                    f"{HERE}.fact.gpu/n0/2.worker.started", f"{HERE}.tokens.gpu/n1/0.17",
                    f"{HERE}.heartbeat.gpu/n1/0", f"{API}.CONSUMER.MSG.NEXT.{INTAKE}.intake",
                    f"{API}.CONSUMER.CREATE.{PARTS}.c", f"{HERE}.snapshot.manifest", f"{HERE}.part.u.0",
                    *(f"{HERE}.fact.gpu/n0/0.{kind}" for kind in KINDS if kind not in FACT_KINDS["node"]),
                    *(f"{HERE}.fact.requests.{kind}" for kind in KINDS)],
        "subscribe": [*OTHERS, f"{HERE}.infer.>", f"{HERE}.heartbeat.>", "_INBOX.control.>", f"{HERE}.said.>"],
    },
    "control": {
        "publish": [*(s for s in DESTROY if s not in CLEAR), *MANAGE, f"{HERE}.infer.m", f"{HERE}.submit.m",
                    f"{HERE}.admin.model.add", f"{HERE}.heartbeat.gpu/n0/0", "longshore.other.said.a.b.c",
                    *(f"{HERE}.fact.x.{kind}" for kind in KINDS if kind not in FACT_KINDS["control"])],
        "subscribe": [*OTHERS, "_INBOX.shop.>"],
    },
    "operator": {
        "publish": [*(s for s in DESTROY + CHANGE if s not in OPERATES), *DECIDE, *MANAGE, f"{HERE}.infer.m",
                    f"{HERE}.submit.m", "_INBOX.shop.x",
                    f"{HERE}.tokens.gpu/n0/0.17", f"{HERE}.heartbeat.gpu/n0/0",
                    f"{API}.CONSUMER.MSG.NEXT.{INTAKE}.intake",
                    *(f"{HERE}.fact.x.{kind}" for kind in KINDS if kind not in FACT_KINDS["operator"])],
        "subscribe": [*OTHERS, "_INBOX.shop.>"],
    },
}  # fmt: skip


async def refused(guarded: Guarded, user: str, verb: str, subjects: list[str]) -> set[str]:
    """Those of the subjects that the server does not let this user use, as it says so."""
    said: list[str] = []

    async def failed(error: Exception) -> None:
        said.append(str(error))

    client = RawClient()
    await client.connect(**login(guarded.folder, user).connect_arguments(), error_cb=failed)
    for subject in subjects:
        if verb == "publish":
            await client.publish(subject, b"{}")
        else:
            await client.subscribe(subject)
    await client._flush_pending(force_flush=True)  # its flush asks before it has written all
    await client.flush()
    await client.close()
    word = "publish" if verb == "publish" else "subscription"
    return {s for s in subjects if any(f'{word} to "{s.lower()}"' in text for text in said)}


async def test_every_role_is_refused_what_is_not_its_own(guarded: Guarded) -> None:
    control = await guarded.bus("control", create=True)
    before = (await control.ledger.usage()).last_sequence
    for user in MAY:
        for verb in ("publish", "subscribe"):
            if user in ("shop", "operator") or verb == "subscribe":
                assert await refused(guarded, user, verb, MAY_NOT[user][verb]) == set(MAY_NOT[user][verb]), user
    assert (await control.ledger.usage()).last_sequence == before
    for user in MAY:
        for verb in ("publish", "subscribe"):
            assert await refused(guarded, user, verb, MAY[user][verb]) == set(), user
            assert await refused(guarded, user, verb, MAY_NOT[user][verb]) == set(MAY_NOT[user][verb]), user
    for stream in (LEDGER, TOKENS, INTAKE, PARTS, SNAPSHOTS):
        assert (await stream_info(control.raw, stream))["config"]["name"] == stream
    await control.close()


async def test_who_may_not_hear_answers_is_told_at_once(guarded: Guarded) -> None:
    from dataclasses import replace

    with pytest.raises(Unreachable, match=r"no answers under _INBOX: name the prefix .* with --nats-inbox"):
        await JetStreamBus.connect(replace(login(guarded.folder, "shop"), inbox=""), CELL)
    bus = await guarded.bus("shop")
    with pytest.raises(NotAllowed, match=f"publish on {HERE}.fact.requests.request.accepted"):
        await bus.ledger.append(f"{HERE}.fact.requests.request.accepted", b"{}")
    await bus.close()


def test_every_kind_of_fact_has_a_role() -> None:
    assert {kind for kinds in FACT_KINDS.values() for kind in kinds} == set(KINDS), "see bus/permissions.py"


# ---- what is written ------------------------------------------------------------------------------------------


def test_secrets_are_kept_and_nobody_else_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["nats-config", str(tmp_path / "c"), "--client", "shop", "--json"])
        assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [user["role"] for user in said["users"]] == ["control", "node", "operator", "client"]
    secret = (tmp_path / "c" / "shop.password").read_text().strip()
    config = (tmp_path / "c" / "nats-server.conf").read_text()
    assert secret not in config and "$2a$10$" in config and "sync_interval: always" in config
    for path in (tmp_path / "c").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and str(path) in said["files"]
    before = secret
    write_configuration(ConfigOptions(tmp_path / "c", clients=("shop",)))
    assert (tmp_path / "c" / "shop.password").read_text().strip() == before


def test_what_cannot_be_meant_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    target = tmp_path / "c"
    three = [Member.parse(f"n{i}=h{i}") for i in range(3)]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("--client 'a b' is no name", {"clients": ("a b",)}),
        ("control would be the name of two users", {"clients": ("control",)}),
        ("routes would be the name of two users", {"clients": ("routes",)}),
        ("the cell sends messages of up to 1MB", {"payload": "64KB"}),
        ("is no size", {"payload": "large"}),
        ("is no subject on which clients", {"replies": ("longshore.main.fact.>",)}),
        ("names 2 servers: an odd number", {"cluster": three[:2]}),
        ("names 3 servers: an odd number of servers with different", {"cluster": [three[0], *three[:2]]}),
    ]
    for expected, given in cases:
        with pytest.raises(UserError, match=expected):
            write_configuration(ConfigOptions(target, **given))
    for text in ("n1", "n1=h:99999", "n1=h:1:2:3", "=h", "n 1=h"):
        with pytest.raises(UserError, match="is no server: write NAME=HOST"):
            Member.parse(text)
    assert not target.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        write_configuration(ConfigOptions(tmp_path / "file" / "c"))
    target.mkdir()
    (target / "control.nk").write_text("junk")
    with pytest.raises(UserError, match=r"control.nk holds no seed"):
        write_configuration(ConfigOptions(target, identity="nkey"))


def test_a_cluster_with_tls_and_nkeys_is_a_valid_configuration(tmp_path: Path) -> None:
    """What the server itself makes of it is tested where a cluster runs."""
    cluster = [Member.parse("a=10.0.0.1"), Member.parse("b=10.0.0.2:4333:6333"), Member.parse("c=[::1]")]
    tls = Tls("/tls/cert.pem", "/tls/key.pem", "/tls/ca.pem", verify=True)
    write_configuration(ConfigOptions(tmp_path / "c", identity="nkey", cluster=cluster, tls=tls))
    config = (tmp_path / "c" / "nats-b.conf").read_text()
    assert 'listen: "0.0.0.0:4333"' in config and '@10.0.0.1:6222"' in config and "@10.0.0.2" not in config
    assert config.count("verify: true") == 2 and "nkey: U" in config
    found = variables(tmp_path / "c" / "control.env")
    assert found["LONGSHORE_NATS"] == "tls://10.0.0.1:4222,tls://10.0.0.2:4333,tls://[::1]:4222"
    assert found["LONGSHORE_NATS_CA"] == "/tls/ca.pem" and found["LONGSHORE_CONTROL_REPLICAS"] == "3"
    assert "LONGSHORE_CONTROL_REPLICAS" not in variables(tmp_path / "c" / "node.env")
