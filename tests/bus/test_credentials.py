"""Who connects and over which line: every way in on a real server, and one sentence for every way that fails."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import nkeys
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from actors.node import NodeOptions, worker_settings
from bus.client import Client
from bus.contract import NoResponders, Unreachable
from bus.credentials import VARIABLES, ConnectionOptions, CredentialError
from bus.jetstream import JetStreamBus
from bus.server import EmbeddedServer

PASSWORD = "open sesame: 7"
CREDS = """\
-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

************************* IMPORTANT *************************
-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""


def make_seed(prefix: int = nkeys.PREFIX_BYTE_USER) -> str:
    return nkeys.encode_seed(os.urandom(32), prefix).decode()


def public_key(seed: str) -> str:
    return nkeys.from_seed(bytearray(seed.encode())).public_key.decode()


def jwt(issuer_seed: str, claims: dict[str, object]) -> str:
    """A NATS JWT, version 2, signed by the issuer."""
    import hashlib
    import json

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    key = nkeys.from_seed(bytearray(issuer_seed.encode()))
    claims = {"iat": int(time.time()), "iss": key.public_key.decode()} | claims
    identity = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).rstrip(b"=").decode()
    head = part(b'{"typ":"JWT","alg":"ed25519-nkey"}')
    body = part(json.dumps(claims | {"jti": identity}).encode())
    return f"{head}.{body}.{part(key.sign(f'{head}.{body}'.encode()))}"


async def enters(options: ConnectionOptions) -> str:
    """What an answer over this connection begins with."""
    bus = await JetStreamBus.connect(options, "main")
    subscription = await bus.subscribe("echo")
    asking = asyncio.ensure_future(bus.request("echo", b"hello"))
    delivery = await subscription.next()
    await bus.publish(delivery.reply, delivery.payload)
    assert (await asking).payload == b"hello"
    await bus.close()
    return delivery.reply


async def refusal(options: ConnectionOptions) -> str:
    with pytest.raises(Unreachable) as caught:
        await enters(options)
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


# ---- who -----------------------------------------------------------------------------------------------------


@dataclass
class Identities:
    url: str
    seed: str
    folder: Path

    def file(self, content: str, name: str = "secret") -> str:
        (self.folder / name).write_text(content)
        return str(self.folder / name)


@pytest.fixture
def identities(tmp_path: Path) -> AsyncIterator[Identities]:
    seed = make_seed()
    users = f'{{user: app, password: "{PASSWORD}"}}, {{nkey: {public_key(seed)}}}'
    with EmbeddedServer(tmp_path / "store", extra=f"authorization {{ users: [{users}] }}") as server:
        yield Identities(server.url, seed, tmp_path)


async def test_users_and_nkeys(identities: Identities) -> None:
    here = ConnectionOptions(url=identities.url)
    app = replace(here, user="app", password=PASSWORD)
    assert (await enters(app)).startswith("_INBOX.")
    assert (await enters(replace(app, inbox="_INBOX.app"))).startswith("_INBOX.app.")
    by_file = replace(here, user="app", password_file=identities.file(PASSWORD + "\n", "password"))
    assert await enters(by_file)
    in_url = ConnectionOptions(url=identities.url.replace("//", "//app:open%20sesame%3A%207@"))
    assert PASSWORD not in repr(in_url.without_secrets_in_url()) and "app" not in in_url.address
    assert await enters(in_url)
    assert await enters(replace(here, nkey=identities.file(identities.seed + "\n")))
    async with Client.connect(app):
        pass

    assert "refuses user 'app' with this password: check both" in await refusal(replace(app, password="wrong"))
    assert "refuses the nkey in" in await refusal(replace(here, nkey=identities.file(make_seed(), "other")))
    assert "wants to know who connects: give --nats-user" in await refusal(here)
    assert "refuses this token" in await refusal(replace(here, token="7"))


