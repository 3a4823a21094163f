"""`longshore rules`: which rule version is in force, which ones each control knows, and the switch to another."""

from __future__ import annotations

import asyncio
import contextlib
import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.rules import FIRST_RULES, SENTENCES
from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from bus.jetstream import JetStreamBus
    from bus.service import Instance

FOLLOW_SECONDS = 10.0
"""How long the controls may take to follow a switch before the command says that they do not."""


async def rules(
    action: Annotated[str | None, typer.Argument(metavar="activate", help="Switch, instead of showing.")] = None,
    version: Annotated[int | None, typer.Argument(min=1, metavar="VERSION", help="The version to switch to.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Switch although a control does not know the version; it falls silent.")
    ] = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
    json: JsonOption = False,
) -> None:
    """Show the rule version in force and who knows which, or switch to another one while requests run.

    A new program knows the rules of the old one, and follows them until the switch. So: replace the controls one after
    the other, then activate. Going back is one more switch.

    Example: longshore rules

    Example: longshore rules activate 2
    """
    if action is not None and (action != "activate" or version is None):
        raise UserError("write `longshore rules` to see the versions, or `longshore rules activate VERSION` to switch")
    async with connected(nats, cell) as bus:
        if version is not None:
            before, since = await activate(bus, cell, version, force=force)
            if json:
                print(json_module.dumps({"in_force": version, "before": before, "since": since}))
            elif before == version:
                print(f"rule version {version} is in force already")
            else:
                print(f"rule version {version} is in force since ledger sequence {since}; before, it was {before}")
        else:
            await _show(bus, cell, as_json=json)


async def _show(bus: JetStreamBus, cell: str, *, as_json: bool) -> None:
    from bus.service import instances

    controls = await instances(bus, cell)
    in_force, since = await _in_force(bus, cell)
    if as_json:
        shown = {"in_force": in_force, "since": since, "controls": [described(one) for one in controls]}
        print(json_module.dumps(shown))
        return
    print(f"rule version {in_force} is in force, {f'since ledger sequence {since}' if since else 'from the beginning'}")
    for number, sentence in SENTENCES.items():
        print(f"  {number}: {sentence}")
    if not controls:
        print("no control answers")
    for one in controls:
        print(sentence_of(one))


async def activate(bus: JetStreamBus, cell: str, version: int, *, force: bool = False) -> tuple[int, int]:
    """Switch, and wait until a control has followed. The version before, and the ledger sequence of the switch.

    Raises `Failure` where a control does not know the version, unless `force`, and always where none knows it.
    """
    import msgspec

    from bus.messages import FactEnvelope, RulesActivated, encode, kind_of
    from bus.service import instances
    from bus.subjects import Subjects

    controls = await instances(bus, cell)
    if not controls:
        raise Failure(f"no control of cell {cell!r} answers, so nobody would follow: start one, then activate")
    ignorant = [one for one in controls if version not in known_rules(one)]
    if len(ignorant) == len(controls):
        raise Failure(
            f"no control that answers knows rule version {version}, all would fall silent: "
            "replace them by newer ones first, one after the other"
        )
    if ignorant and not force:
        them = "; ".join(f"control {one.id} (process {one.metadata.get('process', '?')})" for one in ignorant)
        raise Failure(
            f"rule version {version} is not known to {them}: replace what is old first, or use --force and have it "
            "fall silent"
        )
    before, since = await _in_force(bus, cell)
    if before != version:
        message = RulesActivated(version)
        payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
        since = (await bus.ledger.append(Subjects(cell).fact("cell", kind_of(message)), payload)).sequence
        await _followed(bus, cell, version, since)
    return before, since


async def _followed(bus: JetStreamBus, cell: str, version: int, sequence: int) -> None:
    """Until a control has taken the switch."""
    from actors.up import cell_status

    try:
        async with asyncio.timeout(FOLLOW_SECONDS):
            while True:
                found = await cell_status(bus, cell)
                if found is not None and found["position"] >= sequence:
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise Failure(
            f"ledger sequence {sequence} says that rule version {version} is in force, and no control has followed "
            f"within {FOLLOW_SECONDS:g} s: look at `longshore rules` and at the controls' logs"
        ) from None


async def _in_force(bus: JetStreamBus, cell: str) -> tuple[int, int]:
    """The version in force, and since which ledger sequence (0: from the beginning)."""
    import msgspec

    from actors.up import cell_status
    from bus.messages import RulesActivated, decode_fact, decode_fact_body
    from bus.subjects import Subjects

    found = await cell_status(bus, cell)
    version, since = (int(found["rules"]) if found is not None else FIRST_RULES), 0
    last = await bus.ledger.last(Subjects(cell).fact("cell", "rules.activated"))
    if last is not None:
        with contextlib.suppress(msgspec.DecodeError, ValueError):
            message = decode_fact_body(decode_fact(last.payload).body)
            if isinstance(message, RulesActivated) and (found is None or message.version == version):
                version, since = message.version, last.sequence
    return version, since


def known_rules(control: Instance) -> list[int]:
    """What a control says that it knows; one that says nothing is from before there was a choice."""
    told = control.metadata.get("known_rules", str(FIRST_RULES))
    return [int(number) for number in told.split(",") if number.isdigit()]


def described(control: Instance) -> dict[str, Any]:
    """A control as it stands in the JSON of `longshore rules` and `longshore status`."""
    metadata = control.metadata
    return {
        "id": control.id,
        "process": int(metadata["process"]) if metadata.get("process", "").isdigit() else 0,
        "state": metadata.get("state", ""),
        "reason": metadata.get("reason", ""),
        "known_rules": known_rules(control),
    }


def sentence_of(control: Instance) -> str:
    one = described(control)
    why = f": {one['reason']}" if one["reason"] else ""
    knows = ", ".join(map(str, one["known_rules"]))
    return f"control {one['id']} (process {one['process']}), {one['state'] or 'old'}, knows {knows}{why}"
