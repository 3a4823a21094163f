"""What every process writes to stderr: text for people, or one JSON object per line (`--log-json`).

All of it has the same fields, whether structlog or the standard library was asked to log:

    timestamp, level, logger, event     when, how bad, which part, what
    process                             control, node s1, gpu/s1/0, gateway
    request                             the request that a line is about: one id through all processes
    driver, epoch, model, reason, ...   as the line has them

Prompts, answers, keys and credentials are never logged: no line takes a body, tracebacks show no variables, and an
address loses the part before its `@`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

QUIET = ("asyncio", "nats", "transformers", "urllib3", "uvicorn")
"""Libraries whose lesser remarks nobody who runs a cell needs."""

TEXT_LIMIT = 8192
"""Characters of one value; a traceback may be as long as that."""

_LOGIN = re.compile(r"(?<=://)[^\s/@]+@")


def configure_logs(*, as_json: bool = False, level: int = logging.INFO, process: str = "") -> None:
    """Send structlog and the standard library's logging to stderr. `process` is the name of this one."""

    def named(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if process:
            event.setdefault("process", process)
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        named,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        last: list[Any] = [structlog.processors.format_exc_info, _harmless, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback  # the other one prints the variables of every frame
        last = [_harmless, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def about(request: str) -> None:
    """Every line that this task logs from now on is about this request."""
    structlog.contextvars.bind_contextvars(request=request)


def _harmless(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            if "@" in value:
                value = _LOGIN.sub("", value)
            event[name] = value if len(value) <= TEXT_LIMIT else value[:TEXT_LIMIT] + "..."
    return event