async def test_a_password_that_is_changed_meanwhile_is_used_at_the_next_connect(identities: Identities) -> None:
    path = identities.file("old", "password")
    server = EmbeddedServer(identities.folder / "changing", extra="authorization { user: app, password: old }")
    await server.start_async()
    bus = await JetStreamBus.connect(ConnectionOptions(url=server.url, user="app", password_file=path), "main")
    server.stop()
    server.extra = "authorization { user: app, password: new }"
    identities.file("new", "password")
    await server.start_async()
    async with asyncio.timeout(10):
        await bus.raw.wait_connected()
    await bus.close()
    server.stop()


async def test_tokens_and_creds_files(tmp_path: Path) -> None:
    operator, user = make_seed(nkeys.PREFIX_BYTE_OPERATOR), make_seed()
    account, system = make_seed(nkeys.PREFIX_BYTE_ACCOUNT), make_seed(nkeys.PREFIX_BYTE_ACCOUNT)
    limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1}
    about = {"type": "account", "version": 2, "limits": limits}
    issued = {
        public_key(seed): jwt(operator, {"sub": public_key(seed), "name": "A", "nats": about})
        for seed in (account, system)
    }

    def creds(name: str, **claims: object) -> str:
        about = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}
        text = jwt(account, {"sub": public_key(user), "name": "u", "nats": about} | claims)
        (tmp_path / name).write_text(CREDS.format(jwt=text, seed=user))
        return str(tmp_path / name)

    trusted = jwt(operator, {"sub": public_key(operator), "name": "O", "nats": {"type": "operator", "version": 2}})
    (tmp_path / "operator.jwt").write_text(trusted)
    preloaded = ", ".join(f"{key}: {text}" for key, text in issued.items())
    extra = (
        f"operator: {tmp_path / 'operator.jwt'}\nsystem_account: {public_key(system)}\nresolver: MEMORY\n"
        f"resolver_preload {{ {preloaded} }}"
    )
    server = EmbeddedServer(tmp_path / "jwt", extra=extra)
    await server.start_async()
    here = ConnectionOptions(url=server.url)
    assert await enters(replace(here, creds=creds("good")))
    assert "refuses the credentials in" in await refusal(replace(here, creds=creds("past", exp=int(time.time()) - 60)))
    server.stop()

    with EmbeddedServer(tmp_path / "token", extra="authorization { token: t0ken }") as other:
        assert await enters(ConnectionOptions(url=other.url, token="t0ken"))
        assert await enters(ConnectionOptions(url=other.url.replace("//", "//t0ken@")))
        assert "refuses this token" in await refusal(ConnectionOptions(url=other.url, token="wrong"))


# ---- the line ------------------------------------------------------------------------------------------------


@dataclass
class Authority:
    """Certificates as files."""

    folder: Path
    authority: trustme.CA
    ca: str

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        return cls(folder, authority, str(folder / "ca.pem"))

    def issue(self, name: str, *identities: str, days: float = 1) -> dict[str, str]:
        """Paths of a certificate and its key; negative `days`: it has expired."""
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        issued = self.authority.issue_cert(*identities, not_before=until - datetime.timedelta(days=30), not_after=until)
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.folder / f"{name}.pem"))
        issued.private_key_pem.write_to_path(str(self.folder / f"{name}.key"))
        return {"cert": str(self.folder / f"{name}.pem"), "key": str(self.folder / f"{name}.key")}


def tls(files: dict[str, str], *more: str) -> str:
    return f"tls {{ cert_file: {files['cert']}, key_file: {files['key']}, {', '.join(more)} }}"


@contextlib.asynccontextmanager
async def secured(folder: Path, extra: str) -> AsyncIterator[str]:
    server = EmbeddedServer(folder, extra=extra)
    await server.start_async()
    try:
        yield server.url
    finally:
        server.stop()


