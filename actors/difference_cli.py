"""`longshore difference accept`: an operator lets a recorded message stand although the code computes another one."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, JsonOption, NatsOption, connected


async def accept(
    fact: Annotated[int, typer.Argument(min=1, help="Ledger sequence of the fact whose step it is.")],
    index: Annotated[int, typer.Argument(min=0, help="Index of the message in the step.")],
    driver: Annotated[str, typer.Option(help="If it was an effect: the driver that obeyed it, such as gpu/s1/0.")] = "",
    epoch: Annotated[int, typer.Option(min=0, help="The epoch in which it obeyed; it is closed.")] = 0,
    note: Annotated[str, typer.Option(help="Why; it stays in the ledger.")] = "",
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Accept one difference between what the ledger holds and what this code computes; then start the control again.

    A control that finds a difference stops and names it: sequence, message, field, fact and index.

    Example: longshore difference accept 1200 3 --note "written by the build of last Tuesday"
    """
    import msgspec

    from bus.messages import DifferenceAccepted, FactEnvelope, encode, kind_of
    from bus.subjects import Subjects

    message = DifferenceAccepted(fact, index, driver, epoch, note)
    payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
    async with connected(nats, cell) as bus:
        appended = await bus.ledger.append(Subjects(cell).fact("cell", kind_of(message)), payload)
    if json:
        print(json_module.dumps({"sequence": appended.sequence, "fact": fact, "index": index}))
    else:
        print(f"message {index} of fact {fact} stands, as fact {appended.sequence} says; start the control again")
