"""Queries of organizations, projects and keys. Knows: SQL. Refuses to know: who may do what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from app.tables.accounts import ApiKey, OperatorKey, Organization, Project


def find_organization(session: Session, name: str) -> Organization | None:
    return session.scalars(select(Organization).where(Organization.name == name)).first()


def find_project(session: Session, organization_id: str, name: str) -> Project | None:
    statement = select(Project).where(Project.organization_id == organization_id, Project.name == name)
    return session.scalars(statement.order_by(Project.created_at).limit(1)).first()


def get_organization_of(session: Session, project_id: str) -> Organization:
    statement = select(Organization).join(Project, Project.organization_id == Organization.id)
    return session.scalars(statement.where(Project.id == project_id)).one()


def find_api_key(session: Session, key_id: str) -> tuple[ApiKey, Project] | None:
    statement = select(ApiKey, Project).join(Project, ApiKey.project_id == Project.id).where(ApiKey.key_id == key_id)
    row = session.execute(statement).first()
    return (row[0], row[1]) if row else None


def find_operator_key(session: Session, key_id: str) -> OperatorKey | None:
    return session.scalars(select(OperatorKey).where(OperatorKey.key_id == key_id)).first()


def list_api_keys(session: Session) -> Sequence[ApiKey]:
    return session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)).all()


def list_operator_keys(session: Session) -> Sequence[OperatorKey]:
    return session.scalars(select(OperatorKey).order_by(OperatorKey.created_at, OperatorKey.id)).all()


def revoke(session: Session, key: str, moment: float) -> bool:
    """By id or by the public part of the text, in whichever table it is; False when it names no live key."""
    for table in (ApiKey, OperatorKey):
        statement = update(table).where(
            (table.id == key) | (table.key_id == key),
            table.revoked_at.is_(None),
        )
        if cast("CursorResult[Any]", session.execute(statement.values(revoked_at=moment))).rowcount:
            return True
    return False


def touch(session: Session, table: type[ApiKey] | type[OperatorKey], row_id: str, moment: float) -> None:
    session.execute(update(table).where(table.id == row_id).values(last_used_at=moment))
