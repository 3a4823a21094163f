"""`longshore bench handoff`: what the reader of an answer sees while it moves from one worker to another.

Real processes: nats-server, one control, one node with two workers of one thread each, and a sample model. Each answer
has a prompt of the wanted length and moves once. Its gap is the longest time between two of its chunks from the moment
at which the move is asked for until well after the hand-over. The median step is that between the chunks that came
while the destination computed, from the source. The same on a node whose workers do not catch up (stop and
recompute): there the source is let go first, and the destination computes everything after that.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from actors.moves_watch import watch_moves
from actors.up import CellProcesses, UpOptions
from bus.client import Client
from bus.contract import Record
from bus.errors import UserError
from bus.jetstream import JetStreamBus
from bus.log_reading import read_to_end
from bus.messages import (
    FactEnvelope,
    MigrateRequested,
    MoveEnded,
    RoundFinished,
    decode_fact,
    decode_fact_body,
    encode,
    kind_of,
)
from bus.subjects import FactSubject, Subjects, escape_model

CELL = "bench"
MODEL = "llama"
WORKERS = ("gpu/s1/0", "gpu/s1/1")
CONTEXT = 4096
CALM_TOKENS = 12
BEHIND_TOKENS = 24
MAX_TOKENS = 1500
MOVE_SECONDS = 240.0
MOVE_KINDS = (
    "migrate.requested", "move.describe", "move.described", "slot.want", "slot.kept", "heir.introduced",
    "sequence.follow", "round.finished", "sequence.caught-up", "heir.ready", "heir.named", "handover.order",
    "sequence.hand-over", "hand-over.taken", "sequence.released", "sequence.handed-over", "heir.go-on",
    "sequence.resume", "slot.taken", "move.over", "move.started", "move.ended",
)  # fmt: skip


async def bench_handoff(
    contexts: list[int], rounds: int, parameters: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Both ways in one run; rows of `contexts` in order."""
    from loaders import pack_checkpoint
    from models.sample import make_sample

    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as name:
        folder = Path(name)
        say(f"making a model of {parameters:,} parameters")
        sample = await asyncio.to_thread(
            make_sample, folder / "sample", arch="llama", parameters=parameters, seed=7, context=CONTEXT
        )
        found: dict[str, Any] = {"parameters": sample.parameters, "rounds": rounds}
        for way, arguments in (("moved", ()), ("recomputed", ("--no-catch-up",))):
            data = folder / way
            (data / "models").mkdir(parents=True)
            await asyncio.to_thread(pack_checkpoint, folder / "sample", data / "models" / escape_model(MODEL))
            found[way] = await _way(data, arguments, contexts, rounds, sample.vocabulary, say)
    return found


