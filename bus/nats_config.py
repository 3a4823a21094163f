"""A configuration of nats-server for one cell: users with least rights, JetStream, TLS, a cluster; and their secrets.

What is written into a directory:
    nats-server.conf          of a single server; nats-<name>.conf of each server of a cluster
    <user>.password, or .nk   the secret of a user, made when it is not there; kept when it is
    <user>.env                the variables with which that user's processes start

Secrets and configurations can be read by their owner alone. Everything is written beside its place and then moved.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from bus.credentials import VARIABLES, ConnectionOptions
from bus.errors import UserError
from bus.permissions import Place, Rights, Role, drivers_of, inbox_of, rights
from bus.subjects import Subjects, valid_name

PORT = 4222
ROUTE_PORT = 6222
SMALLEST_PAYLOAD = 1024 * 1024
ROUTES_USER = "routes"
BCRYPT_COST = 10
"""A server spends some 50 ms on it at each connect; made secrets have 192 random bits anyway."""
_SIZE = re.compile(r"([1-9][0-9]{0,9})(B|KB|MB|GB)?\Z")
_UNITS = {"B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}
_SUBJECT = re.compile(r"[^\s\"\\]+\Z")
_MEMBER = re.compile(r"([A-Za-z0-9_-]+)=(\[[0-9A-Fa-f:]+\]|[^:=\s\[\]\"]+)(?::([0-9]+))?(?::([0-9]+))?\Z")


class Member(NamedTuple):
    """One server of a cluster."""

    name: str
    host: str
    port: int = PORT
    route_port: int = ROUTE_PORT

    @classmethod
    def parse(cls, text: str) -> Member:
        """`NAME=HOST[:PORT[:ROUTE_PORT]]`. Raises `UserError`."""
        found = _MEMBER.match(text)
        ports = [int(port) for port in (found.groups()[2:] if found else ()) if port]
        if found is None or not all(0 < port < 65536 for port in ports):
            raise UserError(f"--cluster {text!r} is no server: write NAME=HOST, or NAME=HOST:PORT:ROUTE_PORT")
        return cls(found[1], found[2], int(found[3] or PORT), int(found[4] or ROUTE_PORT))


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths on the servers' machines. With `verify` whoever connects needs a certificate of the same authority."""

    cert: str
    key: str
    ca: str = ""
    verify: bool = False


@dataclass(frozen=True, slots=True)
class ConfigOptions:
    """What is wanted. `servers` empty: one node user for any server; else one for each, for `workers` workers."""

    directory: Path
    cell: str = "main"
    clients: Sequence[str] = ("client",)
    servers: Sequence[str] = ()
    workers: int = 8
    identity: Literal["password", "nkey"] = "password"
    host: str = "127.0.0.1"
    port: int = PORT
    store: str = "/var/lib/longshore/nats"
    fsync_always: bool = True
    payload: str = "1MB"
    replies: Sequence[str] = ()
    cluster: Sequence[Member] = ()
    tls: Tls | None = None

    def check(self) -> None:
        """Raises `UserError` for what cannot be meant."""
        for option, names in (("--client", self.clients), ("--server", self.servers), ("--cell", (self.cell,))):
            for name in names:
                if not valid_name(name):
                    raise UserError(f"{option} {name!r} is no name: use 1 to 63 letters, digits, '-' and '_'")
        names = [user for user, _, _ in self.users()]
        twice = sorted({name for name in [*names, ROUTES_USER] if [*names, ROUTES_USER].count(name) > 1})
        if twice:
            raise UserError(f"{', '.join(twice)} would be the name of two users: choose another one")
        if bytes_of(self.payload) < SMALLEST_PAYLOAD:
            raise UserError(f"--max-payload {self.payload}: the cell sends messages of up to 1MB, give that or more")
        for subject in self.replies:
            if _SUBJECT.match(subject) is None or subject.split(".")[0] in ("longshore", "*", ">", "$SYS", "$JS"):
                raise UserError(f"--reply {subject!r} is no subject on which clients may be answered")
        if self.cluster and (len({m.name for m in self.cluster}) < len(self.cluster) or len(self.cluster) % 2 == 0):
            raise UserError(
                f"--cluster names {len(self.cluster)} servers: an odd number of servers with different names decides "
                "by majority, use three"
            )

    def users(self) -> list[tuple[str, Role, tuple[str, ...]]]:
        """Name, role and drivers of every user."""
        nodes: list[tuple[str, Role, tuple[str, ...]]] = [
            (f"node-{server}", "node", drivers_of(server, self.workers)) for server in self.servers
        ]
        clients: list[tuple[str, Role, tuple[str, ...]]] = [(name, "client", ()) for name in self.clients]
        return [("control", "control", ()), *(nodes or [("node", "node", ())]), ("operator", "operator", ()), *clients]

    @property
    def urls(self) -> list[str]:
        scheme = "tls" if self.tls else "nats"
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        places = [(member.host, member.port) for member in self.cluster] or [(host, self.port)]
        return [f"{scheme}://{host}:{port}" for host, port in places]


