"""Queries about what stored objects and remembered answers are still good for.

Knows: SQL across files, jobs, work and releases, many ids at a time.
Refuses to know: which of it may go (`service`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import CursorResult, and_, delete, select
from sqlalchemy.orm import Session

from app.tables.accounts import Project
from app.tables.files import File
from app.tables.idempotency import AnsweredRequest
from app.tables.jobs import Job
from app.tables.releases import Release
from app.tables.work import WorkItem, WorkKind, WorkState


@dataclass(frozen=True, slots=True)
class FileFacts:
    storage_key: str
    deleted: bool


@dataclass(frozen=True, slots=True)
class JobFacts:
    """`fence` is the last one that a worker may have written under, `running` whether one still does."""

    fence: int
    running: bool
    candidate_prefix: str | None
    report_key: str | None
    result_file_ids: tuple[str, ...]
    model_deleted_at: float | None


def known_projects(session: Session, project_ids: Collection[str]) -> set[str]:
    return set(session.scalars(select(Project.id).where(Project.id.in_(project_ids))))


def facts_of_files(session: Session, file_ids: Collection[str]) -> dict[str, FileFacts]:
    rows = session.execute(select(File.id, File.storage_key, File.deleted_at).where(File.id.in_(file_ids)))
    return {row.id: FileFacts(row.storage_key, row.deleted_at is not None) for row in rows}


def facts_of_jobs(session: Session, job_ids: Collection[str]) -> dict[str, JobFacts]:
    """One statement, so that a job that is settled meanwhile is seen before or after, never half."""
    statement = (
        select(
            Job.id,
            Job.candidate["prefix"].as_string().label("prefix"),
            Job.report_key,
            Job.result_file_ids,
            WorkItem.fence,
            WorkItem.state,
            Release.deleted_at,
        )
        .join(WorkItem, and_(WorkItem.subject_id == Job.id, WorkItem.kind == WorkKind.TUNE))
        .outerjoin(Release, Release.job_id == Job.id)
        .where(Job.id.in_(job_ids))
    )
    return {
        row.id: JobFacts(
            fence=row.fence,
            running=row.state is WorkState.RUNNING,
            candidate_prefix=row.prefix,
            report_key=row.report_key,
            result_file_ids=tuple(row.result_file_ids),
            model_deleted_at=row.deleted_at,
        )
        for row in session.execute(statement)
    }


def delete_answers(session: Session, before: float) -> int:
    statement = delete(AnsweredRequest).where(AnsweredRequest.created_at < before)
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount
