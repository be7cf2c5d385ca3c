"""The lines of all processes: one readable line each on the terminal, the full JSON in a file that cannot grow for ever.

Knows: the form of structlog's JSON lines. Refuses to know: what is worth logging.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

FILE_BYTES = 10 << 20
FILES = 3
MAX_LINE = 4000
QUIET = frozenset({"event", "level", "timestamp", "logger", "exception", "exc_info"})


class LogSink:
    """Called by one thread per process."""

    def __init__(self, path: Path, echo: Callable[[str], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES)
        self._file.setFormatter(logging.Formatter("%(message)s"))
        self._echo = echo
        self._lock = threading.Lock()

    def __call__(self, process: str, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()[:MAX_LINE]
        if not text:
            return
        fields = parse(text)
        stored = json.dumps({"process": process, **(fields or {"event": text})}, ensure_ascii=False, default=str)
        with self._lock:
            self._file.emit(logging.LogRecord("theriac", logging.INFO, "", 0, stored, None, None))
            if not is_routine(fields):
                self._echo(readable(process, text, fields))

    def close(self) -> None:
        self._file.close()


def parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def is_routine(fields: dict[str, Any] | None) -> bool:
    """A request that went well: clients poll, and a screen full of them hides everything else."""
    status = (fields or {}).get("status")
    return (fields or {}).get("event") == "request" and isinstance(status, int) and status < 400


def readable(process: str, text: str, fields: dict[str, Any] | None) -> str:
    """`12:00:01 worker   info     job.started  attempt=1`; a traceback only by its last line (the file has all)."""
    if fields is None:
        return f"{'':8} {process:<9} {text}"
    clock = str(fields.get("timestamp", ""))[11:19]
    level = str(fields.get("level", ""))
    rest = " ".join(f"{name}={value}" for name, value in fields.items() if name not in QUIET)
    problem = fields.get("exception")
    if isinstance(problem, list) and problem:
        rest += f" {problem[0].get('exc_type')}: {problem[0].get('exc_value')}"
    elif problem:
        rest += " " + str(problem).strip().splitlines()[-1]
    return f"{clock:8} {process:<9} {level:<8} {fields.get('event', '')}  {rest}".rstrip()
