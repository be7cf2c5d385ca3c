"""Queries of releases. Knows: SQL. Refuses to know: why a release changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from app.domain.release_lifecycle import SERVABLE, ReleaseState, sources
from app.tables.releases import Release


def find_servable(session: Session, project_id: str, model_id: str) -> Release | None:
    statement = select(Release).where(
        Release.project_id == project_id,
        Release.model_id == model_id,
        Release.state.in_(SERVABLE),
        Release.deleted_at.is_(None),
    )
    return session.scalars(statement).first()


def list_servable(session: Session, project_id: str) -> Sequence[Release]:
    statement = select(Release).where(
        Release.project_id == project_id, Release.state.in_(SERVABLE), Release.deleted_at.is_(None)
    )
    return session.scalars(statement.order_by(Release.created_at, Release.id)).all()


def get(session: Session, release_id: str) -> Release | None:
    return session.scalars(select(Release).where(Release.id == release_id)).first()


def find_by_job(session: Session, job_id: str) -> Release | None:
    return session.scalars(select(Release).where(Release.job_id == job_id)).first()


def move(session: Session, release_id: str, to: ReleaseState, **values: Any) -> bool:
    """Compare-and-set; False when the release is not in a state from which `to` may be entered."""
    statement = update(Release).where(Release.id == release_id, Release.state.in_(sources(to)))
    statement = statement.values(state=to, **values).execution_options(synchronize_session="fetch")
    return cast("CursorResult[Any]", session.execute(statement)).rowcount == 1


def mark_deleted(session: Session, release_id: str, moment: float) -> None:
    session.execute(update(Release).where(Release.id == release_id).values(deleted_at=moment))
