"""`/v1/fine_tuning/jobs`: create, list, look, cancel, events, checkpoints, safety report.

Knows: verbs, paths, query strings, headers. Refuses to know: what a job may do (`service`).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.encoders import jsonable_encoder

from app.accounts.dependencies import Caller, ObjectStore, Reading, Writing
from app.errors import InvalidRequest, NotFound
from app.jobs import idempotency
from app.jobs import service as jobs
from app.jobs.schemas import CheckpointList, FineTuningJob, JobCreate, JobEventList, JobList
from app.jobs.views import event_object, job_object
from app.releases import service as releases
from app.safety import service as safety

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

METADATA_FILTER = re.compile(r"metadata\[(.{1,64})\]")
MAX_FILTERS = 16
After = Annotated[str | None, Query(max_length=64, description="the last id of the page before")]
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("", response_model=FineTuningJob)
def create(
    body: JobCreate,
    caller: Caller,
    session: Writing,
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Any:
    """Create a job: train, recover, gate and release. It starts when its files are validated."""
    digest = hashlib.sha256(json.dumps(body.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    is_retry = (x_stainless_retry_count or "0") != "0"
    project_id = caller.project_id
    earlier = idempotency.earlier_answer(session, project_id, key=idempotency_key, digest=digest, is_retry=is_retry)
    if earlier is not None:
        return earlier
    job = jobs.create(session, caller, body)
    answer = jsonable_encoder(job_object(job, caller.organization_id))
    idempotency.remember(session, project_id, key=idempotency_key, digest=digest, body=answer)
    return answer


@router.get("", response_model=JobList)
def list_jobs(request: Request, caller: Caller, session: Reading, after: After = None, limit: Limit = 20) -> JobList:
    """List the project's jobs, newest first. `metadata[key]=value` filters; `metadata=null` selects jobs without."""
    wanted = _metadata_filter(request)
    page = jobs.list_page(
        session,
        caller.project_id,
        after=after,
        limit=limit,
        metadata=wanted,
        without_metadata=request.query_params.get("metadata") == "null",
    )
    data = [job_object(job, caller.organization_id) for job in page.data]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return JobList(data=data, first_id=first, last_id=last, has_more=page.has_more)


@router.get("/{job_id}", response_model=FineTuningJob)
def retrieve(job_id: str, caller: Caller, session: Reading) -> FineTuningJob:
    """Look at one job: status, stage, progress, place in the queue."""
    job = jobs.get(session, caller.project_id, job_id)
    release = releases.find_by_job(session, job_id)
    return job_object(
        job,
        caller.organization_id,
        queue_position=jobs.queue_position(session, job),
        release_id=release.id if release else None,
    )


@router.post("/{job_id}/cancel", response_model=FineTuningJob)
def cancel(job_id: str, caller: Caller, session: Writing) -> FineTuningJob:
    """Cancel a job. One that is being worked on ends within seconds."""
    return job_object(jobs.cancel(session, caller.project_id, job_id), caller.organization_id)


@router.post("/{job_id}/pause", response_model=FineTuningJob)
@router.post("/{job_id}/resume", response_model=FineTuningJob)
def pause_or_resume(job_id: str, caller: Caller, session: Reading) -> FineTuningJob:
    """Not offered by this version."""
    jobs.get(session, caller.project_id, job_id)
    raise InvalidRequest("Pausing and resuming jobs is not offered yet.", code="unsupported_operation")


@router.get("/{job_id}/events", response_model=JobEventList)
def list_events(job_id: str, caller: Caller, session: Reading, after: After = None, limit: Limit = 20) -> JobEventList:
    """The job's timeline, newest first."""
    job = jobs.get(session, caller.project_id, job_id)
    page = jobs.events_page(session, job, after=after, limit=limit)
    return JobEventList(data=[event_object(event) for event in page.data], has_more=page.has_more)


@router.get("/{job_id}/checkpoints", response_model=CheckpointList)
def list_checkpoints(job_id: str, caller: Caller, session: Reading) -> CheckpointList:
    """Checkpoints that passed a gate of their own; none in this version."""
    jobs.get(session, caller.project_id, job_id)
    return CheckpointList()


@router.get("/{job_id}/safety_report", response_model=dict[str, Any])
def safety_report(job_id: str, caller: Caller, session: Reading, storage: ObjectStore) -> dict[str, Any]:
    """What was measured on the aligned base, the raw fine-tune and the candidate, and the gate's reasons."""
    job = jobs.get(session, caller.project_id, job_id)
    if job.report_key is not None:
        report: dict[str, Any] = json.loads(storage.get_bytes(job.report_key))
        return report
    gate_run = safety.last_gate_run(session, job_id)
    if gate_run is None:
        raise NotFound("The job has no safety report: it has not been through the gate.", code="no_safety_report")
    return gate_run.report


def _metadata_filter(request: Request) -> dict[str, str]:
    wanted = {}
    for name, value in request.query_params.multi_items():
        match = METADATA_FILTER.fullmatch(name)
        if match:
            wanted[match.group(1)] = value
    if len(wanted) > MAX_FILTERS:
        raise InvalidRequest(f"Filter by at most {MAX_FILTERS} metadata keys.", param="metadata")
    return wanted
