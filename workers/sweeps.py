"""Housekeeping that must happen although nobody asks: each sweep is short, idempotent and safe to run anywhere.

Knows: what can be left behind when a process dies or a deadline passes.
Refuses to know: how often (`side`, `tasks.sweep`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.database import read_session, unit_of_work
from app.files import service as files
from app.housekeeping import service as housekeeping
from app.jobs import service as jobs
from app.settings import Settings
from app.storage import Storage
from app.work import service as work
from workers.reaper import reap

log = structlog.get_logger(__name__)

Stop = Callable[[], bool]
Sweep = Callable[[Engine, Storage, Settings], None]
# What lies in the store, and who says which of it may go.
AREAS: dict[str, Callable[[Session, Sequence[str]], list[str]]] = {
    "files": housekeeping.unneeded_uploads,
    "quarantine": housekeeping.unneeded_results,
    "releases": housekeeping.unneeded_results,
    "results": housekeeping.unneeded_results,
}
BATCH = 500


def reap_dead_workers(engine: Engine, _storage: Storage, settings: Settings) -> None:
    reap(engine, settings.worker)


def ring_for_late_work(engine: Engine, _storage: Storage, _settings: Settings) -> None:
    """The reconciler: a lost ring costs seconds."""
    with unit_of_work(engine) as session:
        work.ring_for_waiting(session)


def expire_files(engine: Engine, storage: Storage, _settings: Settings) -> None:
    """Rows first: an object without a row is litter, a row without its object is a broken promise."""
    with unit_of_work(engine) as session:
        keys = files.expire(session)
    for key in keys:
        storage.discard(key)
    if keys:
        log.info("sweep.files_expired", count=len(keys))


def expire_reviews(engine: Engine, _storage: Storage, _settings: Settings) -> None:
    with unit_of_work(engine) as session:
        for job_id in jobs.expire(session):
            log.info("sweep.review_expired", job=job_id)


def remove_abandoned_objects(engine: Engine, storage: Storage, _settings: Settings) -> None:
    """Objects that no row stands for any more, and what killed processes left half written."""
    for area, choose in AREAS.items():
        old = storage.list(area, unchanged_seconds=housekeeping.GRACE_SECONDS)
        removed = 0
        while keys := list(islice(old, BATCH)):
            with read_session(engine) as session:
                unneeded = choose(session, keys)
            removed += sum(storage.discard(key) for key in unneeded)
        if removed:
            log.info("sweep.objects_removed", area=area, count=removed)
    if removed := storage.remove_unfinished(unchanged_seconds=housekeeping.GRACE_SECONDS):
        log.info("sweep.unfinished_removed", count=removed)


def forget_answers(engine: Engine, _storage: Storage, _settings: Settings) -> None:
    with unit_of_work(engine) as session:
        housekeeping.forget_answers(session)


def run_due(due: dict[Sweep, float], stop: Stop, engine: Engine, storage: Storage, settings: Settings) -> None:
    """Runs each sweep whose time has come; `due` remembers when the next is. One that fails keeps no other waiting."""
    for sweep, interval in SCHEDULE.items():
        if stop() or time.monotonic() < due.get(sweep, 0.0):
            continue
        due[sweep] = time.monotonic() + interval
        try:
            sweep(engine, storage, settings)
        except Exception:
            log.exception("sweep.failed", sweep=sweep.__name__)


# Seconds between two runs in one process.
SCHEDULE: dict[Sweep, float] = {
    reap_dead_workers: 2.0,
    ring_for_late_work: 5.0,
    expire_reviews: 10.0,
    expire_files: 60.0,
    forget_answers: 3600.0,
    remove_abandoned_objects: 3600.0,
}
