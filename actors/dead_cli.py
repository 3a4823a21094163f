"""`longshore dead list | show | retry`: requests that were given up because workers died under them."""

from __future__ import annotations

import json as json_module
import secrets
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from bus.contract import Bus
    from bus.messages import RequestAccepted, RequestQuarantined
    from bus.subjects import Subjects

RequestArgument = Annotated[str, typer.Argument(metavar="REQUEST", help="Its id, or the beginning of it.")]


async def list_dead(nats: NatsOption = DEFAULT_NATS, cell: CellOption = DEFAULT_CELL, json: JsonOption = False) -> None:
    """List the requests that were quarantined, the oldest first.

    Example: longshore dead list --json
    """
    import msgspec

    from actors.dead_history import dead_letters

    async with connected(nats, cell) as bus:
        found = [(sequence, letter) async for sequence, letter in dead_letters(bus, bus.subjects)]
    if json:
        print(json_module.dumps([{"sequence": at} | msgspec.to_builtins(letter) for at, letter in found]))
        return
    for _, letter in found:
        where = ", ".join(dict.fromkeys(death.worker for death in letter.deaths))
        print(f"{letter.request}  {letter.model}  from {letter.client}: {letter.reason} ({where})")
    if not found:
        print("no request was quarantined")


async def show(
    request: RequestArgument, nats: NatsOption = DEFAULT_NATS, cell: CellOption = DEFAULT_CELL, json: JsonOption = False
) -> None:
    """Show what happened under a quarantined request: workers, epochs, positions and reasons, from the ledger.

    Example: longshore dead show 3f2a91c0
    """
    import msgspec

    from actors.dead_history import history

    async with connected(nats, cell) as bus:
        at, letter = await _find(bus, bus.subjects, request)
        deaths, events = await history(bus, bus.subjects, letter, at)
    if json:
        told = {"sequence": at} | msgspec.to_builtins(letter) | {"deaths": [msgspec.to_builtins(d) for d in deaths]}
        print(json_module.dumps(told | {"events": [event.as_json() for event in events]}))
        return
    print(f"request {letter.request} for {letter.model} from {letter.client}, key {letter.key}: {letter.reason}")
    for death in deaths:
        epoch = f"epoch {death.epoch}" if death.epoch else "an epoch that the ledger does not tell"
        print(
            f"  attempt {death.attempt} on {death.worker} in {epoch}, up to position {death.position}: {death.reason}"
        )
    for event in events:
        print(f"{event.sequence:>8}  {event.kind:<20}  {event.text}")


async def retry(
    request: RequestArgument,
    key: Annotated[str, typer.Option(help="The key of the new request; by default a random one.")] = "",
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Submit a quarantined request again, as a new one with the same body; prints its id.

    In a cell with logins it takes one that may read the ledger, as an operator's, and submit, as a client's.

    Example: longshore dead retry 3f2a91c0
    """
    from bus.client import Client, RequestFailed
    from bus.messages import RequestAccepted, decode_fact, decode_fact_body

    async with connected(nats, cell) as bus:
        _, letter = await _find(bus, bus.subjects, request)
        record = await bus.ledger.get(letter.accepted)
        fact = decode_fact_body(decode_fact(record.payload).body) if record is not None else None
        if not isinstance(fact, RequestAccepted):
            raise Failure(
                f"the body of request {letter.request} does not stand in the ledger any more: its beginning was "
                "dropped; send the request anew from where it came"
            )
        if fact.generation.inputs is not None:
            raise Failure(f"request {letter.request} asks for embeddings, which cannot be submitted: embed it anew")
        client = Client(bus, cell, name="dead-retry")
        try:
            fields: dict[str, Any] = body_of(fact)
            new = await client.submit(fact.model, key=key or secrets.token_hex(16), **fields)
        except RequestFailed as failed:
            raise Failure(str(failed)) from None
    print(json_module.dumps({"request": new, "retry_of": letter.request}) if json else new)


async def _find(bus: Bus, subjects: Subjects, request: str) -> tuple[int, RequestQuarantined]:
    from actors.dead_history import dead_letters

    found = [one async for one in dead_letters(bus, subjects) if one[1].request.startswith(request)]
    names = {letter.request for _, letter in found}
    if not names:
        raise UserError(f"no request {request} was quarantined; `longshore dead list` shows which were")
    if len(names) > 1:
        raise UserError(f"{request} is the beginning of {len(names)} quarantined requests: give more of it")
    return found[-1]


def body_of(fact: RequestAccepted) -> dict[str, Any]:
    """The fields of `submit` that give the same request again, but for its key and its readers."""
    import msgspec

    from bus.messages import Generation

    said = fact.generation
    plain = Generation(max_tokens=said.max_tokens)
    fields: dict[str, Any] = {"client": fact.client, "max_tokens": said.max_tokens, "seed": said.seed}
    for name in said.__struct_fields__:
        value = getattr(said, name)
        if name not in ("parts", "inputs", "max_tokens", "seed") and value != getattr(plain, name):
            fields[name] = msgspec.to_builtins(value)
    if said.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in said.logit_bias}
    if said.parts is not None:
        fields["prompt_parts"] = msgspec.to_builtins(said.parts)
    if fact.deadline_ms:
        fields["deadline_ms"] = fact.deadline_ms
    if fact.priority:
        fields["priority"] = fact.priority
    return fields
