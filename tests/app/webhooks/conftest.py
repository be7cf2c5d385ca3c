"""A receiver of webhooks as a real HTTP server on loopback, and what a delivery needs around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import Engine

from app import outbox
from app.database import unit_of_work
from app.domain.events import Topic
from app.settings import WebhookSettings
from app.tables.webhooks import WebhookEndpoint
from app.webhooks import service
from tests.databases import engine, new_project, postgres_with_tables

__all__ = ["engine", "new_project", "postgres_with_tables"]


@dataclass
class Receiver:
    """`answers` are the statuses of the next requests, then 200 for ever."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    drip: bool = False
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            state.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(state.answers.pop(0) if state.answers else 200)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.end_headers()
            # A kind of body that never ends: each byte arrives well within any per-read timeout.
            while state.drip:
                self.wfile.write(b".")
                time.sleep(0.05)
            self.wfile.write(b"x" * 1000)

        def log_message(self, *_: Any) -> None:
            return None

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            return None  # the sender hangs up on the endless ones, as it should

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    yield state
    state.drip = False
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def settings() -> WebhookSettings:
    """A closed network's switches, and a schedule that does not wait."""
    return WebhookSettings(
        allow_private=True, allow_http=True, timeout_seconds=1.0, retry_schedule_seconds=(0, 0, 0), poll_seconds=0.05
    )


@pytest.fixture
def new_endpoint(engine: Engine, new_project: Callable[[str], str]) -> Callable[..., WebhookEndpoint]:
    known: set[str] = set()

    def create(url: str, *event_types: str, project_id: str = "proj_a") -> WebhookEndpoint:
        if project_id not in known:
            known.add(new_project(project_id))
        with unit_of_work(engine) as session:
            return service.create(session, project_id, name="ci", url=url, event_types=event_types)

    return create


@pytest.fixture
def happen(engine: Engine) -> Callable[..., str]:
    """Records a fact and returns its event's id."""

    def record(topic: Topic = Topic.JOB_SUCCEEDED, subject_id: str = "ftjob-1", project_id: str = "proj_a") -> str:
        with unit_of_work(engine) as session:
            return outbox.record(session, project_id=project_id, subject_id=subject_id, topic=topic).id

    return record
