"""What a gateway is told at its start, and the bounds of what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.credentials import ConnectionOptions
from bus.gateway.keys import ApiKeys

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Times in seconds, sizes in bytes.

    `requests` are handled at once, over `connections` at most; what comes beyond is refused. `silence_seconds` is how
    long a stream says nothing before it says that it is alive. `stall_seconds` is how long a reader may take nothing of
    what waits for it. `grace_seconds` is what open answers get when the gateway is told to end.
    """

    nats: ConnectionOptions | str
    cell: str = "main"
    host: str = "127.0.0.1"
    port: int = 8000
    keys: ApiKeys = field(default_factory=ApiKeys)
    requests: int = 4096
    connections: int = 16384
    body_limit_bytes: int = 12 * MIB
    bodies_limit_bytes: int = 256 * MIB
    head_limit_bytes: int = 32 * 1024
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    silence_seconds: float = 10.0
    stall_seconds: float = 30.0
    grace_seconds: float = 30.0
