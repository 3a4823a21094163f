"""`longshore embed`: vectors of texts, for a look and for scripts."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, JsonOption, NatsOption, connected

SHOWN_NUMBERS = 4


async def embed(
    model: Annotated[str, typer.Argument(metavar="NAME", help="The model.", show_default=False)],
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="At most 256; `-` reads one from each line of standard input."),
    ],
    key: Annotated[
        str | None, typer.Option("--key", help="Idempotency key: the same one attaches to its answer.")
    ] = None,
    as_json: JsonOption = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
) -> None:
    """Make one vector of each text. A decoder that answers makes embeddings, too.

    Example: longshore embed bert-a "The harbour was quiet" "Ships come in at dawn" --json
    """
    from bus.answer import Patience, RequestFailed
    from bus.cli import _told
    from bus.client import Client

    if texts == ["-"]:
        texts = [line for line in sys.stdin.read().splitlines() if line]
    async with connected(nats, cell) as bus:
        client = Client(bus, cell, patience=Patience(nobody=2.0))
        try:
            made = await client.embed(model, texts, key=key)
        except RequestFailed as failure:
            raise _told(failure, as_json) from None
    vectors = made.numbers
    if as_json:
        usage = {"prompt_tokens": made.prompt_tokens}
        print(json.dumps({"request": made.request, "embeddings": vectors, "usage": usage}))
        return
    for text, vector in zip(texts, vectors, strict=True):
        first = ", ".join(f"{number:+.4f}" for number in vector[:SHOWN_NUMBERS])
        more = ", …" if len(vector) > SHOWN_NUMBERS else ""
        print(f"[{first}{more}]  {len(vector)} numbers  {text[:60]}")
