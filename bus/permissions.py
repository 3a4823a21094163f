"""Who may publish and listen where: the one table behind `longshore nats-config`.

    client     asks, embeds, submits (with parts), cancels, reads answers in its own inbox
    node       obeys effects of its drivers, states their facts, appends their pages, shows chunks
    control    takes what clients say, decides, says so
    operator   reads everything, changes what an operator may

A kind of fact belongs to a role (`FACT_KINDS`); a new one that is missing here fails a test. What the rights are about:
nobody but intake, drivers, watch and control publishes to the ledger, each its own kinds; a client neither reads nor
changes a stream; nobody drops anything of the ledger but control and operators, who make generations of its beginning.

What they cannot forbid: whoever may create a consumer chooses where the server delivers, so a node or an operator that
was taken over can have stored messages published on subjects that it may not write to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from bus.credentials import DEFAULT_INBOX
from bus.subjects import Subjects

Role = Literal["client", "node", "control", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)
SERVICE = "$SRV"

STORE_KINDS = ("store.started", "model.loaded", "load.failed", "model.evicted", "model.found", "model.missing",
               "model.deleted", "load.cancel-taken", "driver.lost")  # fmt: skip
WORKER_KINDS = ("worker.started", "model.attached", "attach.failed", "model.detached", "cancel.taken", "reader.added",
                "sequence.finished", "sequence.refused", "sequence.failed", "progress.reported", "round.finished",
                "sequence.caught-up", "hand-over.taken", "sequence.released", "sequence.dropped",
                "driver.lost")  # fmt: skip
CONTROL_KINDS = ("request.accepted", "cancel.requested", "reader.attached", "requests.configured", "model.added",
                 "model.removed", "model.wanted", "placement.configured", "driver.lost", "sequences.sealed",
                 "timer.fired", "rules.activated")  # fmt: skip
OPERATOR_KINDS = ("rules.activated", "difference.accepted", "migrate.requested", "drain.requested")

FACT_KINDS: dict[Role, tuple[str, ...]] = {
    "client": (),
    "node": STORE_KINDS + WORKER_KINDS,
    "control": CONTROL_KINDS,
    "operator": OPERATOR_KINDS,
}
"""Which kinds of facts a role states. The first rules of a cell are stated by its first control, later ones by hand."""

CLIENT_VERBS = ("infer", "embed", "submit", "cancel", "resume", "result")
ADMIN_READS = ("models", "status")


@dataclass(frozen=True, slots=True)
class Rights:
    """Subjects, with wildcards, that a user may publish on and subscribe to; everything else is refused."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """What the rights depend on.

    `drivers`: names of the drivers that this node has, none for any; `replies`: subjects outside of the inboxes on
    which clients may be answered.
    """

    subjects: Subjects
    inbox: str
    drivers: Sequence[str] = field(default=())
    replies: Sequence[str] = field(default=())


def inbox_of(user: str) -> str:
    """What the subjects of a user's answers begin with. A server gives rights by whole tokens, so it is a token."""
    return f"{DEFAULT_INBOX}.{user}"


def drivers_of(server: str, workers: int) -> tuple[str, ...]:
    return (f"store/{server}", *(f"gpu/{server}/{index}" for index in range(workers)))


def rights(role: Role, place: Place) -> Rights:
    """The rights of one user."""
    publish, subscribe = {"client": _client, "node": _node, "control": _control, "operator": _operator}[role](place)
    return Rights(tuple(dict.fromkeys(publish)), (f"{place.inbox}.>", *subscribe))


def _client(place: Place) -> tuple[list[str], list[str]]:
    subjects = place.subjects
    publish = [f"{subjects.prefix}.{verb}.*" for verb in CLIENT_VERBS]
    publish.append(subjects.parts_filter)
    return [*publish, *(subjects.admin(verb) for verb in ADMIN_READS)], []


