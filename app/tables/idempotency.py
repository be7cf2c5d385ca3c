"""Answers already given to creating requests.

Knows: which request (project, route, key, digest of its body) was answered with what.
Refuses to know: what was created.
"""

from typing import Any

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Table


class AnsweredRequest(Created, Table):
    """`key` is the client's `Idempotency-Key`; without one the row serves to recognise a client's own retry."""

    __tablename__ = "answered_request"
    __table_args__ = (
        UniqueConstraint("project_id", "route", "key"),
        Index("ix_answered_request_digest", "project_id", "route", "digest", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    route: Mapped[str] = mapped_column(String(64))
    key: Mapped[str | None] = mapped_column(String(255))
    digest: Mapped[str] = mapped_column(String(64))
    body: Mapped[dict[str, Any]]