def bytes_of(size: str) -> int:
    """Bytes of a size as nats-server reads it. Raises `UserError`."""
    found = _SIZE.match(size.upper())
    if found is None:
        raise UserError(f"--max-payload {size!r} is no size: write a number with KB, MB or GB")
    return int(found[1]) * _UNITS[found[2] or "B"]


def write_configuration(options: ConfigOptions) -> list[Path]:
    """Write everything; the paths. Raises `UserError`, and then nothing but secrets may be new."""
    options.check()
    directory = options.directory.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files: dict[Path, str] = {}
        logins: dict[str, str] = {}
        for user, role, _ in options.users():
            secret = directory / f"{user}.{'password' if options.identity == 'password' else 'nk'}"
            logins[user] = _login(user, _secret(secret, options.identity), options.identity)
            files[directory / f"{user}.env"] = _environment(options, user, role, secret)
        routes = ""
        if options.cluster:
            routes = _secret(directory / f"{ROUTES_USER}.password", "password")
        for member in options.cluster or (None,):
            path = directory / (f"nats-{member.name}.conf" if member else "nats-server.conf")
            files[path] = render(options, logins, member, routes)
        for path, text in files.items():
            _write(path, text)
    except OSError as error:
        raise UserError(f"{error.filename or directory} cannot be written: {error.strerror}") from None
    return [*files, *sorted({*directory.glob("*.password"), *directory.glob("*.nk")})]


def _secret(path: Path, identity: str) -> str:
    """The secret in a file, made where there is none."""
    if path.exists():
        try:
            found = path.read_text().strip()
        except UnicodeDecodeError:
            found = ""
        if not found:
            raise UserError(f"{path} is there and holds no secret: write one into it, or delete it to have one made")
        return found
    made = secrets.token_urlsafe(24) if identity == "password" else _new_seed()
    _write(path, made + "\n")
    return made


def _new_seed() -> str:
    import nkeys

    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def _login(user: str, secret: str, identity: str) -> str:
    """How a server knows this user: never the secret itself."""
    if identity == "nkey":
        import nkeys

        try:
            public = nkeys.from_seed(bytearray(secret.encode())).public_key.decode()
        except Exception:
            raise UserError(f"{user}.nk holds no seed of an nkey: it is one line that begins with SU") from None
        return f"nkey: {public}"
    import bcrypt

    if len(secret.encode()) > 72:
        raise UserError(f"the password in {user}.password has more than 72 bytes: bcrypt takes no longer ones")
    hashed = bcrypt.hashpw(secret.encode(), bcrypt.gensalt(BCRYPT_COST, prefix=b"2a")).decode()
    return f"user: {json.dumps(user)}, password: {json.dumps(hashed)}"


