"""One seed from world to verdict."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from chaos.aftermath import judge, run_digest
from chaos.options import Options, draw
from chaos.promises import Promise, Violation
from chaos.virtual_time import Deadlock, OutOfTime, new_loop
from chaos.world import World

LIMIT_SECONDS = 600.0
Say = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one seed. `events` are (virtual seconds, what happened); `seconds` are real ones.

    `deaths`: those during moves, counted by chaos.deaths.Tally.
    """

    options: Options
    violations: tuple[Violation, ...]
    digest: str
    events: tuple[tuple[float, str], ...]
    records: int
    pages: int
    requests: int
    virtual_seconds: float
    quiet_after: float
    seconds: float
    moves: int = 0
    deaths: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.violations

    @property
    def seed(self) -> int:
        return self.options.seed

    def rerun(self) -> str:
        return f"longshore chaos run --seed {self.seed} --trace"

    def as_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "passed": self.passed,
            "digest": self.digest,
            "violations": [{"promise": v.promise.name, "at": round(v.at, 6), "text": v.text} for v in self.violations],
            "records": self.records,
            "pages": self.pages,
            "requests": self.requests,
            "virtual_seconds": round(self.virtual_seconds, 6),
            "options": self.options.as_dict(),
            "events": [[round(at, 6), text] for at, text in self.events],
            "rerun": self.rerun(),
        }


def run_seed(seed: int, say: Say | None = None) -> Verdict:
    """Run the world of a seed; `say` is told of every event, record and log line."""
    return run_world(draw(seed), say)


def run_world(
    options: Options, say: Say | None = None, *, make: Callable[[Options, Say | None], World] = World
) -> Verdict:
    """Run a world; `make` may make one of its own kind."""
    started = time.perf_counter()
    loop = new_loop(limit_seconds=LIMIT_SECONDS)
    world = loop.run_until_complete(_make(options, say, make))
    with _listening(world, say):
        try:
            loop.run_until_complete(world.run())
        except (Deadlock, OutOfTime) as stuck:
            world.violations.add(Promise.QUIET, loop.time(), f"{stuck}; {world.unquiet()}")
        for error in loop.errors:
            world.violations.add(Promise.NO_FAILURE, loop.time(), f"a callback raised {type(error).__name__}: {error}")
        judge(world)
    virtual = loop.time()
    loop.close()
    return Verdict(
        options=options,
        violations=tuple(world.violations.found),
        digest=run_digest(world),
        events=tuple(world.events),
        records=len(world.observer.records),
        pages=len(world.observer.pages),
        requests=len(world.applications),
        virtual_seconds=virtual,
        quiet_after=world.quiet_after,
        seconds=time.perf_counter() - started,
        moves=world.phases.moves,
        deaths=world.deaths.tally.as_dict(),
    )


async def _make(options: Options, say: Say | None, make: Callable[[Options, Say | None], World]) -> World:
    return make(options, say)


@contextmanager
def _listening(world: World, say: Say | None) -> Iterator[None]:
    """What the shells log goes to `say`; an exception that they log is a violation. Undone at the end."""
    clock = world.now

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info is not None and record.exc_info[1] is not None:
                error = record.exc_info[1]
                text = f"{record.getMessage()}: {type(error).__name__}: {error}"
                world.violation(Promise.NO_FAILURE, text)
            elif say is not None:
                say(clock(), record.getMessage())

    def structured(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
        if say is not None:
            say(clock(), " ".join(f"{name}={value}" for name, value in event.items()))
        raise structlog.DropEvent

    logger = logging.getLogger("longshore")
    handler = Handler()
    before = logger.level, logger.propagate, structlog.get_config()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if say is not None else logging.ERROR)
    logger.propagate = False
    structlog.configure(processors=[structured], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before[0], before[1]
        structlog.configure(**before[2])
