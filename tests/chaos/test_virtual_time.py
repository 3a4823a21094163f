"""The loop with virtual time: jumps, order, bounds, and nothing of the real world."""

from __future__ import annotations

import asyncio
import time

import pytest

from chaos.virtual_time import Deadlock, OutOfTime, run


def test_a_day_passes_in_a_moment() -> None:
    async def main() -> float:
        await asyncio.sleep(24 * 3600)
        return asyncio.get_running_loop().time()

    started = time.perf_counter()
    assert run(main()) == 24 * 3600
    assert time.perf_counter() - started < 1.0


def test_timers_fire_by_time_and_at_equal_times_by_age() -> None:
    async def main() -> list[str]:
        seen: list[str] = []
        loop = asyncio.get_running_loop()
        for name in "abcdefgh":
            loop.call_at(1.0, seen.append, name)
        loop.call_at(0.5, seen.append, "early")
        loop.call_later(1.0, seen.append, "last").cancel()
        await asyncio.sleep(2.0)
        return seen

    assert run(main()) == ["early", *"abcdefgh"]


def test_timeouts_events_and_queues_work() -> None:
    async def main() -> tuple[float, int]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3.0):
                await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get(), 2.0)
        loop.call_later(1.0, queue.put_nowait, 7)
        return loop.time(), await queue.get()

    assert run(main()) == (5.0, 7)


def test_everybody_waiting_is_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.sleep(1.0)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match=r"1\.000 s"):
        run(main())


def test_time_and_steps_are_bounded() -> None:
    async def sleeper() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1.0)

    async def spinner() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(OutOfTime, match="60 s"):
        run(sleeper(), limit_seconds=60.0)
    with pytest.raises(OutOfTime, match="callbacks"):
        run(spinner(), limit_steps=1000)


def test_there_are_no_threads_and_no_sockets() -> None:
    async def thread() -> None:
        await asyncio.to_thread(print)

    async def socket() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    with pytest.raises(RuntimeError, match="no threads"):
        run(thread())
    with pytest.raises(NotImplementedError):
        run(socket())


def test_what_a_callback_raises_is_not_lost() -> None:
    async def main() -> None:
        def fail() -> None:
            raise ValueError("seen")

        asyncio.get_running_loop().call_soon(fail)
        await asyncio.sleep(1.0)

    with pytest.raises(ValueError, match="seen"):
        run(main())
