"""The outbox: one row per fact.

Knows: that a fact is a job's timeline line, a webhook's source, or both, and that its row is written in
the transaction that made it true.
Refuses to know: who listens.
"""

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Table


class Event(Created, Table):
    """`topic` set: fan out to webhook endpoints. `kind` set: show in the job's timeline."""

    __tablename__ = "event"
    __table_args__ = (
        Index("ix_event_subject", "subject_id", "seq"),
        Index("ix_event_unsent", "fanned_out_at", "topic", "seq"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True, autoincrement=True
    )
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    subject_id: Mapped[str] = mapped_column(String(64))
    topic: Mapped[str | None] = mapped_column(String(64))
    kind: Mapped[str | None] = mapped_column(String(32))
    level: Mapped[str] = mapped_column(String(8), default="info")
    message: Mapped[str] = mapped_column(String(4000), default="")
    data: Mapped[dict[str, Any] | None]
    fanned_out_at: Mapped[float | None]
