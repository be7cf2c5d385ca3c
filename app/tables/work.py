"""Work items: what a process can claim.

Knows: the lease (owner, fence, until when by the database's clock), attempts and when to try again.
Refuses to know: what the work is about, beyond its kind and the id of its subject.
"""

from enum import StrEnum

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Table, enum_text, one_of


class WorkKind(StrEnum):
    VALIDATE = "validate"
    TUNE = "tune"


class WorkState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    CANCELLED = "cancelled"


class WorkItem(Created, Table):
    """`fence` rises at every claim and every seizure; a write that names an older fence changes nothing."""

    __tablename__ = "work"
    __table_args__ = (
        one_of("kind", WorkKind),
        one_of("state", WorkState),
        Index("ix_work_claim", "state", "kind", "next_run_at"),
        Index("ix_work_subject", "subject_id", "kind", unique=True),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[WorkKind] = mapped_column(enum_text(WorkKind))
    subject_id: Mapped[str] = mapped_column(String(64))
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), index=True)
    priority: Mapped[int] = mapped_column(default=0)
    state: Mapped[WorkState] = mapped_column(enum_text(WorkState), default=WorkState.QUEUED)
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=3)
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    owner: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[float | None]
    next_run_at: Mapped[float]
    cancel_requested_at: Mapped[float | None]
    last_error: Mapped[str | None] = mapped_column(String(2000))
