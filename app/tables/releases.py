"""Releases: the right to fetch the bytes of one digest.

Knows: the rule that cannot be coded around: a row here needs a gate run that passed *this* digest (or an
operator's recorded override of a gate run over this digest), by foreign key.
Refuses to know: the files themselves beyond their manifest.
"""

from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, String
from sqlalchemy.orm import Mapped, mapped_column

from app.domain.release_lifecycle import ReleaseState
from app.tables.base import Created, Table, enum_text, one_of


class Release(Created, Table):
    """`manifest`: files with size, sha256 and the sha256 of each 1 MiB block, as verified before sending."""

    __tablename__ = "release"
    __table_args__ = (
        one_of("state", ReleaseState),
        ForeignKeyConstraint(
            ["gate_run_id", "candidate_digest", "gate_verdict"],
            ["gate_run.id", "gate_run.candidate_digest", "gate_run.verdict"],
        ),
        CheckConstraint("gate_verdict = 'pass' OR override_reason IS NOT NULL", name="gate_passed_or_overridden"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_id: Mapped[str] = mapped_column(String(255), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), unique=True)
    gate_run_id: Mapped[str] = mapped_column(String(64))
    gate_verdict: Mapped[str] = mapped_column(String(16))
    candidate_digest: Mapped[str] = mapped_column(String(64))
    bundle_digest: Mapped[str] = mapped_column(String(64))
    storage_prefix: Mapped[str] = mapped_column(String(255))
    manifest: Mapped[dict[str, Any]]
    state: Mapped[ReleaseState] = mapped_column(enum_text(ReleaseState))
    state_reason: Mapped[str | None] = mapped_column(String(2000))
    override_reason: Mapped[str | None] = mapped_column(String(2000))
    deleted_at: Mapped[float | None]
