"""Queries of uploaded files. Knows: SQL, and that deleted and expired files are not there. Refuses to know: why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Select, and_, exists, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.domain.job_lifecycle import TERMINAL
from app.kit.clock import now
from app.tables.files import File, FileStatus
from app.tables.jobs import Job


def _present() -> ColumnElement[bool]:
    return and_(File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > now()))


def of_project(project_id: str, purpose: str | None = None) -> Select[File]:
    statement = select(File).where(File.project_id == project_id, _present())
    return statement.where(File.purpose == purpose) if purpose is not None else statement


def find(session: Session, project_id: str, file_id: str) -> File | None:
    return session.scalars(of_project(project_id).where(File.id == file_id)).first()


def find_and_share(session: Session, project_id: str, file_id: str) -> File | None:
    """Locks the file against changes until the transaction ends, so that its status cannot move meanwhile."""
    statement = of_project(project_id).where(File.id == file_id).with_for_update(read=True)
    return session.scalars(statement).first()


def find_locked(session: Session, project_id: str, file_id: str) -> File | None:
    """Waits for whoever shares the file, so that a job being created is either visible afterwards or refused."""
    return session.scalars(of_project(project_id).where(File.id == file_id).with_for_update()).first()


def place_of(session: Session, project_id: str, file_id: str) -> tuple[float, str] | None:
    """Where the file stands in listings, also after it ended: a page goes on behind it."""
    row = session.execute(
        select(File.created_at, File.id).where(File.project_id == project_id, File.id == file_id)
    ).first()
    return (row.created_at, row.id) if row is not None else None


def get_locked(session: Session, file_id: str) -> File | None:
    return session.scalars(select(File).where(File.id == file_id).with_for_update()).first()


def settle(session: Session, file_id: str, to: FileStatus, **values: Any) -> bool:
    """From `uploaded` only: a file's verdict is final."""
    statement = update(File).where(File.id == file_id, File.status == FileStatus.UPLOADED)
    statement = statement.values(status=to, **values).execution_options(synchronize_session="fetch")
    return cast("CursorResult[Any]", session.execute(statement)).rowcount == 1


def mark_deleted(session: Session, file_id: str, moment: float) -> bool:
    statement = update(File).where(File.id == file_id, File.deleted_at.is_(None)).values(deleted_at=moment)
    return cast("CursorResult[Any]", session.execute(statement)).rowcount == 1


def live_job_that_needs(session: Session, file_id: str) -> str | None:
    return session.scalars(select(Job.id).where(_needs(file_id)).limit(1)).first()


def expired(session: Session, limit: int) -> Sequence[File]:
    """Files whose time is over and that no live job needed when the query began; locked, those of others left out."""
    statement = select(File).where(
        File.deleted_at.is_(None), File.expires_at <= now(), ~exists().where(_needs(File.id))
    )
    statement = statement.order_by(File.expires_at).limit(limit).with_for_update(skip_locked=True)
    return session.scalars(statement).all()


def _needs(file_id: str | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    named = or_(Job.training_file_id == file_id, Job.validation_file_id == file_id)
    return and_(named, Job.status.not_in(TERMINAL))
