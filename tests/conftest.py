"""What all tests share: coroutines as tests, and one real NATS server per session."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import pytest

from bus.server import EmbeddedServer

ASYNC_TEST_SECONDS = 60


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests in a loop of their own, with a time limit."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def limited() -> None:
        async with asyncio.timeout(ASYNC_TEST_SECONDS):
            await pyfuncitem.obj(**arguments)

    asyncio.run(limited())
    return True


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A real server that all tests share: use a cell of your own, and do not stop it."""
    with EmbeddedServer(tmp_path_factory.mktemp("nats")) as server:
        yield server
