"""A snapshot's parts from a copy of this process: the control goes on while its state is encoded.

A fork has the state as it stood, at the price of the page tables: milliseconds, where encoding takes a second once a
cell remembers a hundred thousand requests. The copy encodes, writes to a pipe and ends; it touches nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import warnings

from actors.cell import Cell
from bus.contract import BusError

READ_BYTES = 512 * 1024
SECONDS = 120.0
"""How long the copy may take."""


class CaptureFailed(BusError):
    """The copy of this process did not deliver; a snapshot is tried again later."""


async def capture_in_a_copy(cell: Cell) -> list[bytes]:
    """The parts of a snapshot of the cell as it is at the call. Raises `CaptureFailed`."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The copy runs no other thread's code, takes no lock of theirs, and ends without their cleaning up.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            copy = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            raise CaptureFailed(f"this process cannot be copied: {error.strerror}") from None
    if copy == 0:
        _encode(cell, writing)
    os.close(writing)
    try:
        async with asyncio.timeout(SECONDS):
            parts = await _read(reading)
    except BaseException as error:
        os.kill(copy, signal.SIGKILL)
        os.waitpid(copy, 0)  # noqa: ASYNC222 - it was just killed
        if isinstance(error, TimeoutError):
            raise CaptureFailed(f"the state was not encoded within {SECONDS:g} s") from None
        raise
    # It has closed the pipe, which it does by ending.
    code = os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, copy, 0))[1])
    if code:
        raise CaptureFailed(f"the copy of this process that encoded its state ended with code {code}")
    return parts


def _encode(cell: Cell, writing: int) -> None:
    """In the copy. Never returns."""
    code = 1
    try:
        gc.disable()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        for part in cell.capture():
            view = memoryview(part)
            while view:
                view = view[os.write(writing, view) :]
        code = 0
    finally:
        os._exit(code)


async def _read(reading: int) -> list[bytes]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_BYTES)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
    )
    parts = []
    try:
        while part := await reader.read(READ_BYTES):
            parts.append(part)
    finally:
        transport.close()
    return parts
