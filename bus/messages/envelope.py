"""What every message is, and the two envelopes in which messages stand in the ledger.

A message is a frozen struct with a tag (`kind`): facts are past participles (`model.attached`), effects are
imperatives (`model.attach`), what actors tell each other says what is so (`instance.ready`). The ledger holds JSON:
anybody with a NATS client can read it at 3 a.m.

`FactEnvelope` carries what comes from outside. A driver's fact names its epoch (the ledger sequence of the `started`
that opened it, with the boot id), counts without holes within it from 1, and continues a rolling hash over its
epoch; a fact that stands alone has none of these. `SaidEnvelope` carries what was derived: (fact, index) is its id.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=4096)]
Subject = Annotated[str, Meta(min_length=1, max_length=512)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Positive = Annotated[int, Meta(ge=1, le=2**62)]
Digest = Annotated[str, Meta(max_length=64)]

OUTPUT_LIMIT_BYTES = 900_000
"""Largest payload of a derived message: below the 1 MB that a NATS server takes by default."""


class Message(msgspec.Struct, frozen=True, tag_field="kind", omit_defaults=True):
    """Base of everything that actors receive or say."""


def kind_of(message: Message | type[Message]) -> str:
    """The tag under which a message travels, and the last tokens of its subject."""
    tag = message.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


class To(msgspec.Struct, frozen=True):
    """One output of an actor: who is to receive which message."""

    receiver: str
    message: Message


class FactEnvelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """A fact as it stands in the ledger.

    `sender` is the driver's name, or the process that states it (`intake`, `watch`, `timer`, `operator`).
    `epoch` 0 with a `boot` is a driver's `started`; epoch 0 without one stands alone. `answers` is the number of
    the effect which this fact answers, 0 for none. `chain` is the rolling hash after this fact.
    """

    sender: Name
    body: msgspec.Raw
    epoch: Count = 0
    boot: Annotated[str, Meta(max_length=64)] = ""
    count: Count = 0
    answers: Count = 0
    chain: Digest = ""


class SaidEnvelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """A derived message as it stands in the ledger.

    `fact` and `index` are its id, `of` the number of messages of its step, `cause` the index of the message whose
    handling said it (-1: the fact itself). An effect for a driver names the driver's `epoch` and `boot`, and its
    `number` within the epoch, from 1 without holes; `chain` is the rolling hash over the effects of the epoch.
    """

    fact: Positive
    index: Count
    of: Positive
    body: msgspec.Raw
    cause: Annotated[int, Meta(ge=-1)] = -1
    epoch: Count = 0
    boot: Annotated[str, Meta(max_length=64)] = ""
    number: Count = 0
    chain: Digest = ""


NESTING_LIMIT = 100
"""Brackets within brackets in a record of the ledger: far more than any message has."""

_TEXTS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")
_encoder = msgspec.json.Encoder()
_fact_decoder = msgspec.json.Decoder(FactEnvelope)
_said_decoder = msgspec.json.Decoder(SaidEnvelope)


def encode(message: Any) -> bytes:
    """JSON in field order: equal messages give equal bytes."""
    return _encoder.encode(message)


def _check_nesting(payload: bytes) -> None:
    """How deep a decoder gets depends on its caller's stack: what is too deep is the same for everybody this way."""
    if payload.count(b"[") + payload.count(b"{") <= NESTING_LIMIT:
        return
    depth = 0
    for bracket in _BRACKETS.findall(_TEXTS.sub(b"", payload)):
        depth += 1 if bracket in b"[{" else -1
        if depth > NESTING_LIMIT:
            raise msgspec.DecodeError(f"nested deeper than {NESTING_LIMIT}")


def decode_fact(payload: bytes) -> FactEnvelope:
    """Raises msgspec.DecodeError (ValidationError included) for anything else."""
    _check_nesting(payload)
    return _fact_decoder.decode(payload)


def decode_said(payload: bytes) -> SaidEnvelope:
    """Raises msgspec.DecodeError (ValidationError included) for anything else."""
    _check_nesting(payload)
    return _said_decoder.decode(payload)


def extend_chain(chain: str, body: bytes) -> str:
    """The rolling hash of an epoch after one more body: 16 hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(chain.encode() + body, digest_size=8).hexdigest()
