"""Files: uploaded bytes, their validation and their end.

Knows: that a file's row is written after its object, with the work item that validates it in the same transaction;
that a verdict on a file is final; that a file a live job needs cannot be deleted.
Refuses to know: HTTP and multipart (`upload`), the rules (`validation`), and which jobs wait (`app.jobs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.errors import Conflict, InvalidRequest, NotFound
from app.files import repository
from app.kit.clock import now
from app.kit.ids import new_id
from app.kit.pagination import Keyset, Order, Page, fetch_page
from app.storage import StoredObject
from app.tables.files import File, FileStatus
from app.tables.work import WorkKind
from app.work import service as work
from app.work.lease import Lease

FINE_TUNE = "fine-tune"
FINE_TUNE_RESULTS = "fine-tune-results"
PURPOSES = (FINE_TUNE,)
KEYSET = Keyset(File.created_at, File.id)
EXPIRE_BATCH = 100
DETAILS_LENGTH = 2000


@dataclass(frozen=True, slots=True)
class NewFile:
    """What a finished upload says about itself."""

    id: str
    filename: str
    purpose: str
    expires_after_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """What the validating process needs; it checks `sha256` before it believes the object."""

    file_id: str
    storage_key: str
    sha256: str
    bytes: int
    context_limit: int | None = None


def new_file_id() -> str:
    return new_id("file-")


def storage_key(project_id: str, file_id: str) -> str:
    """The project tells a sweep whether an object without a row is ours: buckets may be shared."""
    return f"files/{project_id}/{file_id}"


def create(session: Session, project_id: str, new: NewFile, stored: StoredObject) -> File:
    """The row of an upload whose object is complete, and the work item that validates it."""
    moment = now()
    file = File(
        id=new.id,
        project_id=project_id,
        filename=new.filename,
        purpose=new.purpose,
        bytes=stored.bytes,
        sha256=stored.sha256,
        storage_key=stored.key,
        created_at=moment,
        expires_at=moment + new.expires_after_seconds if new.expires_after_seconds else None,
        status=FileStatus.UPLOADED,
    )
    session.add(file)
    session.flush()
    work.enqueue(session, WorkKind.VALIDATE, file.id, project_id)
    return file


def record_result(session: Session, project_id: str, filename: str, stored: StoredObject) -> File:
    """A file the service made for the customer: a job's result CSV."""
    file = File(
        id=new_file_id(),
        project_id=project_id,
        filename=filename,
        purpose=FINE_TUNE_RESULTS,
        bytes=stored.bytes,
        sha256=stored.sha256,
        storage_key=stored.key,
        status=FileStatus.PROCESSED,
    )
    session.add(file)
    session.flush()
    return file


def get(session: Session, project_id: str, file_id: str) -> File:
    file = repository.find(session, project_id, file_id)
    if file is None:
        raise no_such_file(file_id)
    return file


def get_for_job(session: Session, project_id: str, file_id: str, param: str) -> File:
    """A file a new job names; locked, so that its validation cannot end between this look and the job's row."""
    file = repository.find_and_share(session, project_id, file_id)
    if file is None:
        raise InvalidRequest(f"There is no file {file_id!r} in this project.", code="file_not_found", param=param)
    if file.purpose != FINE_TUNE:
        raise InvalidRequest(
            f"{file_id} has purpose {file.purpose!r}; a job needs {FINE_TUNE!r}.", code="wrong_purpose", param=param
        )
    if file.status is FileStatus.ERROR:
        raise InvalidRequest(
            f"{file_id} did not pass validation: {file.status_details}", code=f"invalid_{param}", param=param
        )
    return file


def list_page(
    session: Session, project_id: str, *, purpose: str | None, after: str | None, limit: int, order: Order
) -> Page[File]:
    cursor = None
    if after is not None:
        cursor = repository.place_of(session, project_id, after)
        if cursor is None:
            raise InvalidRequest(
                f"'after' names no file of this project: {after!r}.", code="invalid_cursor", param="after"
            )
    statement = repository.of_project(project_id, purpose)
    return fetch_page(session, statement, KEYSET, cursor=cursor, limit=limit, order=order)


def delete(session: Session, project_id: str, file_id: str) -> str:
    """Takes the file away from the customer; returns the key whose object the caller removes after the commit."""
    get(session, project_id, file_id)
    # The work item first, the file second: the order in which validators lock them too.
    work.request_cancel(session, WorkKind.VALIDATE, file_id)
    file = repository.find_locked(session, project_id, file_id)
    if file is None:
        raise no_such_file(file_id)
    job_id = repository.live_job_that_needs(session, file_id)
    if job_id is not None:
        raise Conflict(
            f"{file_id} is used by job {job_id}, which has not ended. Cancel the job or wait.", code="file_in_use"
        )
    repository.mark_deleted(session, file.id, now())
    return file.storage_key


def expire(session: Session) -> list[str]:
    """Ends files whose time is over and that no live job needs; returns the keys of their objects."""
    moment = now()
    # Asked again under the lock: a job may have been created while the query ran.
    return [
        file.storage_key
        for file in repository.expired(session, EXPIRE_BATCH)
        if repository.live_job_that_needs(session, file.id) is None
        and repository.mark_deleted(session, file.id, moment)
    ]


def plan_validation(session: Session, lease: Lease) -> ValidationPlan:
    work.require(session, lease)
    file = repository.get_locked(session, lease.subject_id)
    if file is None:
        raise NotFound("There is no such file.")
    return ValidationPlan(file.id, file.storage_key, file.sha256, file.bytes)


def settle_validation(session: Session, lease: Lease, report: Mapping[str, Any]) -> FileStatus:
    """Writes the validator's report as the file's verdict. The caller completes the lease in the same transaction."""
    work.require(session, lease)
    accepted = report.get("verdict") == "accept"
    status = FileStatus.PROCESSED if accepted else FileStatus.ERROR
    details = None if accepted else summarise(report)
    repository.settle(
        session, lease.subject_id, status, report=dict(report), rows=report.get("rows"), status_details=details
    )
    return status


def give_up(session: Session, file_id: str, error: str) -> None:
    """The validation itself failed for good (a fault of ours, or a file that no validator survives)."""
    details = f"The file could not be validated: {error}"[:DETAILS_LENGTH]
    repository.settle(session, file_id, FileStatus.ERROR, status_details=details)


def summarise(report: Mapping[str, Any]) -> str:
    """One sentence per broken rule, the worst first: what `status_details` and a job's error show."""
    sentences = []
    for rule in report.get("rules", []):
        if rule.get("severity") != "error":
            continue
        first: dict[str, Any] = next(iter(rule.get("samples", [])), {})
        place = f"line {first['line']}: " if first.get("line") else ""
        count = rule.get("count", 1)
        more = f" ({count} lines)" if count > 1 else ""
        sentences.append(f"{place}{first.get('detail', rule.get('id'))} [{rule.get('id')}]{more}")
    return ("; ".join(sentences) or "the validator gave no reason")[:DETAILS_LENGTH]


def no_such_file(file_id: str) -> NotFound:
    return NotFound(f"No such File object: {file_id}", param="id")
