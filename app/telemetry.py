"""Logs: one JSON line per fact, with the request's id on every line of that request.

Knows: the line's form, the current request id, and which fields never leave the process.
Refuses to know: what is worth logging, and any content a customer sent.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

import structlog
import structlog.tracebacks
import structlog.typing

from app.kit.ids import new_id

# Anything else a client sends as a request id could forge log lines or reach 64 kB.
ACCEPTED_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
SECRET_FIELDS = frozenset({"authorization", "api_key", "secret", "signing_secret", "password", "content", "messages"})

request_id: ContextVar[str] = ContextVar("request_id", default="")


def choose_request_id(offered: str) -> str:
    """The client's id when it is harmless, else one of ours."""
    return offered if ACCEPTED_REQUEST_ID.fullmatch(offered) else new_id("req_")


def configure(level: str) -> None:
    """Sends structlog's and the standard library's lines to stderr as JSON."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Without locals: they hold keys, rows and whatever else was in hand.
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
        _add_request_id,
        _redact,
    ]
    renderer = structlog.processors.JSONRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [output]
    root.setLevel(level.upper())
    # Access lines carry the query string, which may hold a customer's metadata; ours carry the route only.
    logging.getLogger("uvicorn.access").disabled = True
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _add_request_id(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    current = request_id.get()
    if current:
        line.setdefault("request_id", current)
    return line


def _redact(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for field in SECRET_FIELDS & line.keys():
        line[field] = "[redacted]"
    return line
