"""`longshore gateway`. What is heavy is imported inside the function."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from bus.options import (
    DEFAULT_CELL,
    DEFAULT_NATS,
    CellOption,
    Failure,
    LogJsonOption,
    NatsOption,
    check_cell_name,
    connection,
)


def gateway(
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-keys", envvar="LONGSHORE_API_KEYS", metavar="FILE", help="Lines of the form NAME KEY."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests handled at once; more are refused.")] = 4096,
    stall: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="A reader that takes nothing for so long is hung up.")
    ] = 30.0,
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="What open answers get when the gateway is told to end.")
    ] = 30.0,
    log_json: LogJsonOption = False,
) -> None:
    """Serve OpenAI's API over HTTP: chat completions, completions, embeddings, models, health.

    It is a client of the cell and holds nothing that matters: run as many as you like.

    Example: longshore gateway --port 8000 --api-keys keys.txt
    """
    import uvloop

    from bus.contract import BusError
    from bus.gateway.keys import ApiKeys, read_keys
    from bus.gateway.process import run_gateway
    from bus.gateway.settings import GatewaySettings
    from bus.health import Health
    from bus.logs import configure_logs

    check_cell_name(cell)
    configure_logs(as_json=log_json, process="gateway")
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what clients do wrong is told to them
    settings = GatewaySettings(
        nats=connection(nats),
        cell=cell,
        host=host,
        port=port,
        keys=read_keys(api_keys) if api_keys is not None else ApiKeys(),
        requests=requests,
        stall_seconds=stall,
        grace_seconds=grace,
    )
    health = Health("gateway")
    health.reasons = list  # what it lacks it says at /health; to listen is all that starting it takes
    looking = []

    def listening(address: str) -> None:
        print(f"listening on {address}", flush=True)
        looking.append(asyncio.ensure_future(health.keep_looking()))

    try:
        uvloop.run(run_gateway(settings, listening=listening))
    except BusError as error:
        raise Failure(str(error)) from None