def _node(place: Place) -> tuple[list[str], list[str]]:
    subjects = place.subjects
    publish, subscribe = [], []
    for driver in place.drivers or ("*",):
        kinds = {"store": STORE_KINDS, "gpu": WORKER_KINDS}.get(driver.partition("/")[0], FACT_KINDS["node"])
        publish += [subjects.fact(driver, kind) for kind in kinds]
        publish.append(subjects.heartbeat(driver))
        if not driver.startswith("store/"):
            publish.append(f"{subjects.prefix}.tokens.{driver}.*")
        if not driver.startswith("gpu/"):
            subscribe.append(subjects.heartbeat(driver))
    # Tokens: an answer that moves here goes on behind what other workers have written.
    publish += _reads(subjects.ledger_stream) + _reads(subjects.tokens_stream) + _looks(subjects.parts_stream)
    publish += _answers(place)
    return publish, subscribe


def _control(place: Place) -> tuple[list[str], list[str]]:
    subjects, intake = place.subjects, place.subjects.intake_stream
    publish = [subjects.fact("*", kind) for kind in CONTROL_KINDS]
    publish += [f"{subjects.said_prefix}>", f"{subjects.prefix}.tokens.*.*", subjects.refused("*")]
    publish.append(subjects.snapshots_filter)
    parts = subjects.parts_stream
    for stream in _streams(subjects):
        publish += [f"$JS.API.STREAM.{verb}.{stream}" for verb in ("CREATE", "UPDATE")]
    publish += _reads(subjects.ledger_stream) + _reads(subjects.tokens_stream) + _looks(intake) + _looks(parts)
    publish += [*_reads(subjects.snapshots_stream), f"$JS.API.STREAM.PURGE.{subjects.snapshots_stream}"]
    publish.append(f"$JS.API.STREAM.PURGE.{subjects.ledger_stream}")
    publish += [
        f"$JS.API.CONSUMER.CREATE.{intake}.>",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{intake}.*",
        f"$JS.API.CONSUMER.INFO.{intake}.*",
        f"$JS.API.CONSUMER.MSG.NEXT.{intake}.*",
        f"$JS.ACK.{intake}.>",
    ]
    verbs = [verb for verb in (*CLIENT_VERBS, "admin") if verb != "submit"]
    subscribe = [*(subjects.every(verb) for verb in verbs), subjects.heartbeats()]
    return publish + _answers(place), [*subscribe, f"{SERVICE}.>"]


def _operator(place: Place) -> tuple[list[str], list[str]]:
    subjects = place.subjects
    publish = [subjects.fact("*", kind) for kind in OPERATOR_KINDS]
    publish += [subjects.admin(">"), f"{SERVICE}.>"]
    publish += _reads(subjects.ledger_stream) + _reads(subjects.tokens_stream) + _reads(subjects.snapshots_stream)
    for stream in _streams(subjects):
        # A backup is the whole of a stream, as the server itself gives it out; it takes it back into no existing one.
        publish += [*_looks(stream), f"$JS.API.STREAM.SNAPSHOT.{stream}", f"$JS.SNAPSHOT.ACK.{stream}.>"]
        publish += [f"$JS.API.STREAM.RESTORE.{stream}", f"$JS.SNAPSHOT.RESTORE.{stream}.>"]
    publish += [f"$JS.API.STREAM.UPDATE.{stream}" for stream in (subjects.ledger_stream, subjects.tokens_stream)]
    publish.append(f"$JS.API.STREAM.PURGE.{subjects.ledger_stream}")
    publish += ["$JS.API.INFO", "$JS.API.STREAM.LIST", "$JS.API.STREAM.NAMES", "$JS.API.CONSUMER.LIST.*"]
    return publish, [f"{subjects.prefix}.>", "$JS.EVENT.ADVISORY.>"]


def _streams(subjects: Subjects) -> list[str]:
    return [
        subjects.ledger_stream,
        subjects.tokens_stream,
        subjects.intake_stream,
        subjects.parts_stream,
        subjects.snapshots_stream,
    ]


def _looks(stream: str) -> list[str]:
    """Single messages of a stream, and how it stands."""
    return [
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
    ]


def _reads(stream: str) -> list[str]:
    """Ordered reading of a stream: consumers of one's own, and the answers to its flow control."""
    return [
        *_looks(stream),
        f"$JS.API.CONSUMER.CREATE.{stream}.>",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        f"$JS.API.CONSUMER.DELETE.{stream}.*",
        f"$JS.FC.{stream}.>",
    ]


def _answers(place: Place) -> list[str]:
    """Where clients are answered. Not by the server's `allow_responses`: chunks come from another process, for long."""
    return [f"{DEFAULT_INBOX}.>", *place.replies]
