"""Queries of the base-model registry. Knows: SQL. Refuses to know: what makes a folder acceptable."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.tables.base_models import BaseModelRef


def find_by_name(session: Session, name: str) -> BaseModelRef | None:
    return session.scalars(select(BaseModelRef).where(BaseModelRef.name == name)).first()


def list_active(session: Session) -> Sequence[BaseModelRef]:
    statement = select(BaseModelRef).where(BaseModelRef.retired_at.is_(None))
    return session.scalars(statement.order_by(BaseModelRef.name)).all()
