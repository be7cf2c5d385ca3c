"""What nobody needs any more: stored objects that no row stands for, and answers too old to be given again.

Knows: that a bucket may be shared and a database restored, cloned or new. An object may go only when this database
knows whose it is: a row that was deleted, an attempt under a fence that was handed out here and is over, or an upload
into one of our projects that never got its row. About anything else it says nothing, and the object stays.
Refuses to know: the store (the caller lists and removes), and how long a blocked candidate is kept: that is policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy.orm import Session

from app.housekeeping import repository
from app.housekeeping.repository import JobFacts
from app.jobs import idempotency
from app.kit.clock import now

# Nothing younger is touched: far more than any clock is wrong, an upload takes to get its row, or a download lasts.
GRACE_SECONDS = 24 * 3600.0


def unneeded_uploads(session: Session, keys: Sequence[str]) -> list[str]:
    """Of keys `files/<project>/<file>` those of deleted files, and those of our projects that have no row."""
    files = repository.facts_of_files(session, {key.rpartition("/")[2] for key in keys})
    projects = repository.known_projects(session, {key.split("/")[1] for key in keys})

    def is_unneeded(key: str) -> bool:
        row = files.get(key.rpartition("/")[2])
        if row is None:
            return key.count("/") == 2 and key.split("/")[1] in projects
        return row.deleted and row.storage_key == key

    return [key for key in keys if is_unneeded(key)]


def unneeded_results(session: Session, keys: Sequence[str]) -> list[str]:
    """Of keys `<area>/<job>/<fence>/…` those of attempts that nobody settled, and of results that were deleted."""
    attempts = dict(_attempts(keys))
    jobs = repository.facts_of_jobs(session, {job_id for job_id, _ in attempts.values()})
    results = repository.facts_of_files(session, {file for job in jobs.values() for file in job.result_file_ids})
    kept = {row.storage_key for row in results.values() if not row.deleted}
    return [
        key
        for key, (job_id, fence) in attempts.items()
        if key not in kept and job_id in jobs and _is_over(jobs[job_id], fence) and not _is_result(jobs[job_id], key)
    ]


def forget_answers(session: Session) -> int:
    """Drops answers that are no longer given again; says how many."""
    return repository.delete_answers(session, now() - idempotency.KEY_SECONDS)


def _attempts(keys: Sequence[str]) -> Iterator[tuple[str, tuple[str, int]]]:
    for key in keys:
        parts = key.split("/")
        if len(parts) > 3 and parts[2].isdecimal():
            yield key, (parts[1], int(parts[2]))


def _is_over(job: JobFacts, fence: int) -> bool:
    """A fence above the row's was handed out by another database: a clone, or this one before it was restored."""
    return fence < job.fence or (fence == job.fence and not job.running)


def _is_result(job: JobFacts, key: str) -> bool:
    """The safety report outlives the model it is about."""
    if key == job.report_key:
        return True
    model_gone = job.model_deleted_at is not None and job.model_deleted_at < now() - GRACE_SECONDS
    return job.candidate_prefix is not None and key.startswith(f"{job.candidate_prefix}/") and not model_gone
