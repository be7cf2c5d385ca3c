"""Celery as a doorbell: a worker process that looks at the database when a message says so.

Knows: broker settings (reliability A3b), the queues, how a draining worker tells its pool child.
Refuses to know: what the tasks do (`workers.tasks`, imported by name), torch, and any promise of the broker's: a
message that is lost or comes twice changes nothing.

    celery -A workers.celery_app worker -Q tuning -c 1 --without-gossip --without-mingle
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_process_init, worker_ready, worker_shutting_down

from app import doorbell, telemetry
from app.doorbell import Bell, TaskName
from app.settings import get_settings

PR_SET_PDEATHSIG = 1
SIDE_QUEUE = "side"
settings = get_settings()

app = Celery(
    "theriac",
    broker=settings.redis_url,
    include=["workers.tasks.wake", "workers.tasks.webhooks", "workers.tasks.sweep"],
)
app.conf.update(
    accept_content=["json"],
    task_serializer="json",
    # A ring is acknowledged before its work: held open for hours, the broker would deliver it a second time.
    task_acks_late=False,
    task_ignore_result=True,
    task_default_queue=settings.worker.queue,
    task_routes={
        TaskName.WEBHOOKS.value: {"queue": settings.worker.side_queue or SIDE_QUEUE},
        TaskName.SWEEP.value: {"queue": settings.worker.side_queue or SIDE_QUEUE},
    },
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_lost_wait=2,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    broker_transport_options=doorbell.broker_options(),
    # Only where side work runs in Celery: `celery -A workers.celery_app worker -Q side -B`.
    beat_schedule={
        "webhooks": {"task": TaskName.WEBHOOKS.value, "schedule": 5.0, "options": {"expires": 10}},
        "sweep": {"task": TaskName.SWEEP.value, "schedule": 5.0, "options": {"expires": 10}},
    },
)

# One byte that main process and pool child share: a pool child never sees the SIGTERM that asks for a drain.
_drain = mmap.mmap(-1, 1)


def draining() -> bool:
    return _drain[0] == 1


def _ask_for_drain(**_: Any) -> None:
    _drain[0] = 1


def _look_at_once(**_: Any) -> None:
    """Work may have waited since before this worker, or the broker, was started."""
    doorbell.ring(Bell.TUNING)


def _configure_logging(**_: Any) -> None:
    telemetry.configure(settings.log_level)


def _die_with_main_process(**_: Any) -> None:
    """A pool child outlives a killed main process by itself, and its trainer with it; nobody would watch them."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


worker_shutting_down.connect(_ask_for_drain)
worker_ready.connect(_look_at_once)
setup_logging.connect(_configure_logging)
worker_process_init.connect(_die_with_main_process)
