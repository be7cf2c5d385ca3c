"""The child processes of `theriac up`: started, watched, restarted, stopped in order.

Knows: names and command lines; that a child that dies with us is started through `workers.launch`, by its path,
because nothing here may import a worker.
Refuses to know: what the children do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import app

FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# A child that lived this long was not failing to start.
STEADY_SECONDS = 60.0
STOP_SECONDS = 40.0
ROOT = Path(app.__file__).resolve().parent.parent

ReadLine = Callable[[str, bytes], None]


@dataclass(slots=True)
class ManagedProcess:
    """One entry of the tree. `inherited` are file descriptors the child gets."""

    name: str
    command: tuple[str, ...]
    inherited: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    restart_at: float = 0.0
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class ProcessTree:
    """All children of one `theriac up`. Use from the main thread only: children die with the thread that starts them."""

    def __init__(self, processes: list[ManagedProcess], environment: Mapping[str, str], read_line: ReadLine) -> None:
        self.processes = processes
        self._environment = {**environment, "PYTHONPATH": _search_path(environment)}
        self._read_line = read_line

    def start(self) -> None:
        for managed in self.processes:
            self._start(managed)

    def watch(self) -> list[str]:
        """Starts again what has ended, later each time; returns a sentence per change."""
        said = []
        for managed in self.processes:
            if managed.running or managed.process is None:
                if managed.process is None and time.monotonic() >= managed.restart_at:
                    self._start(managed)
                    said.append(f"{managed.name} was started again")
                continue
            code = managed.process.returncode
            if time.monotonic() - managed.started_at > STEADY_SECONDS:
                managed.failures = 0
            wait = min(FIRST_BACKOFF_SECONDS * 2**managed.failures, MAX_BACKOFF_SECONDS)
            managed.failures += 1
            managed.process = None
            managed.restart_at = time.monotonic() + wait
            said.append(f"{managed.name} ended with {code}; it starts again in {wait:g} s")
        return said

    def stop(self, hurry: Callable[[], bool]) -> bool:
        """SIGTERM to all, SIGKILL to whoever stays (at once when `hurry` says so). True when nobody had to be killed."""
        polite = True
        for managed in self.processes:
            _send(managed, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(managed.running for managed in self.processes):
            if time.monotonic() > deadline or hurry():
                polite = False
                for managed in self.processes:
                    _send(managed, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.05)
        for managed in self.processes:
            for reader in managed.readers:
                reader.join(2)
        return polite

    def _start(self, managed: ManagedProcess) -> None:
        launcher = importlib.util.find_spec("workers.launch")
        assert launcher is not None
        assert launcher.origin is not None
        managed.process = subprocess.Popen(
            [sys.executable, "-S", "-E", launcher.origin, str(os.getpid()), "0", "--", *managed.command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=managed.inherited,
            # A session of its own: Ctrl-C in the terminal reaches us alone, and we stop the children in order.
            start_new_session=True,
        )
        managed.started_at = time.monotonic()
        reader = threading.Thread(target=self._read, args=(managed.name, managed.process), daemon=True)
        reader.start()
        managed.readers.append(reader)

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                self._read_line(name, line)


def _send(managed: ManagedProcess, number: signal.Signals) -> None:
    if managed.running and managed.process is not None:
        with contextlib.suppress(ProcessLookupError):
            managed.process.send_signal(number)


def _search_path(environment: Mapping[str, str]) -> str:
    """Children find the same code as we did, installed or not."""
    inherited = environment.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