async def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    ours, theirs = Authority.make(tmp_path / "ours"), Authority.make(tmp_path / "theirs")
    async with secured(tmp_path / "s1", tls(ours.issue("server", "127.0.0.1"))) as url:
        here = ConnectionOptions(url=url, ca=ours.ca)
        assert await enters(here)
        assert await enters(replace(here, url=url.replace("nats:", "tls:")))
        assert f"does not come from the authority in {theirs.ca}: name" in await refusal(replace(here, ca=theirs.ca))
        assert "does not come from an authority that is known here" in await refusal(ConnectionOptions(url=url))
    async with secured(tmp_path / "s2", tls(ours.issue("past", "127.0.0.1", days=-1))) as url:
        assert f"server at {url} has expired: have it renewed" in await refusal(ConnectionOptions(url=url, ca=ours.ca))
    async with secured(tmp_path / "s3", tls(ours.issue("else", "elsewhere.example"))) as url:
        assert "is not for this address" in await refusal(ConnectionOptions(url=url, ca=ours.ca))
    async with secured(tmp_path / "s4", "authorization { user: app, password: secret }") as url:
        inside = ConnectionOptions(url=url, user="app", password="secret")
        assert await enters(inside)
        assert "offers no TLS" in await refusal(replace(inside, ca=ours.ca))
        assert "offers no TLS" in await refusal(replace(inside, url=url.replace("nats:", "tls:")))


async def test_certificates_of_clients(tmp_path: Path) -> None:
    ours, theirs = Authority.make(tmp_path / "ours"), Authority.make(tmp_path / "theirs")
    extra = tls(ours.issue("server", "127.0.0.1"), f"ca_file: {ours.ca}", "verify: true")
    async with secured(tmp_path / "s1", extra) as url:
        here = ConnectionOptions(url=url, ca=ours.ca)
        good = ours.issue("client", "client.example")
        assert await enters(replace(here, **good))
        assert await enters(replace(here, cert=good["cert"]))  # the key stands in the same file
        assert "wants a certificate from this side: give --nats-cert FILE" in await refusal(here)
        foreign = replace(here, **theirs.issue("foreign", "client.example"))
        assert "it comes from no authority that it knows" in await refusal(foreign)
        past = replace(here, **ours.issue("past", "client.example", days=-1))
        assert f"does not take the certificate {past.cert}: it" in await refusal(past)


