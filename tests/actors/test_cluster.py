"""A cell on three real NATS servers with three replicas of each stream; the one that leads the ledger is killed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trustme

from actors.children import Child
from actors.replay import verify
from actors.stub_node import MODEL
from actors.up import cell_status
from bus.client import Client
from bus.contract import Appended, NoAnswer, Unreachable
from bus.jetstream import JetStreamBus
from bus.jetstream_api import stream_info
from bus.log_reading import read_to_end
from bus.nats_config import ConfigOptions, Member, Tls, write_configuration
from bus.server_cluster import EmbeddedCluster
from tests.support.nats_servers import ConfiguredServer, free_ports, login

pytestmark = pytest.mark.slow
CELL = "three"
MIB = 1 << 20


LIMITS = {
    "ledger_limit_bytes": 64 * MIB,
    "tokens_limit_bytes": 64 * MIB,
    "intake_limit_bytes": 16 * MIB,
    "parts_limit_bytes": 16 * MIB,
}


@asynccontextmanager
async def cell_on(cluster: EmbeddedCluster, folder: Path) -> AsyncIterator[JetStreamBus]:
    """Two controls and a node on a cluster; a bus that was told of all servers."""
    bus = await JetStreamBus.connect(cluster.url, CELL, create=True, replicas=3, **LIMITS)
    common = ["--nats", cluster.url, "--cell", CELL]
    children = [
        Child(f"control-{i}", ["control", *common, "--replicas", "3"], folder / f"control-{i}.log") for i in range(2)
    ]
    node = [*common, "--server", "n0", "--step-seconds", "0.01"]
    children.append(Child("node", node, folder / "node.log", module="actors.stub_node"))
    try:
        for child in children:
            await child.start()
        while True:
            status = await cell_status(bus, CELL)
            if status is not None and status["workers"] and status["models"]:
                break
            await asyncio.sleep(0.05)
        yield bus
    except BaseException:
        print("\n".join(f"== {child.name}\n{child.last_words(30)}" for child in children))
        raise
    finally:
        await bus.close()
        for child in reversed(children):
            await child.stop()


async def whole(client: Client, number: int) -> list[int]:
    """The tokens of one answer, every position once and in order."""
    answer = client.infer(MODEL, prompt=f"prompt {number}", max_tokens=20, temperature=0, seed=1, key=f"k{number}")
    tokens: list[int] = []
    async for chunk in answer:
        assert chunk.position == len(tokens)
        tokens += chunk.tokens
    assert answer.end == "length"
    return tokens


async def test_the_leader_of_the_ledger_is_killed_under_load(tmp_path: Path) -> None:
    async with EmbeddedCluster(tmp_path / "nats") as cluster, cell_on(cluster, tmp_path) as bus:
        ledger = bus.subjects.ledger_stream
        expected = await whole(Client(bus, CELL, name="before"), 0)
        leader = await cluster.leader(bus, ledger)
        # Told one address, that of the server which is to die: the others it hears of from that one.
        other = await JetStreamBus.connect(leader.url, CELL)
        client = Client(other, CELL, name="load")
        # The same id twice at once: a cluster says of the second that it is being decided, which is no refusal.
        twice = [bus.tokens.append(bus.subjects.tokens("twice", 1), b"{}", message_id="twice") for _ in range(2)]
        for answer in await asyncio.gather(*twice, return_exceptions=True):
            assert isinstance(answer, Appended | NoAnswer), answer

        asked: list[asyncio.Task[list[int]]] = []
        under_way, elected = asyncio.Event(), asyncio.Event()

        async def load() -> None:
            while not elected.is_set() or len(asked) < 60:
                asked.append(asyncio.ensure_future(whole(client, len(asked))))
                await asyncio.sleep(0.1)
                if len(asked) >= 10:
                    under_way.set()

        loading = asyncio.ensure_future(load())
        await under_way.wait()
        leader.kill()
        loop = asyncio.get_running_loop()
        killed = loop.time()
        # Another server leads, and the cell goes on with it, while the third is gone.
        again = await cluster.leader(bus, ledger)
        assert again is not leader and other.connections == 2
        accepted_by_new = await whole(Client(bus, CELL, name="after"), 0)
        assert accepted_by_new == expected and loop.time() - killed < 15
        elected.set()
        await loading
        answers = await asyncio.gather(*asked)
        for number in range(3):
            assert await whole(client, number) == answers[number]

        # The killed one comes back and has everything.
        await leader.start_async()
        await cluster.followed(bus, ledger)
        records = await read_to_end(bus.ledger)
        accepted = [msgspec.json.decode(r.payload)["body"] for r in records if r.subject.endswith("request.accepted")]
        assert {f"k{n}" for n in range(len(asked))} == {body["key"] for body in accepted if body["client"] == "load"}
        verdict = verify(CELL, records)
        assert verdict.difference is None, verdict.sentence
        await other.close()


async def test_the_written_files_make_a_cluster_with_tls_and_streams_get_their_replicas(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    cert = str(tmp_path / "cert.pem")
    tls = Tls(cert, cert, str(tmp_path / "ca.pem"), verify=True)
    ports = free_ports(6)
    members = [Member(f"n{i}", "127.0.0.1", ports[i], ports[3 + i]) for i in range(3)]
    folder = tmp_path / "config"
    options = ConfigOptions(folder, CELL, identity="nkey", cluster=members, tls=tls, store=str(tmp_path / "streams"))
    write_configuration(options)
    servers = [ConfiguredServer(folder / f"nats-{member.name}.conf", member.port) for member in members]
    try:
        for server in servers:
            server.start()
        who = dataclasses.replace(login(folder, "control"), cert=cert)
        bus = await JetStreamBus.connect(who, CELL, create=True, **LIMITS)
        await bus.ledger.append(bus.subjects.fact("requests", "request.accepted"), b"{}")
        await bus.ensure_streams(replicas=3, **LIMITS)
        for stream in (bus.subjects.ledger_stream, bus.subjects.tokens_stream, bus.subjects.intake_stream):
            assert (await stream_info(bus.raw, stream))["config"]["num_replicas"] == 3
        assert (await bus.ledger.usage()).messages == 1
        await bus.close()
        with pytest.raises(Unreachable, match="wants a certificate from this side"):
            await JetStreamBus.connect(dataclasses.replace(who, cert="", url=who.servers[0]), CELL)
    finally:
        for server in servers:
            server.stop()
