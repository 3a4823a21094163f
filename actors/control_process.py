"""The process `longshore control`: a control shell on a real NATS server, restarted where its contract says so."""

from __future__ import annotations

import asyncio
import secrets
import signal
from dataclasses import dataclass

import structlog

from actors.cell import UnknownRules
from actors.cell_snapshots import SNAPSHOT_FACTS
from actors.control import Control
from actors.readback import Difference
from actors.submissions import take_submissions
from bus.contract import BusError, LogChanged
from bus.credentials import ConnectionOptions
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.messages import Message, PlacementConfigured, RequestsConfigured
from bus.service import VERBS, Service

LONGEST_RUN_SECONDS = 6 * 3600
"""Pages are kept for so long beyond the retention of results: those of an answer that is still being written, too."""

log = structlog.get_logger("longshore.control")


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """What a control is told at its start. Retention and queue limit become facts where the cell has other values."""

    nats: ConnectionOptions
    cell: str
    silence_seconds: float = 1.0
    ledger_limit_bytes: int = 1 << 30
    retention_seconds: int = 3600
    queue_limit: int = 1000
    snapshot_facts: int = SNAPSHOT_FACTS


RESTART_SECONDS = 1.0


class Stopped(UserError):
    """This control must not go on; the message says why and what to do."""

    exit_code = 3


async def run_control(options: ControlOptions) -> None:
    """Until SIGTERM or SIGINT (returns), or until a difference or an unknown rule version stops it (`Stopped`)."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    stop = asyncio.ensure_future(ending.wait())
    restarted = False
    while not ending.is_set():
        run = asyncio.ensure_future(_run_once(options))
        await asyncio.wait([run, stop], return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            run.cancel()
        try:
            await run
        except asyncio.CancelledError:
            break
        except LogChanged as error:
            restarted = True
            log.error("the ledger changed, starting anew", reason=str(error))
        except BusError as error:
            # Right after such a change the server may still be on its way; at the first start it is a wrong address.
            if not restarted:
                raise
            log.warning("starting anew has to wait", reason=str(error))
            await asyncio.wait([stop], timeout=RESTART_SECONDS)
        except Difference as error:
            raise Stopped(
                f"what stands in the ledger differs from what this control computes: {error}; look at it with "
                "`longshore replay --verify`, and accept it with a difference.accepted fact if it is to stand"
            ) from None
        except UnknownRules as error:
            raise Stopped(str(error)) from None


async def _run_once(options: ControlOptions) -> None:
    me = secrets.token_hex(8)
    bus = await JetStreamBus.connect(
        options.nats,
        options.cell,
        name=f"longshore-control-{me}",
        create=True,
        ledger_limit_bytes=options.ledger_limit_bytes,
        result_retention_seconds=options.retention_seconds + LONGEST_RUN_SECONDS,
    )
    try:
        control = Control(bus, options.cell, me, silence=options.silence_seconds, snapshot_facts=options.snapshot_facts)
        service = Service(bus, control.subjects, me, control.intake.verbs, lambda: control.intake.counts)
        for verb in VERBS:
            for subject in service.subjects_of(verb):
                control.tasks.start(service.answer(verb, subject), f"service {subject}")
        control.tasks.start(_after_start(bus, control, options), "after start")
        await control.run()
    finally:
        await bus.close()


async def _after_start(bus: JetStreamBus, control: Control, options: ControlOptions) -> None:
    await control.started.wait()
    await _configure(control, options)
    await take_submissions(bus, control.subjects, control.intake)


async def _configure(control: Control, options: ControlOptions) -> None:
    """State the configuration as facts where the cell follows another one."""
    assert control.replica is not None
    actors = control.replica.cell.actors
    wanted: list[tuple[str, Message]] = [
        ("placement", PlacementConfigured(queue_limit=options.queue_limit)),
        ("requests", RequestsConfigured(retention_ms=options.retention_seconds * 1000)),
    ]
    for actor, message in wanted:
        known = actors.get(actor)
        current = known.state.configuration if known is not None else type(message)()
        if current != message:
            try:
                await control.intake.state(actor, message, "")
            except BusError as error:
                log.warning("configuration not stated", actor=actor, reason=str(error))
