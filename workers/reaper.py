"""Takes work away from dead workers and moves its subjects along. Any process may do it at any time.

Knows: which service hears of which kind of work, in the transaction that took it away.
Refuses to know: who claims it next.
"""

from __future__ import annotations

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.files import service as files
from app.jobs import service as jobs
from app.settings import WorkerSettings
from app.tables.work import WorkKind
from app.work import service as work
from app.work.lease import ReapedItem, ReapOutcome

log = structlog.get_logger(__name__)


def reap(engine: Engine, settings: WorkerSettings) -> list[ReapedItem]:
    with unit_of_work(engine) as session:
        reaped = work.reap(session, backoff_seconds=settings.backoff_seconds)
        for item in reaped:
            log.warning("work.reaped", subject=item.subject_id, outcome=item.outcome.value, error=item.error)
            try:
                with session.begin_nested():
                    _move_subject(session, item)
            except Exception:
                # One subject that cannot move must not keep all others from being taken away.
                log.exception("work.subject_not_moved", subject=item.subject_id)
    return reaped


def _move_subject(session: Session, item: ReapedItem) -> None:
    match item.kind, item.outcome:
        case WorkKind.TUNE, ReapOutcome.QUEUED:
            jobs.requeue(session, item.subject_id)
        case WorkKind.TUNE, ReapOutcome.DEAD:
            jobs.finish_dead(session, item.subject_id)
        case WorkKind.TUNE, ReapOutcome.CANCELLED:
            jobs.finish_cancel(session, item.subject_id)
        case WorkKind.VALIDATE, ReapOutcome.DEAD:
            files.give_up(session, item.subject_id, "the validating process died every time")
            jobs.files_settled(session, item.subject_id)
