"""The doorbell: heard after the commit only, silent when nothing is configured, harmless when it fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import redis as redis_client
from sqlalchemy import Engine, text

from app import doorbell
from app.database import unit_of_work
from app.settings import Settings, get_settings


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr(doorbell, "ring", heard.append)
    return heard


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test choose the broker by THERIAC_REDIS_URL."""
    yield monkeypatch
    get_settings.cache_clear()


def test_rings_once_per_queue_after_the_commit(engine: Engine, rung):
    with unit_of_work(engine) as session:
        session.execute(text("SELECT 1"))
        doorbell.ring_after_commit(session, "tuning")
        doorbell.ring_after_commit(session, "tuning")
        doorbell.ring_after_commit(session, "webhooks")
        assert rung == []
    assert rung == ["tuning", "webhooks"]


def test_a_rollback_is_not_rung(engine: Engine, rung):
    with pytest.raises(RuntimeError), unit_of_work(engine) as session:
        session.execute(text("SELECT 1"))
        doorbell.ring_after_commit(session, "tuning")
        raise RuntimeError("no")
    assert rung == []


def test_a_savepoint_does_not_ring_early(engine: Engine, rung):
    with unit_of_work(engine) as session:
        with session.begin_nested():
            doorbell.ring_after_commit(session, "tuning")
        assert rung == []
    assert rung == ["tuning"]


def test_without_a_broker_a_ring_is_silent(broker):
    broker.delenv("THERIAC_REDIS_URL", raising=False)
    get_settings.cache_clear()
    doorbell.ring("tuning")
    assert Settings().redis_url is None


def test_a_dead_broker_costs_little_and_only_once(broker):
    broker.setenv("THERIAC_REDIS_URL", "redis://127.0.0.1:1/0")
    get_settings.cache_clear()
    started = time.monotonic()
    doorbell.ring("tuning")
    first = time.monotonic() - started
    for _ in range(50):
        doorbell.ring("tuning")
    assert first < 3
    assert time.monotonic() - started < first + 0.5, "a broker that just failed is not asked again"


def test_the_message_says_only_look_and_expires(broker, redis_url):
    broker.setenv("THERIAC_REDIS_URL", redis_url)
    broker.setenv("THERIAC_WORKER__SIDE_QUEUE", "side")
    get_settings.cache_clear()
    client = redis_client.Redis.from_url(redis_url)
    client.delete("theriac.tuning", "theriac.side")
    doorbell.ring("tuning")
    doorbell.ring("webhooks")
    [message] = client.lrange("theriac.tuning", 0, -1)
    envelope = json.loads(message)
    assert envelope["headers"]["task"] == "theriac.wake"
    assert envelope["headers"]["argsrepr"] == "['tuning']"
    assert envelope["headers"]["expires"] is not None
    assert client.llen("theriac.side") == 1
    client.delete("theriac.tuning", "theriac.side")


def test_a_queue_that_nobody_serves_is_not_filled(broker, redis_url):
    broker.setenv("THERIAC_REDIS_URL", redis_url)
    get_settings.cache_clear()
    client = redis_client.Redis.from_url(redis_url)
    before = client.dbsize()
    doorbell.ring("webhooks")
    doorbell.ring("validation")
    assert client.dbsize() == before
