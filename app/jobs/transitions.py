"""The only writer of a job's status.

Knows: compare-and-set against the lifecycle's table, the fence a worker writes under, and that a change without its
line in the timeline cannot exist.
Refuses to know: why a job changes; its callers in this slice do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app import outbox
from app.domain.events import EventKind, Level, Topic
from app.domain.job_lifecycle import TERMINAL, JobStatus, Stage, sources
from app.errors import IllegalTransition, NotFound
from app.jobs import repository
from app.jobs.outcome import JobError
from app.kit.clock import now
from app.tables.jobs import Job
from app.work import service as work
from app.work.lease import Lease

MESSAGE_LENGTH = 4000


@dataclass(frozen=True, slots=True)
class Change:
    """What goes with a transition: the stage entered, whose fault it is, who is told, the line in the timeline."""

    stage: Stage | None = None
    error: JobError | None = None
    topic: Topic | None = None
    message: str = ""


def advance(
    session: Session, job_id: str, to: JobStatus, change: Change, *, lease: Lease | None = None, **columns: Any
) -> Job:
    """Moves the job, or raises: LeaseLost for a zombie, IllegalTransition when the job is elsewhere by now."""
    if lease is not None:
        work.require(session, lease)
    job = lock(session, job_id)
    before = job.status
    values = {**_consequences(job, to, change), **columns}
    if not repository.move(session, job_id, to, sources(to), values):
        raise IllegalTransition(f"A job that is {before.value} cannot become {to.value}.")
    outbox.record(
        session,
        project_id=job.project_id,
        subject_id=job_id,
        topic=change.topic,
        kind=EventKind.MESSAGE if change.message else None,
        level=Level.ERROR if change.error else Level.INFO,
        message=change.message,
        data={"id": job_id} if change.topic else None,
    )
    session.refresh(job)
    return job


def change_stage(session: Session, job: Job, stage: Stage) -> bool:
    """The second axis; only while somebody works on the job."""
    values = {"stage": stage, "stage_history": history_with(job, stage), "progress": None}
    changed = repository.write(session, job.id, {JobStatus.RUNNING}, values)
    session.refresh(job)
    return changed


def lock(session: Session, job_id: str) -> Job:
    job = repository.get_locked(session, job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


def history_with(job: Job, stage: Stage) -> list[Any]:
    moment = now()
    return [*_closed(job.stage_history, moment), {"stage": stage.value, "entered_at": moment, "left_at": None}]


def _consequences(job: Job, to: JobStatus, change: Change) -> dict[str, Any]:
    """What every transition implies, whoever asked for it."""
    values: dict[str, Any] = {}
    if change.stage is not None:
        values |= {"stage": change.stage, "stage_history": history_with(job, change.stage), "progress": None}
    if to is JobStatus.CANCEL_REQUESTED:
        values["status_before_cancel"] = job.status.value
    if to in TERMINAL:
        history = values.get("stage_history", job.stage_history)
        values |= {"finished_at": now(), "estimated_finish": None, "review_deadline": None}
        values["stage_history"] = _closed(history, now())
    if change.error is not None:
        values |= {
            "error_code": change.error.code[:64],
            "error_message": change.error.message[:MESSAGE_LENGTH],
            "error_param": change.error.param[:64] if change.error.param else None,
        }
    return values


def _closed(history: list[Any], moment: float) -> list[Any]:
    """The history with its last entry left at `moment`."""
    entries = [dict(entry) for entry in history]
    if entries and entries[-1].get("left_at") is None:
        entries[-1]["left_at"] = moment
    return entries
