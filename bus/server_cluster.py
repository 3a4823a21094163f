"""Three real nats-servers as children of this process, as one cluster: for tests and benchmarks on one machine."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from bus.contract import BusError
from bus.jetstream import JetStreamBus
from bus.jetstream_api import stream_info
from bus.server import EmbeddedServer, ServerError

READY_SECONDS = 20.0
_LOOK_SECONDS = 0.05


class EmbeddedCluster:
    """`size` servers in `folder`, on free ports that they keep. Use it as an asynchronous context manager.

    Its methods are those of one server, for one of them or for all; `leader` says which one leads a stream.
    """

    def __init__(self, folder: Path | str, *, size: int = 3, fsync_always: bool = False) -> None:
        # All at once: a port that is given back is given out again.
        held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2 * size)]
        ports = [one.getsockname()[1] for one in held]
        for one in held:
            one.close()
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports[size:])
        self.servers = [
            EmbeddedServer(
                Path(folder) / f"n{number + 1}",
                port=ports[number],
                fsync_always=fsync_always,
                name=f"n{number + 1}",
                extra=f'cluster {{ name: longshore, listen: "127.0.0.1:{ports[size + number]}", routes: [{routes}] }}',
            )
            for number in range(size)
        ]

    @property
    def url(self) -> str:
        """All addresses."""
        return ",".join(server.url for server in self.servers)

    def server(self, name: str) -> EmbeddedServer:
        return next(server for server in self.servers if server.name == name)

    async def leader(self, bus: JetStreamBus, stream: str) -> EmbeddedServer:
        """The server that leads a stream. Waits while none does; raises `ServerError` when that takes too long."""
        limit = asyncio.get_running_loop().time() + READY_SECONDS
        while asyncio.get_running_loop().time() < limit:
            try:
                name = ((await stream_info(bus.raw, stream)).get("cluster") or {}).get("leader")
                if name:
                    return self.server(name)
            except BusError:
                pass
            await asyncio.sleep(_LOOK_SECONDS)
        raise ServerError(f"no server leads {stream} after {READY_SECONDS:g} s")

    async def followed(self, bus: JetStreamBus, stream: str) -> None:
        """Until every other server has all that the leader of a stream has. Raises `ServerError` as `leader` does."""
        limit = asyncio.get_running_loop().time() + READY_SECONDS
        while asyncio.get_running_loop().time() < limit:
            try:
                followers = (await stream_info(bus.raw, stream))["cluster"].get("replicas") or []
                if len(followers) == len(self.servers) - 1 and all(
                    one.get("current") and not one.get("offline") and not one.get("lag") for one in followers
                ):
                    return
            except BusError:
                pass
            await asyncio.sleep(_LOOK_SECONDS)
        raise ServerError(f"the followers of {stream} are behind after {READY_SECONDS:g} s")

    async def start_async(self) -> None:
        await asyncio.gather(*(server.start_async() for server in self.servers))

    def stop(self) -> None:
        """End them all with force: a clean end hands over every stream first, and takes seconds for it."""
        for server in self.servers:
            server.kill()
            server.stop()

    async def __aenter__(self) -> EmbeddedCluster:
        try:
            await self.start_async()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)