# ---- what is said wrongly ------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_said_before_anything_is_sent(tmp_path: Path) -> None:
    ours = Authority.make(tmp_path / "ours")
    a, b = ours.issue("a", "a"), ours.issue("b", "b")
    junk = tmp_path / "junk"
    junk.write_text("junk")
    (tmp_path / "empty").write_text("")
    (tmp_path / "creds").write_text(CREDS.format(jwt="x", seed="SUAJUNK"))
    key = serialization.load_pem_private_key(Path(a["key"]).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    (tmp_path / "locked").write_bytes(locked)
    cases = {
        "does not exist: check its path": [{name: str(tmp_path / "no")} for name in ("nkey", "creds", "ca", "cert")]
        + [{"user": "u", "password_file": str(tmp_path / "no")}, {"cert": a["cert"], "key": str(tmp_path / "no")}],
        "cannot be read: Is a directory": [{name: str(tmp_path)} for name in ("nkey", "creds", "ca", "cert")],
        "holds no seed of an nkey": [{"nkey": str(junk)}, {"creds": str(tmp_path / "creds")}],
        "is no creds file": [{"creds": str(junk)}],
        "holds no certificate in PEM form": [{"ca": str(junk)}, {"cert": str(junk)}],
        "is no private key in PEM form": [{"cert": a["cert"], "key": str(junk)}],
        "does not belong to the certificate": [{"cert": a["cert"], "key": b["key"]}],
        "is encrypted": [{"cert": a["cert"], "key": str(tmp_path / "locked")}],
        "a key is given without its certificate": [{"key": a["key"], "ca": ours.ca}, {"key": a["key"]}],
        "the password file": [{"user": "u", "password_file": str(tmp_path / "empty")}],
        "use one of user, token, nkey and creds": [{"user": "u", "nkey": str(junk)}, {"token": "t", "user": "u"}],
        "but no user: name one": [{"password": "p"}, {"password_file": str(junk)}],
        "as text and as a file": [{"user": "u", "password": "p", "password_file": str(junk)}],
        "cannot begin the subjects of answers": [{"inbox": "a b"}, {"inbox": "longshore.main"}, {"inbox": "a.>"}],
        "is no address of a NATS server": [{"url": "http://x"}, {"url": "nats://a:1,nats://b:x"}],
    }
    for expected, given in cases.items():
        for fields in given:
            with pytest.raises(CredentialError) as caught:
                ConnectionOptions(**fields).connect_arguments()
            message = str(caught.value)
            assert expected in message and "\n" not in message, f"{fields}: {message}"


def test_what_is_said_closer_counts_and_nothing_is_mixed() -> None:
    weaker = ConnectionOptions(url="nats://far:1", user="u", password="p", ca="ca", cert="c", key="k", inbox="_I.u")
    assert ConnectionOptions().over(weaker) == weaker
    assert ConnectionOptions(nkey="n", cert="d").over(weaker) == ConnectionOptions(
        url="nats://far:1", nkey="n", ca="ca", cert="d", inbox="_I.u"
    )
    environment = ConnectionOptions(url="nats://a:1", user="u", password="p").variables()
    assert environment["LONGSHORE_NATS"] == "nats://a:1" and environment["LONGSHORE_NATS_PASSWORD"] == "p"
    assert set(environment) == set(VARIABLES.values())
    read = ConnectionOptions.from_environment(environment, url="nats://x:y@b:1, nats://c:2")
    assert read == ConnectionOptions(url="nats://b:1,nats://c:2", user="u", password="p")
    assert read.servers == ["nats://b:1", "nats://c:2"]


def test_secrets_stay_out_of_what_children_show(tmp_path: Path) -> None:
    options = ConnectionOptions(url="nats://a:1", user="u", password=PASSWORD, token=PASSWORD)
    assert PASSWORD not in repr(options)
    node = NodeOptions(options, "main", "s1", tmp_path, 1, 1, 1, 1, "cpu", 1)
    assert worker_settings(node, 0).nats.password == PASSWORD
    assert PASSWORD not in repr(worker_settings(node, 0))


# ---- commands ------------------------------------------------------------------------------------------------


def test_commands_take_flags_and_environment(identities: Identities) -> None:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bus.main", *arguments, "--nats", identities.url],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, **environment},
        )

    # A cell that nobody made: whoever gets so far has been let in.
    password = identities.file(PASSWORD, "password")
    by_flag = run("tail", "--no-follow", "--nats-user", "app", "--nats-password-file", password)
    assert "LEDGER_main does not exist" in by_flag.stderr and by_flag.returncode == 1
    stronger = {"LONGSHORE_NATS_CREDS": "/nowhere"}
    assert "does not exist at nats" in run("tail", "--nats-nkey", identities.file(identities.seed), **stronger).stderr
    wrong = run("control", LONGSHORE_NATS_USER="app", LONGSHORE_NATS_PASSWORD="wrong")
    assert wrong.returncode == 1 and "refuses user 'app' with this password" in wrong.stderr.splitlines()[-1]
    missing = run("node", "--data", str(identities.folder), "--nats-ca", "/nowhere/ca.pem")
    assert missing.returncode in (1, 2)
    assert "the file /nowhere/ca.pem (--nats-ca or LONGSHORE_NATS_CA) does not exist" in missing.stderr


async def test_nobody_answers_is_told_apart(identities: Identities) -> None:
    bus = await JetStreamBus.connect(
        ConnectionOptions(url=f"nats://127.0.0.1:1,{identities.url}", user="app", password=PASSWORD), "main"
    )
    with pytest.raises(NoResponders):
        await bus.request("nobody", b"")
    await bus.close()
