"""The worker's side of a job: begin, report, settle, give back.

Knows: that every write is made under the lease's fence, and that one transaction ends a job together with its gate
run, its release and its events.
Refuses to know: how the work was done. A cancel that arrived first always wins; what a worker brings later is kept
out of reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.orm import Session

from app import outbox
from app.accounts import service as accounts
from app.base_models import service as base_models
from app.domain.events import EventKind, Level, Topic
from app.domain.job_lifecycle import TERMINAL, JobStatus, Stage
from app.errors import Unavailable
from app.files import service as files
from app.jobs import naming, repository
from app.jobs.outcome import JobError, JobEvent, JobOutcome, JobPlan, PlannedBase, PlannedObject, PlannedPolicy
from app.jobs.transitions import Change, advance, change_stage, lock
from app.kit.clock import now
from app.releases import manifest as manifests
from app.releases import service as releases
from app.safety import service as safety
from app.tables.jobs import Job
from app.tables.safety import GateRun, Verdict
from app.work import service as work
from app.work.lease import Lease

GATE_BLOCKED = "safety_gate_blocked"
GATE_ERROR = "gate_error"
ATTEMPTS_EXHAUSTED = "attempts_exhausted"
STAGE_TOPICS = {Stage.RECOVERING: Topic.JOB_RECOVERY_STARTED, Stage.GATING: Topic.JOB_RECOVERY_COMPLETED}
GATE_TOPICS = {
    Verdict.PASS: Topic.JOB_GATE_PASSED,
    Verdict.BLOCK: Topic.JOB_GATE_BLOCKED,
    Verdict.REVIEW: Topic.JOB_REVIEW_REQUIRED,
    Verdict.ERROR: Topic.JOB_GATE_ERROR,
}


def start(session: Session, lease: Lease) -> JobPlan:
    """Queued to running; returns everything the worker needs."""
    change = Change(stage=Stage.PREPARING, topic=Topic.JOB_STARTED, message="Fine-tuning job started")
    job = advance(session, lease.subject_id, JobStatus.RUNNING, change, lease=lease, started_at=now())
    return plan(session, job)


def plan(session: Session, job: Job) -> JobPlan:
    """The job as a worker sees it, with every row it rests on checked and named by digest."""
    base = base_models.get(session, job.base_model_id)
    policy = safety.get_policy(session, job.policy_id)
    if policy.digest != job.safety["digest"]:
        raise Unavailable("The job's safety policy is not the one it was created under.", code="policy_altered")
    sets = safety.get_sets(session, safety.read_body(policy))
    training = repository.get_file(session, job.training_file_id)
    validation = repository.get_file(session, job.validation_file_id) if job.validation_file_id else None
    return JobPlan(
        job_id=job.id,
        project_id=job.project_id,
        model_id=model_id_of(session, job),
        seed=job.seed,
        method=job.method,
        hyperparameters=job.hyperparameters,
        peft=job.peft,
        base=PlannedBase(
            name=base.name,
            path=base.path,
            digest=base.digest,
            context_limit=base.context_limit,
            learning_rate=base.learning_rate,
            target_modules=tuple(base.target_modules),
            defaults=base.defaults,
            pretrained_path=base.pretrained_path,
            pretrained_digest=base.pretrained_digest,
        ),
        policy=PlannedPolicy(
            policy.id, policy.name, policy.version, policy.digest, body=policy.body, recovery=job.safety["plan"]
        ),
        training=PlannedObject("training", training.storage_key, training.sha256),
        validation=PlannedObject("validation", validation.storage_key, validation.sha256) if validation else None,
        sets=tuple(PlannedObject(role.value, row.storage_key, row.sha256) for role, row in sets.items()),
        training_rows=training.rows,
    )


def model_id_of(session: Session, job: Job) -> str:
    organization = accounts.organization_of(session, job.project_id)
    return naming.model_id(job.model, organization.name, job.suffix, job.id)


def set_stage(session: Session, lease: Lease, stage: Stage) -> None:
    """The worker reached the next leg. Silent while a cancel is on its way: the heartbeat carries that."""
    work.require(session, lease)
    job = lock(session, lease.subject_id)
    if job.stage is stage or not change_stage(session, job, stage):
        return
    outbox.record(
        session,
        project_id=job.project_id,
        subject_id=job.id,
        topic=STAGE_TOPICS.get(stage),
        kind=EventKind.MESSAGE,
        message=f"Stage: {stage.value}",
        data={"id": job.id, "stage": stage.value},
    )


def report_progress(
    session: Session, lease: Lease, progress: Mapping[str, Any] | None, events: Iterable[JobEvent] = ()
) -> None:
    """Where the work stands, and lines for the timeline."""
    work.require(session, lease)
    job = repository.get(session, lease.subject_id)
    if job is None:
        return
    if progress is not None:
        eta = progress.get("eta_seconds")
        values = {"progress": dict(progress), "estimated_finish": now() + eta if isinstance(eta, int | float) else None}
        repository.write(session, job.id, {JobStatus.RUNNING}, values)
    for event in events:
        outbox.record(
            session,
            project_id=job.project_id,
            subject_id=job.id,
            kind=event.kind,
            level=event.level,
            message=event.message,
            data=event.data,
        )


def record_hyperparameters(session: Session, lease: Lease, resolved: Mapping[str, Any]) -> None:
    """What "auto" became; from now on the job shows numbers, and keeps what was asked beside them."""
    work.require(session, lease)
    job = lock(session, lease.subject_id)
    method = {**job.method, job.method["type"]: {"hyperparameters": dict(resolved)}}
    repository.write(session, job.id, {JobStatus.RUNNING}, {"hyperparameters": dict(resolved), "method": method})
    session.refresh(job)


def settle(session: Session, lease: Lease, outcome: JobOutcome) -> JobStatus:
    """Ends the job (or parks it for review). The caller completes the lease in the same transaction."""
    work.require(session, lease)
    job = lock(session, lease.subject_id)
    if job.status in TERMINAL:
        return job.status  # cancelled after the claim and before the start: nobody is asked to stop then
    if job.status is JobStatus.CANCEL_REQUESTED or outcome.cancelled:
        return _cancelled(session, job.id)
    if outcome.error is not None:
        return fail(session, job.id, outcome.error, result=_result_values(session, job, outcome))
    return _judged(session, job, outcome)


def requeue(session: Session, job_id: str) -> JobStatus:
    """The work item went back to the queue: lease lost, drain, or retry of a fault of ours."""
    job = lock(session, job_id)
    if job.status is JobStatus.CANCEL_REQUESTED:
        return _cancelled(session, job_id)
    if job.status in TERMINAL or job.status is JobStatus.QUEUED:
        return job.status
    message = "The worker stopped; the job is queued again"
    change = Change(stage=Stage.QUEUED, topic=Topic.JOB_QUEUED, message=message)
    return advance(session, job_id, JobStatus.QUEUED, change).status


def finish_dead(session: Session, job_id: str) -> JobStatus:
    """All attempts are used up. The reason names machines: it stays with the work item, for the operator."""
    job = lock(session, job_id)
    if job.status in TERMINAL:
        return job.status
    if job.status is JobStatus.CANCEL_REQUESTED:
        return _cancelled(session, job_id)
    message = "The service could not finish the job in the attempts allowed; the fault is the service's."
    return fail(session, job_id, JobError(ATTEMPTS_EXHAUSTED, message))


def finish_cancel(session: Session, job_id: str) -> JobStatus:
    """The worker stopped as asked, or was too slow to and lost its lease."""
    job = lock(session, job_id)
    return job.status if job.status in TERMINAL else _cancelled(session, job_id)


def fail(session: Session, job_id: str, error: JobError, *, result: Mapping[str, Any] | None = None) -> JobStatus:
    """The end of a job that released nothing."""
    change = Change(error=error, topic=Topic.JOB_FAILED, message=f"Fine-tuning job failed: {error.message}")
    return advance(session, job_id, JobStatus.FAILED, change, **(result or {})).status


def _cancelled(session: Session, job_id: str) -> JobStatus:
    change = Change(topic=Topic.JOB_CANCELLED, message="Fine-tuning job cancelled")
    return advance(session, job_id, JobStatus.CANCELLED, change).status


def _judged(session: Session, job: Job, outcome: JobOutcome) -> JobStatus:
    verdict = outcome.verdict
    if outcome.candidate_digest is None or verdict is None:
        error = JobError(GATE_ERROR, "The gate's verdict came without the candidate it judged.")
        return fail(session, job.id, error, result=_result_values(session, job, outcome))
    try:
        if verdict is not Verdict.ERROR:
            manifests.check(
                outcome.manifest,
                candidate_digest=outcome.candidate_digest,
                bundle_digest=outcome.bundle_digest or "",
            )
    except (Unavailable, KeyError) as fault:
        error = JobError("system_candidate_altered", f"The packaged candidate is not what the gate judged: {fault}")
        return fail(session, job.id, error, result=_result_values(session, job, outcome))
    gate_run = safety.record_gate_run(
        session,
        job_id=job.id,
        policy_id=job.policy_id,
        candidate_digest=outcome.candidate_digest,
        verdict=verdict,
        report=outcome.report,
    )
    _record_gate_events(session, job, gate_run)
    result = _result_values(session, job, outcome)
    if verdict is Verdict.PASS:
        return _released(session, job, outcome, gate_run, result)
    if verdict is Verdict.REVIEW or (verdict is Verdict.BLOCK and job.safety.get("on_block") == "review"):
        return _parked(session, job, result)
    if verdict is Verdict.ERROR:
        return fail(session, job.id, JobError(GATE_ERROR, _reasons(gate_run)), result=result)
    return fail(session, job.id, JobError(GATE_BLOCKED, _reasons(gate_run)), result=result)


def _released(session: Session, job: Job, outcome: JobOutcome, gate_run: GateRun, result: dict[str, Any]) -> JobStatus:
    candidate = releases.Candidate(
        project_id=job.project_id,
        job_id=job.id,
        model_id=model_id_of(session, job),
        storage_prefix=outcome.storage_prefix or "",
        manifest=outcome.manifest,
        bundle_digest=outcome.bundle_digest or "",
    )
    release = releases.grant(session, candidate, gate_run)
    message = f"New fine-tuned model created: {release.model_id}"
    change = Change(stage=Stage.RELEASED, topic=Topic.JOB_SUCCEEDED, message=message)
    columns = {**result, "fine_tuned_model": release.model_id}
    return advance(session, job.id, JobStatus.SUCCEEDED, change, **columns).status


def _parked(session: Session, job: Job, result: dict[str, Any]) -> JobStatus:
    body = safety.read_body(safety.get_policy(session, job.policy_id))
    message = "The gate asks for a person's decision; the job waits for the provider's review"
    change = Change(stage=Stage.AWAITING_REVIEW, topic=Topic.JOB_PAUSED, message=message)
    columns = {**result, "review_deadline": now() + body.review_seconds}
    return advance(session, job.id, JobStatus.PAUSED, change, **columns).status


def _result_values(session: Session, job: Job, outcome: JobOutcome) -> dict[str, Any]:
    """Columns that hold whatever the run left behind, good or bad."""
    values: dict[str, Any] = {}
    if outcome.result_csv is not None:
        result = files.record_result(session, job.project_id, "step_metrics.csv", outcome.result_csv)
        values["result_file_ids"] = [result.id]
    if outcome.trained_tokens is not None:
        values["trained_tokens"] = outcome.trained_tokens
    if outcome.report_key is not None:
        values["report_key"] = outcome.report_key
    if outcome.storage_prefix is not None:
        values["candidate"] = {
            "prefix": outcome.storage_prefix,
            "manifest": dict(outcome.manifest),
            "bundle_digest": outcome.bundle_digest,
        }
    return values


def _record_gate_events(session: Session, job: Job, gate_run: GateRun) -> None:
    common = {"project_id": job.project_id, "subject_id": job.id}
    outbox.record(
        session,
        **common,
        topic=GATE_TOPICS[gate_run.verdict],
        kind=EventKind.MODERATION_CHECKS,
        level=Level.INFO if gate_run.verdict is Verdict.PASS else Level.WARN,
        message=f"Safety gate: {gate_run.verdict.value}. {_reasons(gate_run)}",
        data={
            "id": job.id,
            "gate_run_id": gate_run.id,
            "verdict": gate_run.verdict.value,
            "blocked": gate_run.verdict is not Verdict.PASS,
            "reasons": _reason_list(gate_run),
        },
    )


def _reason_list(gate_run: GateRun) -> list[dict[str, Any]]:
    verdict = gate_run.report.get("verdict")
    reasons = verdict.get("reasons") if isinstance(verdict, dict) else gate_run.report.get("reasons")
    return [dict(reason) for reason in reasons or [] if isinstance(reason, dict)]


def _reasons(gate_run: GateRun) -> str:
    """The sentences that kept the candidate from passing, or all of them when it passed."""
    reasons = _reason_list(gate_run)
    against = [reason for reason in reasons if reason.get("effect") not in {"pass", "note"}]
    return "; ".join(str(reason.get("text", reason.get("code"))) for reason in against or reasons)
