"""How a process connects: the servers' addresses, who it is, how the line is protected. This is the only place.

    flags  ─▶  environment  ─▶  configuration file        what is said further left counts
                    │
                    ▼
             ConnectionOptions ─▶ connect_arguments() ─▶ nats-py

A secret comes by a file or by the environment; none stands on a command line, in a log or in a sentence. A parent hands
its children what it was told by the environment (`variables`).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from bus.contract import Unreachable

DEFAULT_URL = "nats://127.0.0.1:4222"
DEFAULT_INBOX = "_INBOX"
SECRET_LIMIT_BYTES = 64 * 1024
"""Largest file of a secret that is read: a creds file has about 1 kB."""

_INBOX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")
_SCHEMES = ("nats", "tls", "ws", "wss")


class CredentialError(Unreachable):
    """What was said about the connection cannot be used; one sentence says what, where and what to do."""


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Everything about the way to the NATS servers. An empty field says nothing about itself.

    url            one address or several with commas: nats://host:port, tls://host:port
    user           with `password`, or `password_file` that holds it
    token          instead of a user
    nkey           file with the seed of an nkey
    creds          file with a JWT and the seed of its nkey
    ca             file with the certificates that the server's one must lead to; without it those of the system count
    cert, key      files with this side's certificate and its key
    inbox          what the subjects of answers begin with: a server may allow a user no other one
    """

    url: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    token: str = field(default="", repr=False)
    nkey: str = ""
    creds: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    inbox: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], *, url: str = "") -> ConnectionOptions:
        """What the variables say, with another `url` where one is given. Credentials in an address become fields."""
        values = {name: environment.get(variable, "") for name, variable in VARIABLES.items()}
        return cls(**values | ({"url": url} if url else {})).without_secrets_in_url()

    def over(self, weaker: ConnectionOptions) -> ConnectionOptions:
        """What is said here, and what `weaker` says of the rest.

        Who this is counts as one thing, and so do certificate and key: nothing is mixed.
        """
        values: dict[str, str] = {}
        for group in _GROUPS:
            source = self if any(getattr(self, name) for name in group) else weaker
            values |= {name: getattr(source, name) for name in group}
        return ConnectionOptions(**values)

    def without_secrets_in_url(self) -> ConnectionOptions:
        """`nats://user:password@host` as address and user. Those beside the address count more."""
        found: dict[str, str] = {}
        addresses = []
        for address in self.url.split(",") if self.url else []:
            place = address.strip()
            before, at, host = place.rpartition("@")
            if at:
                scheme, separator, login = before.rpartition("://")
                place = f"{scheme}{separator}{host}"
                user, colon, password = login.partition(":")
                names = ("user", "password") if colon else ("token",)
                found = found or dict(zip(names, map(unquote, (user, password)), strict=False))
            addresses.append(place)
        return self.over(replace(ConnectionOptions(**found), url=self.url))._at(",".join(addresses))

    def _at(self, url: str) -> ConnectionOptions:
        return replace(self, url=url)

    @property
    def address(self) -> str:
        """The addresses as one text that may be shown."""
        return self.without_secrets_in_url().url or DEFAULT_URL

    @property
    def servers(self) -> list[str]:
        """Every address. Raises `CredentialError` for one that is none."""
        servers = [address for address in self.address.split(",") if address]
        for address in servers or [self.address]:
            if not _is_address(address):
                raise CredentialError(f"{address!r} is no address of a NATS server: write nats://host:port")
        return servers

    @property
    def wants_tls(self) -> bool:
        """Whether a connection in the clear is out of the question."""
        files = self.ca or self.cert or self.key
        return bool(files) or any(server.startswith(("tls:", "wss:")) for server in self.servers)

    def variables(self) -> dict[str, str]:
        """The environment from which a child reads the same; an empty value takes away what the parent has."""
        return {variable: getattr(self, name) for name, variable in VARIABLES.items()}

    def connect_arguments(self) -> dict[str, Any]:
        """Arguments of `nats.aio.client.Client.connect`. Raises `CredentialError` where a file cannot be used.

        Files of secrets are checked here and read again at every connect, so that they may be replaced meanwhile.
        """
        arguments = {"servers": self.servers, "inbox_prefix": self._inbox()} | self._identity()
        if self.wants_tls:
            arguments["tls"] = self._tls()
        return arguments

    def _inbox(self) -> str:
        inbox = self.inbox or DEFAULT_INBOX
        if _INBOX.match(inbox) is None or inbox.split(".")[0] == "longshore":
            raise CredentialError(
                f"{inbox!r} ({_where('inbox')}) cannot begin the subjects of answers: use letters, digits, '-', '_' "
                "and dots between them, and not 'longshore'"
            )
        return inbox

    def _identity(self) -> dict[str, Any]:
        given = [name for name in ("user", "token", "nkey", "creds") if getattr(self, name)]
        if len(given) > 1:
            raise CredentialError(
                f"{' and '.join(given)} are given for the NATS server: use one of user, token, nkey and creds"
            )
        if (self.password or self.password_file) and not self.user:
            raise CredentialError(f"a password for the NATS server is given, but no user: name one ({_where('user')})")
        if self.password and self.password_file:
            raise CredentialError(
                f"a password for the NATS server is given as text and as a file: use one ({_where('password_file')})"
            )
        if self.user:
            return {"user": self.user, "password": self._password()}
        if self.token:
            return {"token": self.token}
        if self.nkey:
            _check_seed(_read(self.nkey, "nkey"), self.nkey, "nkey")
            return {"nkeys_seed": self.nkey}
        if self.creds:
            _check_creds(self.creds)
            return {"user_credentials": self.creds}
        return {}

    def _password(self) -> Any:
        if not self.password_file:
            return self.password
        path = self.password_file
        if not (text := _read(path, "password_file").strip()):
            raise CredentialError(f"the password file {path} is empty: write the password into it")
        last = text.decode("utf-8", "replace")

        def read() -> str:
            try:
                return Path(path).read_text().strip() or last
            except (OSError, UnicodeDecodeError):
                return last

        return read

    def _tls(self) -> ssl.SSLContext:
        if self.ca:
            _read(self.ca, "ca")
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (ssl.SSLError, OSError):
            raise CredentialError(
                f"{self.ca} ({_where('ca')}) holds no certificate in PEM form: name the file of the authority's one"
            ) from None
        if self.key and not self.cert:
            raise CredentialError(f"a key is given without its certificate: name both ({_where('cert')})")
        if self.cert:
            certificate = _read(self.cert, "cert")
            if b"-----BEGIN CERTIFICATE-----" not in certificate:
                raise CredentialError(f"{self.cert} ({_where('cert')}) holds no certificate in PEM form")
            if self.key:
                _read(self.key, "key")
            try:
                context.load_cert_chain(self.cert, self.key or None, password=_no_passphrase)
            except _Encrypted:
                raise CredentialError(
                    f"the key in {self.key or self.cert} is encrypted: nobody is there to type its passphrase, use one "
                    "that is not"
                ) from None
            except (ssl.SSLError, OSError) as error:
                mismatch = "KEY_VALUES_MISMATCH" in str(error)
                why = "does not belong to the certificate" if mismatch else "is no private key in PEM form"
                raise CredentialError(f"the key in {self.key or self.cert} ({_where('key')}) {why}") from None
        return context


