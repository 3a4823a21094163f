"""The threads of a disk: what is read first, and that checking what was read keeps nobody from reading."""

from __future__ import annotations

import threading

import pytest

from loaders import read_threads
from loaders.read_threads import CHECKS_AT_ONCE, PREFETCH, URGENT, Check, ReadThreads

LONG = 30.0


def test_others_read_on_while_a_piece_is_checked() -> None:
    readers = ReadThreads(CHECKS_AT_ONCE + 1)
    pieces = 4 * CHECKS_AT_ONCE
    checks_may_end, all_read = threading.Event(), threading.Event()
    done: list[int] = []
    submitted, checked = threading.Event(), threading.Semaphore(0)

    def read(number: int) -> Check:
        submitted.wait(LONG)
        done.append(number)
        if len(done) == pieces:
            all_read.set()

        def check() -> None:
            checks_may_end.wait(LONG)
            checked.release()

        return check

    for number in range(pieces):
        readers.submit(URGENT, lambda number=number: read(number))  # type: ignore[misc]
    submitted.set()
    assert all_read.wait(LONG), "a thread waited for its turn to check"
    checks_may_end.set()
    for _ in range(pieces):
        assert checked.acquire(timeout=LONG)
    readers.close()


def test_what_was_read_is_checked_before_more_is_read_the_urgent_first() -> None:
    readers = ReadThreads(1)
    order: list[str] = []
    gate, ended = threading.Event(), threading.Event()

    def piece(name: str) -> Check:
        order.append(f"read {name}")
        return lambda: order.append(f"check {name}")

    def last() -> None:
        ended.set()

    readers.submit(URGENT, lambda: gate.wait(LONG) and None)
    readers.submit(PREFETCH, lambda: piece("prefetch"))
    readers.submit(URGENT, lambda: piece("urgent"))
    readers.submit(PREFETCH + 1, last)
    gate.set()
    assert ended.wait(LONG)
    assert order == ["read urgent", "check urgent", "read prefetch", "check prefetch"]
    readers.close()


def test_with_nothing_left_to_read_all_cores_check(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = CHECKS_AT_ONCE + 1
    monkeypatch.setattr(read_threads, "CORES", cores)
    readers = ReadThreads(cores)
    all_read, all_check = threading.Barrier(cores), threading.Barrier(cores)
    ended = threading.Semaphore(0)

    def read() -> Check:
        all_read.wait(LONG)
        return check

    def check() -> None:
        all_check.wait(LONG)
        ended.release()

    for _ in range(cores):
        readers.submit(URGENT, read)
    for _ in range(cores):
        assert ended.acquire(timeout=LONG), "a core was left idle"
    readers.close()
