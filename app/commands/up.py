"""`theriac up`: the embedded service as one process tree.

Knows: what may go wrong before anything runs (somebody else on the port or on the data folder), the order of start
and stop, and what a person needs to see.
Refuses to know: what the processes do.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from app import setup
from app.commands.logs import LogSink
from app.commands.output import fail
from app.commands.processes import ManagedProcess, ProcessTree
from app.settings import Settings
from app.setup import FirstKeys

BACKLOG = 2048
READY_SECONDS = 60.0
EXIT_TAKEN = 3
EXIT_UNCLEAN = 1


def up(settings: Settings, ready_file: Path | None) -> None:
    """Runs until SIGINT or SIGTERM. Returns after every child has ended."""
    stop = StopSignals()
    with locked(settings.home):
        listener = listen(settings.gateway.host, settings.gateway.port)
        keys = setup.prepare(settings)
        sink = LogSink(settings.home / "logs" / "theriac.log", lambda line: typer.echo(line, err=True))
        tree = ProcessTree(_processes(settings, listener), _environment(settings), sink)
        try:
            tree.start()
            if wait_until_ready(listener, tree, stop):
                announce(settings, listener, keys, ready_file)
                _watch(tree, stop)
        finally:
            polite = tree.stop(lambda: stop.count > 1)
            sink.close()
            listener.close()
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)
    if not polite:
        fail("a process did not stop in time and was killed", code=EXIT_UNCLEAN)
    typer.echo("Theriac has stopped.")


def _watch(tree: ProcessTree, stop: StopSignals) -> None:
    while not stop.asked.wait(0.2):
        for sentence in tree.watch():
            typer.echo(f"theriac: {sentence}", err=True)


class StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP: the first asks to stop, the second to hurry."""

    def __init__(self) -> None:
        self.count = 0
        self.asked = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.count += 1
        self.asked.set()


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """The kernel's lock on a file in the data folder: it is gone with the process that held it, however that ended."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (home / "theriac.lock").open("a+")
    except OSError as error:
        fail(f"the data folder {home} cannot be used: {error.strerror}", code=EXIT_TAKEN)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            fail(f"Theriac already runs on {home} (process {owner}); stop it, or set THERIAC_HOME", code=EXIT_TAKEN)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def listen(host: str, port: int) -> socket.socket:
    """The gateway's listening socket, opened here so that a taken port is one clear line before anything starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        fail(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another port with --port "
            "or THERIAC_GATEWAY__PORT (0 takes a free one)",
            code=EXIT_TAKEN,
        )
    return listener


def _processes(settings: Settings, listener: socket.socket) -> list[ManagedProcess]:
    python = (sys.executable, "-m")
    gateway = (*python, "app.cli", "gateway", "--fd", str(listener.fileno()))
    agents = [
        ManagedProcess(f"worker-{number}" if settings.worker.slots > 1 else "worker", (*python, "workers.agent"))
        for number in range(1, settings.worker.slots + 1)
    ]
    return [
        ManagedProcess("gateway", gateway, inherited=(listener.fileno(),)),
        *agents,
        ManagedProcess("side", (*python, "workers.side")),
    ]


def _environment(settings: Settings) -> dict[str, str]:
    inherited = dict(os.environ)  # room: environ children read the same settings from it as we did
    return {**inherited, "THERIAC_HOME": str(settings.home.resolve()), "PYTHONUNBUFFERED": "1"}


def wait_until_ready(listener: socket.socket, tree: ProcessTree, stop: StopSignals) -> bool:
    """True when the gateway answers; False when a signal came first."""
    deadline = time.monotonic() + READY_SECONDS
    while not _answers(listener):
        if stop.asked.wait(0.1):
            return False
        for sentence in tree.watch():
            typer.echo(f"theriac: {sentence}", err=True)
        if time.monotonic() > deadline:
            fail(f"the gateway did not answer within {READY_SECONDS:.0f} s; see the lines above", code=EXIT_UNCLEAN)
    return True


def _answers(listener: socket.socket) -> bool:
    host, port = listener.getsockname()[:2]
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - named, not bound


def announce(settings: Settings, listener: socket.socket, keys: FirstKeys | None, ready_file: Path | None) -> None:
    """What a person needs now. The keys are shown this once and kept nowhere."""
    host, port = listener.getsockname()[:2]
    shown = _reachable(host)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    lines = [f"Theriac answers at {url}", f"  data in       {settings.home}"]
    if keys is not None:
        lines += [
            f"  API key       {keys.api_key}",
            f"  operator key  {keys.operator_key}",
            "  Both keys are shown this once; `theriac keys create` makes another.",
        ]
    else:
        lines.append("  keys          as before; `theriac keys create` makes another")
    lines += [f'  OpenAI(base_url="{url}/v1", api_key=…)', "Ctrl-C stops it."]
    typer.echo("\n".join(lines))
    if ready_file is not None:
        facts = {
            "url": url,
            "api_key": keys.api_key if keys else None,
            "operator_key": keys.operator_key if keys else None,
            "pid": os.getpid(),
        }
        temporary = ready_file.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(facts))
        temporary.rename(ready_file)
