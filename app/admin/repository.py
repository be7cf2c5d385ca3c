"""Queries across projects, for the provider only.

Knows: SQL without a project in it; nothing outside `app.admin` may call these.
Refuses to know: who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from app.domain.job_lifecycle import JobStatus, Stage
from app.tables.jobs import Job
from app.tables.releases import Release
from app.tables.safety import GateRun
from app.tables.work import WorkItem, WorkKind, WorkState


def count_jobs(session: Session) -> Sequence[tuple[JobStatus, Stage, int]]:
    rows = session.execute(select(Job.status, Job.stage, func.count()).group_by(Job.status, Job.stage))
    return [(status, stage, count) for status, stage, count in rows]


def count_failures(session: Session) -> dict[str, int]:
    statement = select(Job.error_code, func.count()).where(Job.error_code.is_not(None)).group_by(Job.error_code)
    return {code: count for code, count in session.execute(statement) if code is not None}


def count_verdicts(session: Session) -> dict[str, int]:
    rows = session.execute(select(GateRun.verdict, func.count()).group_by(GateRun.verdict))
    return {verdict.value: count for verdict, count in rows}


def count_releases(session: Session) -> dict[str, int]:
    rows = session.execute(select(Release.state, func.count()).group_by(Release.state))
    return {state.value: count for state, count in rows}


def latest_gate_runs(session: Session, limit: int) -> Sequence[GateRun]:
    return session.scalars(select(GateRun).order_by(GateRun.created_at.desc(), GateRun.id).limit(limit)).all()


def waiting(session: Session, limit: int) -> Sequence[Row[Any, Any, Any, Any, Any, Any, Any, Any, Any]]:
    """Queued and running fine-tuning work, in the order in which it would be taken if one project asked for all."""
    statement = (
        select(
            Job.id,
            Job.project_id,
            Job.model,
            Job.stage,
            WorkItem.state,
            WorkItem.priority,
            WorkItem.attempt,
            WorkItem.owner,
            WorkItem.created_at,
        )
        .join(WorkItem, (WorkItem.subject_id == Job.id) & (WorkItem.kind == WorkKind.TUNE))
        .where(WorkItem.state.in_((WorkState.QUEUED, WorkState.RUNNING)))
        .order_by(WorkItem.state.desc(), WorkItem.priority.desc(), WorkItem.created_at, WorkItem.id)
    )
    return session.execute(statement.limit(limit)).all()


def get_job(session: Session, job_id: str) -> Job | None:
    return session.scalars(select(Job).where(Job.id == job_id)).first()


def get_work(session: Session, job_id: str) -> WorkItem | None:
    statement = select(WorkItem).where(WorkItem.kind == WorkKind.TUNE, WorkItem.subject_id == job_id)
    return session.scalars(statement).first()
