"""Housekeeping that must happen although nobody asks: each sweep is short, idempotent and safe to run anywhere.

Knows: what can be left behind when a process dies or a deadline passes.
Refuses to know: how often (`side`, `tasks.sweep`).
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.files import service as files
from app.jobs import service as jobs
from app.settings import Settings
from app.storage import Storage
from app.tables.work import WorkKind
from app.work import service as work
from workers.reaper import reap

log = structlog.get_logger(__name__)

AREAS = ("quarantine", "releases", "results")


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
        storage.delete(key)
    if keys:
        log.info("sweep.files_expired", count=len(keys))


def expire_reviews(engine: Engine, _storage: Storage, _settings: Settings) -> None:
    with unit_of_work(engine) as session:
        for job_id in jobs.expire(session):
            log.info("sweep.review_expired", job=job_id)


def remove_abandoned_objects(engine: Engine, storage: Storage, _settings: Settings) -> None:
    """Objects of attempts that nobody settled: uploaded under a fence that is neither current nor the job's result."""
    for area in AREAS:
        attempts: dict[tuple[str, str], list[str]] = {}
        for key in storage.list(area):
            parts = key.split("/")
            if len(parts) > 3 and parts[2].isdigit():
                attempts.setdefault((parts[1], parts[2]), []).append(key)
        for (job_id, fence), keys in attempts.items():
            with unit_of_work(engine) as session:
                abandoned = not _in_use(session, job_id, int(fence))
            if abandoned:
                for key in keys:
                    storage.delete(key)
                log.info("sweep.attempt_removed", area=area, job=job_id, fence=fence, objects=len(keys))


def _in_use(session: Session, job_id: str, fence: int) -> bool:
    if work.is_current(session, WorkKind.TUNE, job_id, fence):
        return True
    return (jobs.candidate_prefix(session, job_id) or "").endswith(f"/{job_id}/{fence}")


Sweep = Callable[[Engine, Storage, Settings], None]
# Seconds between two runs in one process.
SCHEDULE: dict[Sweep, float] = {
    reap_dead_workers: 2.0,
    ring_for_late_work: 5.0,
    expire_reviews: 10.0,
    expire_files: 60.0,
    remove_abandoned_objects: 3600.0,
}
