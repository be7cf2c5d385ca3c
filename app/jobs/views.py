"""Rows of jobs and events as the wire shows them.

Knows: which status a customer reads while a cancel is on its way, and which of a job's columns are nobody's business.
Refuses to know: queries.
"""

from __future__ import annotations

from typing import Any, cast

from app.domain.job_lifecycle import JobStatus
from app.jobs.schemas import FineTuningJob, JobErrorObject, JobEventObject
from app.jobs.service import EVENT_PREFIX
from app.tables.events import Event
from app.tables.jobs import Job

_POLICY_FIELDS = ("policy_id", "version", "digest", "on_block")


def job_object(
    job: Job, organization_id: str, *, queue_position: int | None = None, release_id: str | None = None
) -> FineTuningJob:
    error = None
    if job.error_code is not None:
        error = JobErrorObject(code=job.error_code, message=job.error_message or "", param=job.error_param)
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=_seconds(job.finished_at),
        estimated_finish=_seconds(job.estimated_finish),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=organization_id,
        status=cast("Any", public_status(job)),
        training_file=job.training_file_id,
        validation_file=job.validation_file_id,
        result_files=list(job.result_file_ids),
        trained_tokens=job.trained_tokens,
        hyperparameters=job.hyperparameters,
        method=job.method,
        seed=job.seed,
        integrations=None,
        metadata=job.user_metadata,
        error=error,
        user_provided_suffix=job.suffix,
        stage=job.stage.value,
        stage_history=list(job.stage_history),
        progress=job.progress,
        cancel_requested=job.status is JobStatus.CANCEL_REQUESTED,
        review_deadline=_seconds(job.review_deadline),
        queue=None if queue_position is None else {"position": queue_position},
        recovery=job.recovery,
        safety={"policy": job.safety["name"], **{field: job.safety[field] for field in _POLICY_FIELDS}},
        peft=job.peft,
        release_id=release_id,
    )


def public_status(job: Job) -> str:
    """While a cancel is on its way the job shows what it was doing: clients know no other word for it."""
    if job.status is JobStatus.CANCEL_REQUESTED:
        return job.status_before_cancel or JobStatus.RUNNING.value
    return job.status.value


def event_object(event: Event) -> JobEventObject:
    return JobEventObject(
        id=EVENT_PREFIX + event.id.removeprefix("evt_"),
        created_at=int(event.created_at),
        level=cast("Any", event.level),
        message=event.message,
        type=cast("Any", event.kind),
        data=event.data,
    )


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