VARIABLES = {"url": "LONGSHORE_NATS"} | {
    one.name: f"LONGSHORE_NATS_{one.name.upper()}" for one in fields(ConnectionOptions) if one.name != "url"
}
"""The variable of each field."""

FLAGS = ("user", "password_file", "nkey", "creds", "ca", "cert", "key", "inbox")
"""Fields that have an option `--nats-...` beside `--nats` itself; password and token have none, being secrets."""

_GROUPS = (
    ("url",),
    ("user", "password", "password_file", "token", "nkey", "creds"),
    ("ca",),
    ("cert", "key"),
    ("inbox",),
)


def flag(name: str) -> str:
    return f"--nats-{name.replace('_', '-')}"


def _where(name: str) -> str:
    return f"{flag(name)} or {VARIABLES[name]}"


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        return parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _read(path: str, name: str) -> bytes:
    """The content of a small file. Raises `CredentialError` in one sentence."""
    what = f"the file {path} ({_where(name)})"
    try:
        with Path(path).open("rb") as file:
            content = file.read(SECRET_LIMIT_BYTES * 16 + 1)
    except FileNotFoundError:
        raise CredentialError(f"{what} does not exist: check its path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CredentialError(f"{what} cannot be read: {reason}") from None
    if len(content) > SECRET_LIMIT_BYTES * 16:
        raise CredentialError(f"{what} has more than {SECRET_LIMIT_BYTES * 16} bytes: that is another file")
    return content


def _check_seed(content: bytes, path: str, name: str) -> None:
    import nkeys

    try:
        nkeys.from_seed(bytearray(content.strip())).wipe()
    except Exception:  # the library raises what comes up: of its own, binascii's, ValueError
        raise CredentialError(
            f"{path} ({_where(name)}) holds no seed of an nkey: it is one line that begins with SU"
        ) from None


def _check_creds(path: str) -> None:
    content = _read(path, "creds")
    lines = content.splitlines()
    begins = {
        mark: number for number, line in enumerate(lines) for mark in (b"NATS USER JWT", b"USER NKEY SEED")
        if b"BEGIN " + mark in line and number + 1 < len(lines)
    }  # fmt: skip
    if len(begins) < 2:
        raise CredentialError(
            f"{path} ({_where('creds')}) is no creds file: it needs a user's JWT and the seed of its nkey, as "
            "`nsc generate creds` writes them"
        )
    _check_seed(lines[begins[b"USER NKEY SEED"] + 1], path, "creds")


class _Encrypted(Exception):
    pass


def _no_passphrase() -> str:
    raise _Encrypted
