"""What the provider sees and decides.

Knows: how to read across projects, and which service carries a decision out.
Refuses to know: SQL and HTTP. Numbers are taken from gate reports as recorded; nothing is recomputed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from sqlalchemy.orm import Session

from app.accounts import service as accounts
from app.admin import repository
from app.admin.schemas import (
    GateRunView,
    JobDetail,
    Overview,
    Queue,
    QueueEntry,
    ReleaseView,
    SafetyFigures,
    WorkView,
)
from app.domain.job_lifecycle import TERMINAL, JobStatus, Stage
from app.errors import NotFound
from app.jobs import service as jobs
from app.jobs.views import job_object
from app.releases import service as releases
from app.safety import service as safety
from app.tables.jobs import Job
from app.tables.releases import Release
from app.tables.safety import GateRun
from app.tables.work import WorkState

RECENT_GATE_RUNS = 50
QUEUE_LENGTH = 1000


def overview(session: Session) -> Overview:
    by_status: Counter[str] = Counter()
    by_stage: Counter[str] = Counter()
    awaiting = 0
    for status, stage, count in repository.count_jobs(session):
        by_status[status.value] += count
        if status not in TERMINAL:
            by_stage[stage.value] += count
        if status is JobStatus.PAUSED and stage is Stage.AWAITING_REVIEW:
            awaiting += count
    figures = [_figures(run) for run in repository.latest_gate_runs(session, RECENT_GATE_RUNS)]
    return Overview(
        jobs_by_status=dict(by_status),
        jobs_by_stage=dict(by_stage),
        failures_by_code=repository.count_failures(session),
        verdicts=repository.count_verdicts(session),
        releases=repository.count_releases(session),
        awaiting_review=awaiting,
        harmful_score_raw_median=_median(figure.harmful_score_raw for figure in figures),
        harmful_score_candidate_median=_median(figure.harmful_score_candidate for figure in figures),
        recent_gate_runs=figures,
    )


def queue(session: Session) -> Queue:
    """Running work first, then what waits, the next in line at the top."""
    entries, place = [], 0
    for row in repository.waiting(session, QUEUE_LENGTH):
        waits = row.state is WorkState.QUEUED
        place += waits
        entries.append(
            QueueEntry(
                position=place if waits else None,
                job_id=row.id,
                project_id=row.project_id,
                model=row.model,
                stage=row.stage.value,
                state=row.state.value,
                priority=row.priority,
                attempt=row.attempt,
                worker=row.owner,
                waiting_since=int(row.created_at),
            )
        )
    return Queue(data=entries)


def job_detail(session: Session, job_id: str) -> JobDetail:
    job = _job(session, job_id)
    work = repository.get_work(session, job_id)
    release = releases.find_by_job(session, job_id)
    runs = safety.list_gate_runs(session, job_id)
    organization = accounts.organization_of(session, job.project_id)
    return JobDetail(
        job=job_object(
            job,
            organization.id,
            queue_position=jobs.queue_position(session, job),
            release_id=release.id if release else None,
        ),
        project_id=job.project_id,
        work=WorkView.model_validate(work, from_attributes=True) if work else None,
        recovery_trace=[dict(line) for run in runs for line in _trace(run.report)],
        gate_runs=[_gate_run_view(run) for run in runs],
        release=release_view(release) if release else None,
    )


def review(session: Session, job_id: str, *, approve: bool, reason: str, decided_by: str) -> Job:
    _job(session, job_id)
    decide = jobs.approve if approve else jobs.reject
    return decide(session, job_id, reason=reason, decided_by=decided_by)


def release_view(release: Release) -> ReleaseView:
    return ReleaseView(
        id=release.id,
        model=release.model_id,
        project_id=release.project_id,
        job_id=release.job_id,
        state=release.state.value,
        state_reason=release.state_reason,
        override_reason=release.override_reason,
        gate_run_id=release.gate_run_id,
        gate_verdict=release.gate_verdict,
        candidate_digest=release.candidate_digest,
        bundle_digest=release.bundle_digest,
        created_at=int(release.created_at),
    )


def _job(session: Session, job_id: str) -> Job:
    job = repository.get_job(session, job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.", param="job_id")
    return job


def _gate_run_view(run: GateRun) -> GateRunView:
    return GateRunView(
        id=run.id,
        verdict=run.verdict.value,
        candidate_digest=run.candidate_digest,
        decided_by=run.decided_by,
        created_at=int(run.created_at),
        report=run.report,
    )


def _figures(run: GateRun) -> SafetyFigures:
    return SafetyFigures(
        job_id=run.job_id,
        gate_run_id=run.id,
        verdict=run.verdict.value,
        harmful_score_base=_harmful_score(run.report, "base"),
        harmful_score_raw=_harmful_score(run.report, "raw"),
        harmful_score_candidate=_harmful_score(run.report, "candidate"),
        created_at=int(run.created_at),
    )


def _harmful_score(report: Mapping[str, Any], model: str) -> float | None:
    """From the report's evidence: hits of n prompt groups."""
    try:
        measured = report["evidence"][model]["harmful"]
        return float(measured["hits"]) / float(measured["n"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _trace(report: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    recovery = report.get("recovery")
    trace = recovery.get("trace") if isinstance(recovery, Mapping) else None
    return [line for line in trace if isinstance(line, Mapping)] if isinstance(trace, list) else []


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