def _environment(options: ConfigOptions, user: str, role: Role, secret: Path) -> str:
    tls = options.tls
    login = {"user": user, "password_file": str(secret)} if options.identity == "password" else {"nkey": str(secret)}
    said = ConnectionOptions(
        url=",".join(options.urls), inbox=inbox_of(user), ca=tls.ca if tls is not None else "", **login
    )
    lines = [f"# How processes of user {user} connect."]
    lines.append(f"LONGSHORE_CELL={options.cell}")
    if role == "control" and options.cluster:
        lines.append(f"LONGSHORE_CONTROL_REPLICAS={min(3, len(options.cluster))}")
    lines += [f"{name}={value}" for name, value in said.variables().items() if value]
    if tls is not None and tls.verify:
        lines += [f"# {VARIABLES[name]}=FILE of this side's {what}" for name, what in (("cert", "certificate"),
                                                                                       ("key", "key"))]  # fmt: skip
    return "\n".join(lines) + "\n"


def render(options: ConfigOptions, logins: dict[str, str], member: Member | None, routes: str) -> str:
    """The configuration of one server."""
    subjects = Subjects(options.cell)
    host, port = (options.host, options.port) if member is None else ("0.0.0.0", member.port)
    lines = [
        f"# nats-server -c nats-{member.name if member else 'server'}.conf: cell {options.cell} of Longshore, written "
        "by `longshore nats-config`.",
        "",
        f"server_name: {json.dumps(member.name if member else 'longshore')}",
        f"listen: {json.dumps(f'{host}:{port}')}",
        f"max_payload: {options.payload.upper()}",
        "# The second format of acknowledgement subjects ends the reading of clients that do not know it.",
        "feature_flags { js_ack_fc_v2: false }",
        "",
        "jetstream {",
        f"  store_dir: {json.dumps(options.store if member is None else f'{options.store}/{member.name}')}",
        "  # always: what is acknowledged is on disk. Without it a power failure may take the last two minutes.",
        f"  sync_interval: {'always' if options.fsync_always else '2m'}",
        "}",
        "",
    ]
    if options.tls is not None:
        lines += [*_tls(options.tls, options.tls.verify, ""), ""]
    if member is not None:
        lines += [*_cluster(options, member, routes), ""]
    lines += ["accounts {", "  LONGSHORE {", "    jetstream: enabled", "    users: ["]
    for user, role, drivers in options.users():
        place = Place(subjects, inbox_of(user), drivers, options.replies)
        lines += _user(role, logins[user], rights(role, place))
    lines += ["    ]", "  }", "}", ""]
    return "\n".join(lines)


def _user(role: str, login: str, granted: Rights) -> list[str]:
    lines = [f"      # {role}", "      {", f"        {login}", "        permissions: {"]
    for verb, subjects in (("publish", granted.publish), ("subscribe", granted.subscribe)):
        lines += [
            f"          {verb}: {{ allow: [",
            *(f"            {json.dumps(s)}" for s in subjects),
            "          ] }",
        ]
    return [*lines, "        }", "      }"]


def _tls(tls: Tls, verify: bool, indent: str) -> list[str]:
    lines = ["tls {", f"  cert_file: {json.dumps(tls.cert)}", f"  key_file: {json.dumps(tls.key)}"]
    if tls.ca:
        lines.append(f"  ca_file: {json.dumps(tls.ca)}")
    if verify:
        lines.append("  verify: true")
    return [indent + line for line in [*lines, "}"]]


def _cluster(options: ConfigOptions, member: Member, routes: str) -> list[str]:
    login = f"{ROUTES_USER}:{routes}@"
    others = [json.dumps(f"nats://{login}{m.host}:{m.route_port}") for m in options.cluster if m != member]
    lines = [
        "cluster {",
        f"  name: {json.dumps(f'longshore-{options.cell}')}",
        f"  listen: {json.dumps(f'0.0.0.0:{member.route_port}')}",
        f"  authorization {{ user: {ROUTES_USER}, password: {json.dumps(routes)} }}",
        f"  routes: [{', '.join(others)}]",
    ]
    if options.tls is not None and options.tls.ca:
        lines += _tls(options.tls, True, "  ")
    return [*lines, "}"]


def _write(path: Path, text: str) -> None:
    """All or nothing, for its owner's eyes."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
