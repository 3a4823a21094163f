"""`longshore bench serve`. What is heavy is imported inside the function."""

from __future__ import annotations

import json as json_module
import os
import platform
from typing import Annotated

import typer

from bus.options import Failure, JsonOption


def bench_serve(
    size: Annotated[str, typer.Option(help="About how many parameters the sample has.")] = "30M",
    clients: Annotated[int, typer.Option(min=1, max=64, help="Clients that stream at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=8, max=400, help="Tokens per answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds of each way; the medians count.")] = 5,
    json: JsonOption = False,
) -> None:
    """Tokens per second of streaming clients over NATS and over HTTP, beside the engine called directly.

    Example: longshore bench serve --rounds 5 --json
    """
    import uvloop

    from actors.bench_serve import measure
    from bus.contract import BusError
    from bus.sizes import parse_size

    try:
        found = uvloop.run(
            measure(
                parameters=parse_size(size, "--size"),
                clients=clients,
                max_tokens=max_tokens,
                rounds=rounds,
                tell=lambda doing: typer.echo(doing, err=True),
            )
        )
    except BusError as error:
        raise Failure(str(error)) from None
    found |= {
        "size": size,
        "clients": clients,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    if json:
        print(json_module.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    rates, spent = found["tokens_per_second"], found["cpu_us_per_token"]
    title = f"bench serve: {clients} clients, {max_tokens} tokens each, a step of {found['step_ms']} ms"
    table = Table("", "engine called directly", "over NATS", "over HTTP", title=title)
    table.add_row("tokens/s", *(f"{rates[way]}" for way in ("direct", "nats", "http")))
    reach = f"of direct (reach {found['reach']['of_direct']})"
    table.add_row(reach, "1", *(f"{found['of_direct'][way]}" for way in ("nats", "http")))
    for name in spent["nats"]:
        table.add_row(f"CPU us/token: {name}", "-", *(str(spent[way][name]) for way in ("nats", "http")))
    Console().print(table)
    if not found["step_is_long_enough"]:
        print(f"a step takes less than {found['reach']['step_ms']} ms: use a larger --size")
