"""The gateway on both databases, with a customer, another customer, an operator, a base model and a policy.

`product` is the whole; the other fixtures are the parts a test names. Nothing here is faked: requests go through the
ASGI application, rows through the services.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from structlog.testing import capture_logs

from app.main import create_app
from app.settings import GatewaySettings, Settings
from app.storage import Storage, open_storage
from tests.app.product import Product, ask_as, build
from tests.databases import engine, postgres_with_tables

__all__ = ["engine", "postgres_with_tables"]


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    """Every log line of the test, instead of on the terminal."""
    with capture_logs() as lines:
        yield lines


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """One application for all tests; each test gives it its own database and store."""
    home = tmp_path_factory.mktemp("gateway")
    app = create_app(Settings(home=home, gateway=GatewaySettings(max_file_bytes=4 << 20)))
    app.state.engine.dispose()
    return app


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(Settings(home=tmp_path / "home"))


@pytest.fixture
def product(gateway: FastAPI, engine: Engine, storage: Storage) -> Product:
    gateway.state.engine = engine
    gateway.state.storage = storage
    return build(gateway, engine, storage)


@pytest.fixture
def client(product: Product) -> TestClient:
    """The first customer."""
    return ask_as(product, product.api_key)


@pytest.fixture
def stranger(product: Product) -> TestClient:
    """A customer with another project in another organization."""
    return ask_as(product, product.other_key)


@pytest.fixture
def operator(product: Product) -> TestClient:
    return ask_as(product, product.operator_key)


@pytest.fixture
def anybody(product: Product) -> TestClient:
    return ask_as(product, None)


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Runs an application in a real server on loopback and returns its URL."""
    started: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        started.append((server, thread))
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
