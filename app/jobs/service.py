"""Fine-tuning jobs: what a customer may ask, and the functions workers drive them with.

Knows: that a job freezes its base model and its policy when it is created, waits until its files are validated, and
is queued as a work item in the transaction that makes it ready.
Refuses to know: HTTP. The worker's side lives in `settling`, the reviewer's in `reviews`, the one writer of status
in `transitions`; this module is the door to all of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from app import outbox
from app.accounts.service import Principal
from app.base_models import service as base_models
from app.domain.events import EventKind, Topic
from app.domain.job_lifecycle import JobStatus, Stage, cancel_target
from app.errors import Conflict, InvalidRequest, NotFound
from app.files import service as files
from app.jobs import repository
from app.jobs.outcome import JobError
from app.jobs.reviews import approve, expire, reject
from app.jobs.schemas import MAX_SEED, JobCreate, PeftRequest
from app.jobs.settling import (
    fail,
    finish_cancel,
    finish_dead,
    record_hyperparameters,
    report_progress,
    requeue,
    set_stage,
    settle,
    start,
)
from app.jobs.transitions import Change, advance, lock
from app.kit.clock import now
from app.kit.ids import new_id
from app.kit.pagination import Page, fetch_page
from app.safety import service as safety
from app.safety.library import MethodSpec, method_name
from app.safety.schemas import FrozenPolicy
from app.tables.base_models import BaseModelRef
from app.tables.events import Event
from app.tables.files import File, FileStatus
from app.tables.jobs import Job
from app.tables.work import WorkKind
from app.work import service as work

__all__ = [
    "advance",
    "approve",
    "cancel",
    "candidate_prefix",
    "create",
    "events_page",
    "expire",
    "files_settled",
    "finish_cancel",
    "finish_dead",
    "get",
    "list_page",
    "lock",
    "queue_position",
    "record_hyperparameters",
    "reject",
    "report_progress",
    "requeue",
    "set_stage",
    "settle",
    "start",
]

EVENT_PREFIX = "ftevent-"


def create(session: Session, principal: Principal, request: JobCreate) -> Job:
    """The job, queued when its files are validated already, else waiting for them."""
    _refuse_unsupported(request)
    base = base_models.find(session, request.model)
    _check_peft(base, request.peft)
    named = _named_files(session, principal.project_id, request)
    frozen = safety.freeze(session, base.id, request.safety, request.recovery)
    _check_recovery(base, request.recovery)
    job = _new_job(principal.project_id, request, base, frozen)
    session.add(job)
    session.flush()
    _tell(session, job, Topic.JOB_CREATED, f"Created fine-tuning job: {job.id}")
    if all(file.status is FileStatus.PROCESSED for file in named):
        _enqueue(session, job)
    else:
        _tell(session, job, None, "Validating files")
    return job


def get(session: Session, project_id: str, job_id: str) -> Job:
    job = repository.find(session, project_id, job_id)
    if job is None:
        raise NotFound(f"Could not find fine tune: {job_id}", param="fine_tuning_job_id")
    return job


def list_page(
    session: Session,
    project_id: str,
    *,
    after: str | None,
    limit: int,
    metadata: Mapping[str, str] | None = None,
    without_metadata: bool = False,
) -> Page[Job]:
    """Newest first; `metadata` keeps jobs that hold every given pair."""
    cursor = None
    if after is not None:
        last = repository.find(session, project_id, after)
        if last is None:
            raise InvalidRequest(
                f"'after' names no job of this project: {after!r}.", code="invalid_cursor", param="after"
            )
        cursor = (last.created_at, last.id)
    statement = repository.of_project(project_id)
    if without_metadata or metadata:
        statement = repository.with_metadata(statement, None if without_metadata else metadata)
    return fetch_page(session, statement, repository.KEYSET, cursor=cursor, limit=limit)


def events_page(session: Session, job: Job, *, after: str | None, limit: int) -> Page[Event]:
    """The job's timeline, newest first."""
    cursor = "evt_" + after.removeprefix(EVENT_PREFIX) if after is not None else None
    page = repository.events_page(session, job.id, after=cursor, limit=limit)
    if page is None:
        raise InvalidRequest(f"'after' names no event of this job: {after!r}.", code="invalid_cursor", param="after")
    return page


def queue_position(session: Session, job: Job) -> int | None:
    return repository.queue_position(session, job.id) if job.status is JobStatus.QUEUED else None


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """At once where nobody works on the job, by request where somebody does. Asking twice changes nothing."""
    get(session, project_id, job_id)
    # The work item first, the job second: the order in which workers lock them too.
    work.request_cancel(session, WorkKind.TUNE, job_id)
    job = lock(session, job_id)
    if job.status is JobStatus.CANCEL_REQUESTED:
        return job
    target = cancel_target(job.status)
    if target is None:
        raise Conflict(f"The job has already ended: it is {job.status.value}.", code="job_already_ended")
    if target is JobStatus.CANCELLED:
        change = Change(topic=Topic.JOB_CANCELLED, message="Fine-tuning job cancelled")
    else:
        change = Change(message="Cancelling the fine-tuning job")
    return advance(session, job_id, target, change)


