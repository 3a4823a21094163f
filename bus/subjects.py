"""Every subject of a cell is made and parsed here, and nowhere else.

    longshore.<cell>.fact.<actor>.<kind>               facts from outside, the only input of the cell   (LEDGER)
    longshore.<cell>.said.<sender>.<receiver>.<kind>   what actors said while a fact was taken           (LEDGER)
    longshore.<cell>.tokens.<driver>.<epoch>           one page of tokens per decode step                (TOKENS)
    longshore.<cell>.snapshot.manifest                 snapshots that are whole                          (SNAPSHOTS)
    longshore.<cell>.snapshot.chunk.<id>               their pieces                                      (SNAPSHOTS)
    longshore.<cell>.submit.<model>                    requests whose acknowledgement is the acceptance  (INTAKE)
    longshore.<cell>.infer.<model>                     requests with a streamed reply                    (no stream)
    longshore.<cell>.embed.<model>                     requests for vectors, with one reply              (no stream)
    longshore.<cell>.part.<upload>.<index>             parts of a prompt that is too large for a message  (PARTS)
    longshore.<cell>.refused.<model>                   submissions that can never be requests            (no stream)
    longshore.<cell>.cancel.<request>                  cancel                                            (no stream)
    longshore.<cell>.resume.<request>                  show again from a position                        (no stream)
    longshore.<cell>.result.<request>                  the whole answer, or what is known of it          (no stream)
    longshore.<cell>.admin.<verb>                      models and state, for operators                   (no stream)
    longshore.<cell>.heartbeat.<driver>                liveness                                          (no stream)

Names of actors and drivers are one subject token each (`gpu/s1/0`). Kinds may have several (`sequence.finished`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bus.messages.names import escape_model as escape_model
from bus.messages.names import unescape_model as unescape_model

ROOT = "longshore"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")
MODEL_NAME_LIMIT = 200
REPLY_LIMIT = 512
"""Longest reply subject, as the messages that carry one say."""
_REPLY = re.compile(r"[^\s\x00-\x20\x7f]+\Z")


def valid_name(name: str) -> bool:
    """Cells and servers: 1 to 63 letters, digits, `-` and `_`, beginning with a letter or digit."""
    return _NAME.match(name) is not None


def may_reply(subject: str) -> bool:
    """Whether a client may be answered on this subject.

    Not on one that a stream of ours captures, nor on one that a server obeys: we would write there with our own
    rights, on behalf of somebody who has none.
    """
    tokens = subject.split(".")
    return (
        len(subject) <= REPLY_LIMIT
        and _REPLY.match(subject) is not None
        and tokens[0] != ROOT
        and not subject.startswith("$")
        and all(token not in ("", "*", ">") for token in tokens)
    )


class FactSubject(NamedTuple):
    actor: str
    kind: str


class SaidSubject(NamedTuple):
    sender: str
    receiver: str
    kind: str


class Subjects:
    """The subjects of one cell."""

    def __init__(self, cell: str) -> None:
        if not valid_name(cell):
            raise ValueError(f"cell name {cell!r}: use 1 to 63 letters, digits, '-' and '_'")
        self.cell = cell
        self.prefix = f"{ROOT}.{cell}"
        self._fact = f"{self.prefix}.fact."
        self._said = f"{self.prefix}.said."

    # streams
    @property
    def ledger_stream(self) -> str:
        return f"LEDGER_{self.cell}"

    @property
    def tokens_stream(self) -> str:
        return f"TOKENS_{self.cell}"

    @property
    def intake_stream(self) -> str:
        return f"INTAKE_{self.cell}"

    @property
    def snapshots_stream(self) -> str:
        return f"SNAPSHOTS_{self.cell}"

    @property
    def snapshots_filter(self) -> str:
        return f"{self.prefix}.snapshot.>"

    @property
    def snapshot_manifest(self) -> str:
        return f"{self.prefix}.snapshot.manifest"

    def snapshot_chunk(self, name: str) -> str:
        return f"{self.prefix}.snapshot.chunk.{name}"

    @property
    def ledger_filters(self) -> list[str]:
        return [self._fact + ">", self._said + ">"]

    @property
    def tokens_filter(self) -> str:
        return f"{self.prefix}.tokens.>"

    @property
    def submit_filter(self) -> str:
        return f"{self.prefix}.submit.>"

    @property
    def parts_stream(self) -> str:
        return f"PARTS_{self.cell}"

    @property
    def parts_filter(self) -> str:
        return f"{self.prefix}.part.*.*"

    # the ledger
    def fact(self, actor: str, kind: str) -> str:
        return f"{self._fact}{actor}.{kind}"

    def facts(self) -> str:
        return self._fact + ">"

    def facts_of(self, actor: str) -> str:
        return f"{self._fact}{actor}.>"

    def said(self, sender: str, receiver: str, kind: str) -> str:
        return f"{self._said}{sender}.{receiver}.{kind}"

    @property
    def said_prefix(self) -> str:
        """What every subject of a derived message begins with."""
        return self._said

    def said_to(self, receiver: str) -> str:
        return f"{self._said}*.{receiver}.>"

    def dead_letters(self) -> str:
        """Requests that were given up, each with its history."""
        return self.said("requests", "dead", "request.quarantined")

    def parse(self, subject: str) -> FactSubject | SaidSubject | None:
        """What a ledger subject says; None for anything else."""
        if subject.startswith(self._fact):
            actor, _, kind = subject[len(self._fact) :].partition(".")
            return FactSubject(actor, kind) if actor and kind else None
        if subject.startswith(self._said):
            parts = subject[len(self._said) :].split(".", 2)
            return SaidSubject(*parts) if len(parts) == 3 and all(parts) else None
        return None

    # tokens
    def tokens(self, driver: str, epoch: int) -> str:
        """The subject of one epoch of one worker: `driver` is a name such as `gpu/s1/0`."""
        return f"{self.prefix}.tokens.{driver}.{epoch}"

    # clients
    def infer(self, model: str) -> str:
        return f"{self.prefix}.infer.{escape_model(model)}"

    def embed(self, model: str) -> str:
        return f"{self.prefix}.embed.{escape_model(model)}"

    def submit(self, model: str) -> str:
        return f"{self.prefix}.submit.{escape_model(model)}"

    def part(self, upload: str, index: int) -> str:
        return f"{self.prefix}.part.{upload}.{index}"

    def cancel(self, request: str) -> str:
        return f"{self.prefix}.cancel.{request}"

    def resume(self, request: str) -> str:
        return f"{self.prefix}.resume.{request}"

    def result(self, request: str) -> str:
        return f"{self.prefix}.result.{request}"

    def refused(self, token: str) -> str:
        """Where submissions that can never become a request are told; `token` is the escaped model."""
        return f"{self.prefix}.refused.{token}"

    def admin(self, verb: str) -> str:
        return f"{self.prefix}.admin.{verb}"

    def every(self, verb: str) -> str:
        """All subjects of one verb (`infer`, `cancel`, ...), for whoever answers them."""
        return f"{self.prefix}.{verb}.>"

    def last_token(self, subject: str) -> str:
        """What stands behind the verb: the escaped model, the request id, the admin verb."""
        return subject[len(self.prefix) + 1 :].partition(".")[2]

    # liveness
    def heartbeat(self, driver: str) -> str:
        return f"{self.prefix}.heartbeat.{driver}"

    def heartbeats(self) -> str:
        return f"{self.prefix}.heartbeat.>"
