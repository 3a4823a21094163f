"""`longshore nats-config`: a server configuration with users and rights, and what each user's processes start with."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from bus.errors import UserError
from bus.options import DEFAULT_CELL, CellOption, JsonOption, check_cell_name


def nats_config(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write.", show_default=False)],
    cell: CellOption = DEFAULT_CELL,
    client: Annotated[
        list[str] | None, typer.Option("--client", metavar="NAME", help="A user that asks; may be repeated (client).")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server", metavar="NAME", help="A user for this node alone, with its drivers' rights; may be repeated."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="With --server: workers that it has at most.")] = 8,
    nkeys: Annotated[bool, typer.Option("--nkeys", help="Users are known by nkeys instead of passwords.")] = False,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where a single server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 4222,
    store: Annotated[
        str, typer.Option(metavar="DIR", help="Where servers keep streams, on their machines.")
    ] = "/var/lib/longshore/nats",
    fsync: Annotated[
        bool, typer.Option("--fsync/--no-fsync", help="Acknowledge what is on disk, or what the kernel has.")
    ] = True,
    max_payload: Annotated[str, typer.Option(metavar="SIZE", help="Largest message.")] = "1MB",
    reply: Annotated[
        list[str] | None,
        typer.Option("--reply", metavar="SUBJECT", help="Clients may be answered here, too; may be repeated."),
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(metavar="NAME=HOST,...", help="Three servers; each NAME=HOST, or NAME=HOST:PORT:ROUTE_PORT."),
    ] = "",
    tls_cert: Annotated[str, typer.Option(metavar="FILE", help="Certificate of the servers.")] = "",
    tls_key: Annotated[str, typer.Option(metavar="FILE", help="Its key.")] = "",
    tls_ca: Annotated[str, typer.Option(metavar="FILE", help="The authority that it comes from.")] = "",
    tls_verify: Annotated[
        bool, typer.Option("--tls-verify", help="Whoever connects needs a certificate of that authority.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write a configuration of nats-server with a user for each role and the least rights that it needs.

    Secrets that are in DIR already are kept, others are made. Start a server with `nats-server -c DIR/nats-server.conf`
    and processes with the variables of their user: `set -a; . DIR/control.env; longshore control`.

    Example: longshore nats-config /etc/longshore/nats --server s1 --server s2 --client shop

    Example: longshore nats-config nats --cluster n1=10.0.0.1,n2=10.0.0.2,n3=10.0.0.3
    """
    from bus.nats_config import ConfigOptions, Member, Tls, write_configuration

    if bool(tls_cert) != bool(tls_key):
        raise UserError("--tls-cert and --tls-key belong together: give both")
    if (tls_ca or tls_verify) and not tls_cert:
        raise UserError("--tls-ca and --tls-verify need a certificate: give --tls-cert and --tls-key")
    if tls_verify and not tls_ca:
        raise UserError("--tls-verify needs to know whom to trust: give --tls-ca")
    cert, key, ca = (str(Path(file).absolute()) if file else "" for file in (tls_cert, tls_key, tls_ca))
    options = ConfigOptions(
        directory=directory,
        cell=check_cell_name(cell),
        clients=client or ["client"],
        servers=server or (),
        workers=workers,
        identity="nkey" if nkeys else "password",
        host=host,
        port=port,
        store=store,
        fsync_always=fsync,
        payload=max_payload,
        replies=reply or (),
        cluster=[Member.parse(text.strip()) for text in cluster.split(",")] if cluster else (),
        tls=Tls(cert, key, ca, tls_verify) if tls_cert else None,
    )
    written = write_configuration(options)
    users = [{"user": user, "role": role, "env": str(directory / f"{user}.env")} for user, role, _ in options.users()]
    if json:
        print(json_module.dumps({"files": [str(path) for path in written], "users": users, "urls": options.urls}))
        return
    for path in written:
        print(path)
    print(f"\nservers: {', '.join(options.urls)}")
    for user in users:
        print(f"{user['role']:<9} set -a; . {user['env']}; set +a")