def candidate_prefix(session: Session, job_id: str) -> str | None:
    """Where the packaged result of the job lies; None while there is none."""
    job = repository.get(session, job_id)
    return str(job.candidate["prefix"]) if job is not None and job.candidate else None


def files_settled(session: Session, file_id: str) -> list[str]:
    """A file's verdict is known: jobs that waited for it go on or end. Called in the transaction of the verdict."""
    moved = []
    for job in repository.waiting_for_file(session, file_id):
        file = repository.get_file(session, file_id)
        if file.status is FileStatus.ERROR:
            param = "training_file" if job.training_file_id == file_id else "validation_file"
            details = file.status_details or "it did not pass validation"
            fail(session, job.id, JobError(f"invalid_{param}", f"{file_id}: {details}", param))
            moved.append(job.id)
        elif _files_ready(session, job):
            _tell(session, job, Topic.JOB_VALIDATED, "Files validated, moving job to queued state")
            _enqueue(session, job)
            moved.append(job.id)
    return moved


def _files_ready(session: Session, job: Job) -> bool:
    named = [job.training_file_id, *([job.validation_file_id] if job.validation_file_id else [])]
    return all(repository.get_file(session, file_id).status is FileStatus.PROCESSED for file_id in named)


def _enqueue(session: Session, job: Job) -> None:
    change = Change(stage=Stage.QUEUED, topic=Topic.JOB_QUEUED, message="Fine-tuning job queued")
    advance(session, job.id, JobStatus.QUEUED, change)
    work.enqueue(session, WorkKind.TUNE, job.id, job.project_id)


def _tell(session: Session, job: Job, topic: Topic | None, message: str) -> None:
    outbox.record(
        session,
        project_id=job.project_id,
        subject_id=job.id,
        topic=topic,
        kind=EventKind.MESSAGE,
        message=message,
        data={"id": job.id} if topic else None,
    )


def _named_files(session: Session, project_id: str, request: JobCreate) -> list[File]:
    named = [files.get_for_job(session, project_id, request.training_file, "training_file")]
    if request.validation_file is not None:
        if request.validation_file == request.training_file:
            raise InvalidRequest("Use another file for validation than for training.", param="validation_file")
        named.append(files.get_for_job(session, project_id, request.validation_file, "validation_file"))
    return named


def _new_job(project_id: str, request: JobCreate, base: BaseModelRef, frozen: FrozenPolicy) -> Job:
    hyperparameters = request.requested_hyperparameters().model_dump(mode="json")
    moment = now()
    return Job(
        id=new_id("ftjob-"),
        project_id=project_id,
        base_model_id=base.id,
        policy_id=frozen.policy_id,
        training_file_id=request.training_file,
        validation_file_id=request.validation_file,
        model=base.name,
        suffix=request.suffix,
        seed=request.seed if request.seed is not None else secrets.randbelow(MAX_SEED + 1),
        user_metadata=request.metadata,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        hyperparameters=hyperparameters,
        recovery=request.recovery.model_dump(mode="json", exclude_unset=True) | {"method": request.recovery.method},
        safety=frozen.model_dump(mode="json"),
        peft=request.peft.model_dump(mode="json", exclude_none=True),
        status=JobStatus.VALIDATING_FILES,
        stage=Stage.VALIDATING,
        stage_history=[{"stage": Stage.VALIDATING.value, "entered_at": moment, "left_at": None}],
        created_at=moment,
    )


def _refuse_unsupported(request: JobCreate) -> None:
    """What OpenAI's API knows and this version does not do is said at once, by name, and never ignored."""
    refusals: list[tuple[Any, str, str]] = [
        (request.model.startswith("ft:"), "model", "Continued tuning of a tuned model is not offered yet."),
        (request.integrations, "integrations", "Integrations are not offered; read the job's events or result file."),
        (request.peft.quantization, "peft.quantization", "Quantised training is not offered yet."),
    ]
    method = request.method
    if method is not None:
        refusals += [
            (method.type != "supervised", "method.type", f"Method {method.type!r} is not offered; use 'supervised'."),
            (method.dpo is not None, "method.dpo", "Only method 'supervised' is offered."),
            (method.reinforcement is not None, "method.reinforcement", "Only method 'supervised' is offered."),
        ]
    for unsupported, param, message in refusals:
        if unsupported:
            raise InvalidRequest(message, code="unsupported_parameter", param=param)


def _check_peft(base: BaseModelRef, peft: PeftRequest) -> None:
    unknown = sorted(set(peft.target_modules or ()) - set(base.target_modules))
    if unknown:
        raise InvalidRequest(
            f"{base.name!r} does not offer {', '.join(unknown)}; its LoRA targets are {', '.join(base.target_modules)}.",
            code="invalid_value",
            param="peft.target_modules",
        )


def _check_recovery(base: BaseModelRef, recovery: object) -> None:
    """A method that was asked for by name must be able to run; `auto` passes over those that cannot."""
    if not isinstance(recovery, MethodSpec) or base.pretrained_path is not None:
        return
    if "pretrained" in recovery.required_inputs():
        raise InvalidRequest(
            f"Recovery {method_name(type(recovery))!r} compares {base.name!r} with its weights before alignment, which the "
            "provider has not registered. Ask for another method or for 'auto'.",
            code="recovery_needs_pretrained",
            param="recovery.method",
        )
