"""Starts the embedded service in a throwaway folder and stops it again.

Knows: the commands a person would type (`theriac up`), how to wait for it, and how to end exactly the
process it started.
Refuses to know: anything inside the service; everything after the start goes over HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60
STOP_SECONDS = 30


@dataclass(frozen=True)
class Service:
    """What `theriac up` prints when it is ready."""

    url: str
    api_key: str
    operator_key: str
    home: Path


def environment_of_its_own(**settings: str) -> dict[str, str]:
    """Our environment without the reader's settings: a demo must not touch the database or bucket they name."""
    return {name: value for name, value in os.environ.items() if not name.startswith("THERIAC_")} | settings


@contextmanager
def embedded_service() -> Iterator[Service]:
    """A running service on a free loopback port; its folder is deleted afterwards."""
    home = Path(tempfile.mkdtemp(prefix="theriac-demo-"))
    ready = home / "ready.json"
    try:
        with (home / "service.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up", "--port", "0", "--ready-file", str(ready)],
                env=environment_of_its_own(THERIAC_HOME=str(home)),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield _wait(process, ready, home)
        finally:
            _stop(process)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], ready: Path, home: Path) -> Service:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if ready.exists():
            values = json.loads(ready.read_text())
            return Service(values["url"], values["api_key"], values["operator_key"], home)
        time.sleep(0.1)
    tail = (home / "service.log").read_text(errors="replace")[-4000:]
    raise RuntimeError(f"The service did not start.\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
