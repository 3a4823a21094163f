"""The process `longshore control`: a control shell on a real NATS server, restarted where its contract says so.

Where the cell follows rules that this program does not know, it stays up and silent: it publishes nothing, takes no
requests, and says why in its log and to whoever asks who is there (`longshore rules`, `longshore status`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from actors.cell_snapshots import SNAPSHOT_FACTS
from actors.control import LEAVE_SECONDS, Control
from actors.forked_capture import capture_in_a_copy
from actors.readback import Difference
from actors.rotation import rotate_when_due
from actors.rules import FIRST_RULES, KNOWN_RULES, UnknownRules
from actors.submissions import take_submissions
from bus.contract import BusError, LogChanged
from bus.credentials import ConnectionOptions
from bus.errors import UserError
from bus.health import Health
from bus.jetstream import JetStreamBus
from bus.messages import Message, PlacementConfigured, RequestsConfigured, RulesActivated
from bus.service import VERBS, Service
from bus.snapshots import SnapshotStore
from bus.tasks import Tasks

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
    known_rules: tuple[int, ...] = KNOWN_RULES
    health: str = ""
    generations: str = ""
    rotate_percent: int = 60
    rotate_keep_seconds: float = 60.0
    replicas: int = 1


FIRST_REQUESTS = RequestsConfigured(deaths_limit=2, dead_letters=True)
"""How a new cell deals with requests under which workers die."""

RESTART_SECONDS = 1.0
SILENT_LOOK_SECONDS = 2.0
"""How often a silent control looks whether it can take part again."""


class Stopped(UserError):
    """This control must not go on; the message says why and what to do."""

    exit_code = 3


async def run_control(options: ControlOptions) -> None:
    """Until SIGTERM or SIGINT (returns), or until a difference stops it (`Stopped`)."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    async with Health("control").kept(options.health) as health:
        await _run_until(ending, options, health)


async def _run_until(ending: asyncio.Event, options: ControlOptions, health: Health) -> None:
    stop = asyncio.ensure_future(ending.wait())
    restarted = False
    while not ending.is_set():
        run = asyncio.ensure_future(_run_once(options, ending, health))
        await asyncio.wait([run, stop], return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            await asyncio.wait([run], timeout=2 * LEAVE_SECONDS)
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


async def _run_once(options: ControlOptions, ending: asyncio.Event, health: Health) -> None:
    me = secrets.token_hex(8)
    bus = await JetStreamBus.connect(
        options.nats,
        options.cell,
        name=f"longshore-control-{me}",
        create=True,
        ledger_limit_bytes=options.ledger_limit_bytes,
        result_retention_seconds=options.retention_seconds + LONGEST_RUN_SECONDS,
        replicas=options.replicas,
    )
    service_tasks = Tasks()
    try:
        control = Control(
            bus,
            options.cell,
            me,
            silence=options.silence_seconds,
            snapshot_facts=options.snapshot_facts,
            capture=capture_in_a_copy,
            known_rules=options.known_rules,
        )
        service = Service(
            bus,
            control.subjects,
            me,
            control.intake.verbs,
            lambda: control.intake.counts,
            lambda: _standing(control, options.known_rules),
        )
        for verb in VERBS:
            for subject in service.subjects_of(verb):
                service_tasks.start(service.answer(verb, subject), f"service {subject}")
        control.tasks.start(service_tasks.wait(), "service")
        control.tasks.start(_after_start(bus, control, options), "after start")
        if options.generations:
            rotating = rotate_when_due(
                control,
                options.nats,
                options.cell,
                Path(options.generations),
                options.rotate_percent,
                keep=options.rotate_keep_seconds,
            )
            control.tasks.start(rotating, "rotation")
        health.reasons = control.obstacles
        try:
            await _until(ending, control)
        except UnknownRules as error:
            health.reasons = lambda: [control.silent]
            log.error("silent", reason=str(error), me=me)
            await _stay_silent(bus, control, error, ending)
    finally:
        health.reasons = lambda: ["it is starting anew"]
        await service_tasks.stop()
        await bus.close()


async def _stay_silent(bus: JetStreamBus, control: Control, error: UnknownRules, ending: asyncio.Event) -> None:
    """Until the end, or until a snapshot under rules that are known leads past those that are not."""
    store = SnapshotStore(bus.snapshots, control.subjects)
    while not ending.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), SILENT_LOOK_SECONDS)
        with contextlib.suppress(BusError):
            found = await store.manifests()
            if any(one.position > error.sequence and one.rules in error.known for one in found):
                return


def _standing(control: Control, known_rules: tuple[int, ...]) -> dict[str, str]:
    """Where this control stands, for whoever asks who is there: texts by name, as a NATS micro service tells them."""
    return {
        "process": str(os.getpid()),
        "state": "silent" if control.silent else "live" if control.live else "reading",
        "reason": control.silent,
        "known_rules": ",".join(map(str, known_rules)),
    }


async def _until(ending: asyncio.Event, control: Control) -> None:
    """Run; at the end of its time, first give back what clients would send."""
    run = asyncio.ensure_future(control.run())
    end = asyncio.ensure_future(ending.wait())
    try:
        await asyncio.wait([run, end], return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            await control.leave()
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run
            return
        await run
    finally:
        run.cancel()
        end.cancel()


async def _after_start(bus: JetStreamBus, control: Control, options: ControlOptions) -> None:
    await control.started.wait()
    await _begin_rules(control, options.known_rules)
    await _configure(control, options)
    await take_submissions(bus, control.subjects, control.intake)


async def _begin_rules(control: Control, known: tuple[int, ...]) -> None:
    """A cell that never had a request begins with the best rules; any other keeps its own until somebody switches."""
    assert control.replica is not None
    cell = control.replica.cell
    if "requests" in cell.actors or cell.rules != FIRST_RULES or known[-1] == FIRST_RULES:
        return
    try:
        await control.intake.state("cell", RulesActivated(known[-1]), f"fact.rules.first.{known[-1]}")
    except BusError as error:
        log.warning("rules not stated", reason=str(error))


async def _configure(control: Control, options: ControlOptions) -> None:
    """State the configuration as facts where the cell follows another one."""
    assert control.replica is not None
    actors = control.replica.cell.actors
    requests = actors.get("requests")
    # A cell that never had a request begins so; any other keeps its own until somebody states another one.
    base = requests.state.configuration if requests is not None else FIRST_REQUESTS
    wanted: list[tuple[str, Message]] = [
        ("placement", PlacementConfigured(queue_limit=options.queue_limit)),
        ("requests", msgspec.structs.replace(base, retention_ms=options.retention_seconds * 1000)),
    ]
    for actor, message in wanted:
        known = actors.get(actor)
        current = known.state.configuration if known is not None else type(message)()
        if current != message:
            try:
                await control.intake.state(actor, message, "")
            except BusError as error:
                log.warning("configuration not stated", actor=actor, reason=str(error))
