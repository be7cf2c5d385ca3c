"""Queries of jobs and their timelines.

Knows: SQL, and that a job is found through its project only.
Refuses to know: which change is allowed (`app.domain.job_lifecycle`) and when (`service`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import CursorResult, Select, Text, func, or_, select, update
from sqlalchemy.orm import Session

from app.domain.job_lifecycle import JobStatus, Stage
from app.kit.pagination import Keyset, Page
from app.tables.events import Event
from app.tables.files import File
from app.tables.idempotency import AnsweredRequest
from app.tables.jobs import Job
from app.tables.work import WorkItem, WorkKind, WorkState

KEYSET = Keyset(Job.created_at, Job.id)


def of_project(project_id: str) -> Select[Job]:
    return select(Job).where(Job.project_id == project_id)


def with_metadata(statement: Select[Job], wanted: Mapping[str, str] | None) -> Select[Job]:
    """Jobs whose metadata hold every given pair; None: jobs without metadata."""
    if wanted is None:
        return statement.where(or_(Job.user_metadata.is_(None), Job.user_metadata.cast(Text).in_(("null", "{}"))))
    for key, value in wanted.items():
        statement = statement.where(Job.user_metadata[key].as_string() == value)
    return statement


def find(session: Session, project_id: str, job_id: str) -> Job | None:
    return session.scalars(of_project(project_id).where(Job.id == job_id)).first()


def get(session: Session, job_id: str) -> Job | None:
    return session.scalars(select(Job).where(Job.id == job_id)).first()


def get_locked(session: Session, job_id: str) -> Job | None:
    """As the row is now, not as this session saw it before, and held until the transaction ends."""
    statement = select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    return session.scalars(statement).first()


def move(
    session: Session, job_id: str, to: JobStatus, allowed: Collection[JobStatus], values: Mapping[str, Any]
) -> bool:
    """The compare-and-set of the lifecycle."""
    statement = update(Job).where(Job.id == job_id, Job.status.in_(allowed)).values(status=to, **values)
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount == 1


def write(session: Session, job_id: str, while_in: Collection[JobStatus], values: Mapping[str, Any]) -> bool:
    """Columns other than the status, only while the job is in one of the given statuses."""
    statement = update(Job).where(Job.id == job_id, Job.status.in_(while_in)).values(**values)
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount == 1


def waiting_for_file(session: Session, file_id: str) -> Sequence[Job]:
    statement = select(Job).where(
        Job.status == JobStatus.VALIDATING_FILES,
        or_(Job.training_file_id == file_id, Job.validation_file_id == file_id),
    )
    return session.scalars(statement.order_by(Job.created_at, Job.id).with_for_update()).all()


def get_file(session: Session, file_id: str) -> File:
    return session.scalars(select(File).where(File.id == file_id)).one()


def reviews_past_deadline(session: Session, moment: float, limit: int) -> Sequence[str]:
    statement = select(Job.id).where(
        Job.status == JobStatus.PAUSED, Job.stage == Stage.AWAITING_REVIEW, Job.review_deadline <= moment
    )
    return session.scalars(statement.limit(limit)).all()


def events_page(session: Session, job_id: str, *, after: str | None, limit: int) -> Page[Event] | None:
    """Newest first; None when `after` names no line of this job."""
    statement = select(Event).where(Event.subject_id == job_id, Event.kind.is_not(None))
    if after is not None:
        seq = session.scalar(select(Event.seq).where(Event.id == after, Event.subject_id == job_id))
        if seq is None:
            return None
        statement = statement.where(Event.seq < seq)
    rows = list(session.scalars(statement.order_by(Event.seq.desc()).limit(limit + 1)))
    return Page(rows[:limit], has_more=len(rows) > limit)


def queue_position(session: Session, job_id: str) -> int | None:
    """1 for the next in line by age; None when the job does not wait for a worker."""
    item = session.scalars(
        select(WorkItem).where(WorkItem.kind == WorkKind.TUNE, WorkItem.subject_id == job_id)
    ).first()
    if item is None or item.state is not WorkState.QUEUED:
        return None
    ahead = select(func.count()).where(
        WorkItem.kind == WorkKind.TUNE,
        WorkItem.state == WorkState.QUEUED,
        or_(
            WorkItem.priority > item.priority,
            (WorkItem.priority == item.priority) & (WorkItem.created_at < item.created_at),
        ),
    )
    return 1 + (session.scalar(ahead) or 0)


def find_answer(session: Session, project_id: str, route: str, key: str) -> AnsweredRequest | None:
    statement = select(AnsweredRequest).where(
        AnsweredRequest.project_id == project_id, AnsweredRequest.route == route, AnsweredRequest.key == key
    )
    return session.scalars(statement).first()


def find_recent_answer(
    session: Session, project_id: str, route: str, digest: str, since: float
) -> AnsweredRequest | None:
    statement = select(AnsweredRequest).where(
        AnsweredRequest.project_id == project_id,
        AnsweredRequest.route == route,
        AnsweredRequest.digest == digest,
        AnsweredRequest.created_at >= since,
    )
    return session.scalars(statement.order_by(AnsweredRequest.created_at.desc()).limit(1)).first()
