"""An event loop whose clock is a number: when nothing is ready, it jumps to the next timer.

A simulated day passes in the time that its callbacks take, and the same program gives the same run: callbacks run in
the order in which they were scheduled, timers in the order of their times and, at equal times, of their creation.
There are no sockets, signals, threads or child processes here; whoever asks for one gets an error.

    run(main())                       # as asyncio.run, in virtual time from 0 on
    new_loop(limit_seconds=60.0)      # bounds on virtual time and callbacks, for runs that might never end
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from asyncio import events
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, NoReturn, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STEPS_LIMIT = 20_000_000


class Deadlock(Exception):
    """Nothing is ready and no timer is set, but the main task has not ended."""


class OutOfTime(Exception):
    """The bound on virtual time or on callbacks is reached before the main task has ended."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """See the head of this file. `errors` holds what callbacks raised, in order."""

    def __init__(self, *, limit_seconds: float = float("inf"), limit_steps: int = STEPS_LIMIT) -> None:
        self.errors: list[BaseException] = []
        self.steps = 0
        self._limit_seconds = limit_seconds
        self._limit_steps = limit_steps
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._created = 0
        self._running = False
        self._closed = False

    # ---- time and callbacks -----------------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._created += 1
        heapq.heappush(self._timers, (when, self._created, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when their time comes; time does not stop at them."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        # Without a name a task takes the next number of this process: not the same in every run.
        return asyncio.Task(coro, loop=self, name=name or "task", context=context)

    # ---- running ----------------------------------------------------------------------------------------------

    def run_until_complete(self, future: Awaitable[T] | Generator[Any, None, T]) -> T:
        """The result of `future`. Raises `Deadlock` and `OutOfTime`."""
        task: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)  # type: ignore[arg-type]
        before = events._get_running_loop()
        events._set_running_loop(self)
        self._running = True
        try:
            while not task.done():
                self._turn()
        finally:
            self._running = False
            events._set_running_loop(before)
        return task.result()

    def _turn(self) -> None:
        """Jump to the next timer if nothing is ready; then run what is ready, and nothing that becomes so by that."""
        timers = self._timers
        if not self._ready:
            self._jump()
        while timers and timers[0][0] <= self._now:
            timer = heapq.heappop(timers)[2]
            if not timer.cancelled():
                self._ready.append(timer)
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                self.steps += 1
                handle._run()
        if self.steps > self._limit_steps:
            raise OutOfTime(f"{self.steps} callbacks have run by {self._now:.3f} s of virtual time, without an end")

    def _jump(self) -> None:
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers:
            raise Deadlock(f"at {self._now:.3f} s of virtual time everybody waits, and no timer is set")
        if timers[0][0] > self._limit_seconds:
            raise OutOfTime(f"{self._limit_seconds:g} s of virtual time have passed without an end")
        self._now = max(self._now, timers[0][0])

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Nothing scheduled runs any more."""
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    # ---- what asyncio asks of a loop --------------------------------------------------------------------------

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        pass

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Notes what a callback raised. What the garbage collector tells is left out: it comes at no certain time."""
        error = context.get("exception")
        if "handle" in context and error is not None:
            self.errors.append(error)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    async def shutdown_asyncgens(self) -> None:
        pass

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        pass

    def call_soon_threadsafe(self, *args: Any, **_: Any) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("a simulated world has no threads")

    def run_in_executor(self, *args: Any, **_: Any) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("a simulated world has no threads")


def new_loop(*, limit_seconds: float = float("inf"), limit_steps: int = STEPS_LIMIT) -> VirtualLoop:
    """A loop with virtual time. What else asyncio's loops can do raises NotImplementedError here."""
    return VirtualLoop(limit_seconds=limit_seconds, limit_steps=limit_steps)  # type: ignore[abstract]


def run(main: Coroutine[Any, Any, T], *, limit_seconds: float = float("inf"), limit_steps: int = STEPS_LIMIT) -> T:
    """Run a coroutine to its end in virtual time, beginning at 0. For the bounds see `VirtualLoop`.

    Raises the first error of a callback, too: nobody else would see it.
    """
    loop = new_loop(limit_seconds=limit_seconds, limit_steps=limit_steps)
    try:
        result = loop.run_until_complete(main)
    finally:
        loop.close()
    if loop.errors:
        raise loop.errors[0]
    return result
