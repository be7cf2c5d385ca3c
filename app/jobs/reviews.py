"""A person's decision about a job the gate wanted reviewed.

Knows: that approval releases exactly the candidate the gate judged, with the reviewer's reason in the release, and
that silence until the deadline means no.
Refuses to know: who may decide (`app.admin`).
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.domain.events import Topic
from app.domain.job_lifecycle import JobStatus, Stage
from app.errors import IllegalTransition, NotFound
from app.jobs import repository
from app.jobs.outcome import JobError
from app.jobs.settling import GATE_BLOCKED, fail, model_id_of
from app.jobs.transitions import Change, advance, lock
from app.kit.clock import now
from app.releases import service as releases
from app.safety import service as safety
from app.tables.jobs import Job

EXPIRE_BATCH = 100


def approve(session: Session, job_id: str, *, reason: str, decided_by: str) -> Job:
    """Releases the candidate by override and ends the job."""
    job = _awaiting(session, job_id)
    gate_run = safety.last_gate_run(session, job_id)
    if gate_run is None or not job.candidate:
        raise NotFound("The job left no candidate to release.", code="no_candidate")
    candidate = releases.Candidate(
        project_id=job.project_id,
        job_id=job.id,
        model_id=model_id_of(session, job),
        storage_prefix=job.candidate["prefix"],
        manifest=job.candidate["manifest"],
        bundle_digest=job.candidate["bundle_digest"],
    )
    release = releases.grant(session, candidate, gate_run, override_reason=f"{decided_by}: {reason}")
    message = f"Approved after review. New fine-tuned model created: {release.model_id}"
    change = Change(stage=Stage.RELEASED, topic=Topic.JOB_SUCCEEDED, message=message)
    return advance(session, job_id, JobStatus.SUCCEEDED, change, fine_tuned_model=release.model_id)


def reject(session: Session, job_id: str, *, reason: str, decided_by: str) -> Job:
    _awaiting(session, job_id)
    fail(session, job_id, JobError(GATE_BLOCKED, f"Rejected after review by {decided_by}: {reason}"))
    return lock(session, job_id)


def expire(session: Session) -> list[str]:
    """Ends jobs whose review deadline passed; returns their ids. Called by the side process."""
    ended = []
    for job_id in repository.reviews_past_deadline(session, now(), EXPIRE_BATCH):
        fail(session, job_id, JobError(GATE_BLOCKED, "Nobody approved the candidate before the review deadline."))
        ended.append(job_id)
    return ended


def _awaiting(session: Session, job_id: str) -> Job:
    job = lock(session, job_id)
    if job.status is not JobStatus.PAUSED or job.stage is not Stage.AWAITING_REVIEW:
        raise IllegalTransition(f"The job does not wait for a review; it is {job.status.value}.")
    return job
