"""What every test runs under: no network, no warnings, a seed of its own, and real servers on demand.

Knows: how to start PostgreSQL and Redis from test-only wheels, once per test process and only when asked for.
Refuses to know: any table, endpoint or model; builders of those live in the folders that test them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from scripts import local_servers

# Children inherit these: nothing that a test starts may ask a hub for a model.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A developer's own settings must not reach the tests.
for name in [name for name in os.environ if name.startswith("THERIAC_") and name != "THERIAC_TEST_REDIS"]:
    del os.environ[name]


class NetworkBlocked(AssertionError):
    """A test tried to leave this machine."""


def _is_local(host: str | bytes | None) -> bool:
    text = host.decode() if isinstance(host, bytes) else host
    if text in {None, "", "localhost", socket.gethostname()}:
        return True
    try:
        address = ipaddress.ip_address(str(text).split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _guard_address(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, *args: Any) -> Any:
        address = args[-1]
        if self.family in {socket.AF_INET, socket.AF_INET6} and not _is_local(address[0]):
            raise NetworkBlocked(f"tests may not reach {address[0]}: only loopback and Unix sockets are open")
        return original(self, *args)

    return guarded


def _guard_lookup(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: Any, *args: Any, **named: Any) -> Any:
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(str(host))  # a literal address is no question to a name server
            return original(host, *args, **named)
        if not _is_local(host):
            raise NetworkBlocked(f"tests may not look up {host}")
        return original(host, *args, **named)

    return guarded


def pytest_configure(config: pytest.Config) -> None:
    for method in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, method, _guard_address(getattr(socket.socket, method)))
    socket.getaddrinfo = _guard_lookup(socket.getaddrinfo)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """The same random numbers for a test whether it runs alone or after others."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """SQLAlchemy URL of a private PostgreSQL server's database `postgres`. Make your own database beside it."""
    try:
        server = local_servers.postgres()
        url = server.__enter__()
    except local_servers.ServerUnavailable as missing:
        pytest.skip(str(missing))
    _do_not_sync(url)
    try:
        yield url
    finally:
        server.__exit__(None, None, None)


def _do_not_sync(url: str) -> None:
    """A throwaway server need not survive a power cut; syncing dozens of test databases took half a minute."""
    import psycopg

    with psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")


@pytest.fixture(scope="session")
def new_postgres_database(postgres_url: str) -> Callable[[], str]:
    """A function that makes an empty database and returns its URL; all go with the server."""
    url = make_url(postgres_url)

    def create() -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(False), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return url.set(database=name).render_as_string(False)

    return create


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a private Redis server, good for redis-py and as a Celery broker."""
    try:
        server = local_servers.redis()
        url = server.__enter__()
    except local_servers.ServerUnavailable as missing:
        pytest.skip(str(missing))
    try:
        yield url
    finally:
        server.__exit__(None, None, None)