async def _way(
    data: Path,
    arguments: tuple[str, ...],
    contexts: list[int],
    rounds: int,
    vocabulary: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    node = ("--threads", "1", "--context", str(CONTEXT), *arguments)
    options = UpOptions(data=data, cell=CELL, nodes=1, workers=2, memory="3GB", slots=4, node_arguments=node)
    async with CellProcesses(options) as cell:
        bus = await JetStreamBus.connect(cell.url, CELL, name="longshore-bench", create=True)
        try:
            await cell.ready(bus)
            bench = _Bench(bus, vocabulary)
            await bench.move(64)  # brings the model to both workers
            await bench.move(64)
            rows = []
            for context in contexts:
                say(f"{data.name}: {context} tokens")
                rows.append(_summed(context, [await bench.move(context) for _ in range(rounds)]))
            return rows
        finally:
            await bus.close()


class _Bench:
    def __init__(self, bus: JetStreamBus, vocabulary: int) -> None:
        self._bus, self._vocabulary = bus, vocabulary
        self._random = Random(7)

    async def move(self, context: int) -> dict[str, Any]:
        """One answer that moves once; it is cancelled when enough is seen."""
        bus, subjects = self._bus, Subjects(CELL)
        prompt = [self._random.randrange(8, self._vocabulary) for _ in range(context)]
        times: list[float] = []
        started, ended = asyncio.Event(), asyncio.Event()
        behind: list[int] = []

        async def read() -> None:
            client = Client(bus, CELL, name="bench")
            answer = client.infer(MODEL, tokens=prompt, max_tokens=MAX_TOKENS, seed=1, cancel_on_close=True)
            async for _ in answer:
                times.append(time.perf_counter())
                if len(times) > CALM_TOKENS:
                    started.set()
                if ended.is_set():
                    behind.append(1)
                    if len(behind) > BEHIND_TOKENS:
                        break
            started.set()
            await answer.aclose()

        async with asyncio.timeout(MOVE_SECONDS):
            reading = asyncio.ensure_future(read())
            await started.wait()
            if reading.done():
                await reading
                raise UserError("an answer of the bench ended before it could move: ask for fewer tokens")
            first = (await bus.ledger.usage()).last_sequence
            asked = time.perf_counter()
            message = MigrateRequested(model=MODEL)
            payload = encode(FactEnvelope("operator", msgspec.Raw(encode(message))))
            fact = await bus.ledger.append(subjects.fact("migration", kind_of(message)), payload)
            moves = [one async for one in watch_moves(bus, subjects, fact.sequence)]
            ended.set()
            await reading
        records = await read_to_end(bus.ledger, first + 1)
        return _seen(context, times, asked, moves, records)


def _seen(
    context: int, times: list[float], asked: float, moves: list[MoveEnded], records: list[Record]
) -> dict[str, Any]:
    if len(moves) != 1 or not moves[0].moved:
        raise UserError(f"an answer of the bench did not move: {moves[0].reason if moves else 'nothing ran'}")
    rounds: list[RoundFinished] = []
    at: dict[str, int] = {}
    size = 0
    for record in records:
        kind = ".".join(record.subject.rsplit(".", 2)[1:])
        if kind not in MOVE_KINDS:
            continue
        size += len(record.payload)
        at.setdefault(kind, record.timestamp)
        if kind == "round.finished" and isinstance(Subjects(CELL).parse(record.subject), FactSubject):
            message = decode_fact_body(decode_fact(record.payload).body)
            assert isinstance(message, RoundFinished)
            rounds.append(message)
    gaps = [(later - before, before) for before, later in itertools.pairwise(times) if later >= asked]
    gap, gap_began = max(gaps)
    # Until the gap began, chunks came from the source.
    during = [length for length, before in gaps if before < gap_began] or [length for length, _ in gaps]
    calm = [later - before for before, later in itertools.pairwise(times) if later < asked]
    order = ("sequence.caught-up", "sequence.hand-over", "sequence.released", "sequence.resume")
    return {
        "gap_ms": gap * 1000,
        "step_ms": statistics.median(during) * 1000,
        "calm_step_ms": statistics.median(calm) * 1000,
        "move_ms": moves[0].elapsed_ns / 1e6,
        "rounds": len(rounds),
        "caught_up_tokens": sum(one.next - one.first for one in rounds[1:]),
        "ledger_bytes": size,
        "stages_ms": {
            f"{one} > {other}": round((at[other] - at[one]) / 1e6, 2)
            for one, other in itertools.pairwise(order)
            if one in at and other in at
        },
    }


def _summed(context: int, moves: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(moves, key=lambda one: one["gap_ms"])
    step = statistics.median(one["step_ms"] for one in moves)
    return {
        "context": context,
        "gap_ms": {
            "median": round(statistics.median(one["gap_ms"] for one in moves), 1),
            "max": round(longest["gap_ms"], 1),
        },
        "step_ms": round(step, 1),
        "calm_step_ms": round(statistics.median(one["calm_step_ms"] for one in moves), 1),
        "steps": round(statistics.median(one["gap_ms"] / one["step_ms"] for one in moves), 2),
        "steps_max": round(max(one["gap_ms"] / one["step_ms"] for one in moves), 2),
        "move_ms": round(statistics.median(one["move_ms"] for one in moves), 1),
        "catch_up_rounds": min(max(0, one["rounds"] - 1) for one in moves),
        "caught_up_tokens": min(one["caught_up_tokens"] for one in moves),
        "ledger_bytes": max(one["ledger_bytes"] for one in moves),
        "stages_ms_of_longest": longest["stages_ms"],
    }
