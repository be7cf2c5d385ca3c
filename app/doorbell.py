"""The doorbell: tells waiting workers to look at the database now, instead of at their next poll.

Knows: that a ring says only "look", so that a lost, late or doubled one changes nothing, and that it may
only sound after the commit that made something worth looking at.
Refuses to know: what there is to see.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

import structlog
from sqlalchemy import event
from sqlalchemy.orm import Session

from app.settings import get_settings

log = structlog.get_logger(__name__)

RING_EXPIRES_SECONDS = 60
# A broker that just failed is left alone this long: a gateway must not wait for it once per request, and
# the reconciler rings again anyway.
QUIET_SECONDS = 5.0
_INFO_KEY = "theriac.rings"


class Bell(StrEnum):
    """Whom to wake."""

    TUNING = "tuning"
    VALIDATION = "validation"
    WEBHOOKS = "webhooks"


class TaskName(StrEnum):
    """Every Celery task there is; `workers.tasks` holds exactly these."""

    WAKE = "theriac.wake"
    WEBHOOKS = "theriac.webhooks"
    SWEEP = "theriac.sweep"


def ring_after_commit(session: Session, queue: str) -> None:
    """Rings once per queue when the session's outermost transaction commits; a rollback forgets it."""
    rings: set[str] | None = session.info.get(_INFO_KEY)
    if rings is None:
        rings = session.info[_INFO_KEY] = set()
        event.listen(session, "after_commit", _ring_collected)
        event.listen(session, "after_rollback", _forget)
    rings.add(str(queue))


def ring(queue: str) -> None:
    """Sends the message if a broker is configured; a failure is logged and harmless."""
    settings = get_settings()
    bell = Bell(queue)
    # A queue that nobody serves would only grow: without a side queue the side process polls.
    celery_queue = settings.worker.queue if bell is Bell.TUNING else settings.worker.side_queue
    if settings.redis_url is not None and celery_queue is not None:
        _sender(settings.redis_url).ring(bell, celery_queue)


def broker_options(*, connect_seconds: float = 5.0, read_seconds: float = 30.0) -> dict[str, Any]:
    """Redis transport settings shared by the sender here and the workers (reliability: A3b)."""
    return {
        "visibility_timeout": 300,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_connect_timeout": connect_seconds,
        "socket_timeout": read_seconds,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "global_keyprefix": "theriac.",
    }


class _Sender:
    """One broker connection pool per process and URL."""

    def __init__(self, url: str) -> None:
        from celery import Celery  # the gateway of an embedded deployment has no Celery installed

        self.url = url
        self._silent_until = 0.0
        self._celery = Celery("theriac-doorbell", broker=url, set_as_current=False)
        self._celery.conf.update(
            broker_transport_options={
                **broker_options(connect_seconds=1.0, read_seconds=2.0),
                "max_retries": 0,
                "connect_retries_timeout": 1.0,
            },
            broker_connection_retry=False,
            task_serializer="json",
            task_ignore_result=True,
        )

    def ring(self, bell: Bell, queue: str) -> None:
        if time.monotonic() < self._silent_until:
            return
        task = TaskName.WEBHOOKS if bell is Bell.WEBHOOKS else TaskName.WAKE
        args = [] if bell is Bell.WEBHOOKS else [bell.value]
        try:
            self._celery.send_task(task.value, args=args, queue=queue, expires=RING_EXPIRES_SECONDS, retry=False)
        except Exception as error:  # noqa: BLE001 - whatever the broker's client raises, the row is the truth
            self._silent_until = time.monotonic() + QUIET_SECONDS
            log.warning("doorbell.not_rung", bell=bell.value, error=repr(error))


_current: _Sender | None = None


def _sender(url: str) -> _Sender:
    global _current
    if _current is None or _current.url != url:
        _current = _Sender(url)
    return _current


def _ring_collected(session: Session) -> None:
    if session.in_nested_transaction():
        return
    for queue in sorted(session.info.get(_INFO_KEY, ())):
        ring(queue)
    _clear(session)


def _forget(session: Session) -> None:
    if not session.in_nested_transaction():
        _clear(session)


def _clear(session: Session) -> None:
    session.info.get(_INFO_KEY, set()).clear()
