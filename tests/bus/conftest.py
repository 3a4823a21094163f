"""The `world` fixture: each contract test once in memory, once on a real server."""

from __future__ import annotations

import pytest
from bus_worlds import JetStreamTestWorld, MemoryTestWorld, World


@pytest.fixture(params=["memory", "jetstream"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "memory":
        return MemoryTestWorld()
    return JetStreamTestWorld(request.getfixturevalue("nats_server"))
