"""Fine-tuning jobs.

Knows: one customer request from start to verdict, as frozen at creation (policy, base model) and as it
stands now (status, stage, progress).
Refuses to know: leases (`app.tables.work`) and what happened when (`app.tables.events`).
"""

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.domain.job_lifecycle import JobStatus, Stage
from app.tables.base import Created, Table, enum_text, one_of


class Job(Created, Table):
    """`recovery` and `peft` as requested, `safety` as frozen; `candidate` is the packaged result: prefix, manifest and
    bundle digest, kept so that a reviewer's approval can release exactly what the gate judged."""

    __tablename__ = "job"
    __table_args__ = (
        one_of("status", JobStatus),
        one_of("stage", Stage),
        Index("ix_job_project_created", "project_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_model.id"))
    policy_id: Mapped[str] = mapped_column(ForeignKey("policy.id"))
    training_file_id: Mapped[str] = mapped_column(ForeignKey("file.id"))
    validation_file_id: Mapped[str | None] = mapped_column(ForeignKey("file.id"))
    model: Mapped[str] = mapped_column(String(255))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    user_metadata: Mapped[dict[str, Any] | None]
    method: Mapped[dict[str, Any]]
    hyperparameters: Mapped[dict[str, Any]]
    recovery: Mapped[dict[str, Any]]
    safety: Mapped[dict[str, Any]]
    peft: Mapped[dict[str, Any]]

    status: Mapped[JobStatus] = mapped_column(enum_text(JobStatus))
    stage: Mapped[Stage] = mapped_column(enum_text(Stage))
    stage_history: Mapped[list[Any]] = mapped_column(default=list)
    progress: Mapped[dict[str, Any] | None]
    status_before_cancel: Mapped[str | None] = mapped_column(String(32))
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    estimated_finish: Mapped[float | None]
    review_deadline: Mapped[float | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None] = mapped_column(String(255))
    result_file_ids: Mapped[list[Any]] = mapped_column(default=list)
    report_key: Mapped[str | None] = mapped_column(String(255))
    candidate: Mapped[dict[str, Any] | None]
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(String(4000))
    error_param: Mapped[str | None] = mapped_column(String(64))
