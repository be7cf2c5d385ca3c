"""The life of a fine-tuning job: statuses, stages, and which change is allowed.

Knows: the one transition table everything else reads (column check, service, workers, admin, tests).
Refuses to know: rows, sessions, who asks. Whether a change *happens* is decided by the compare-and-set
in `app.jobs.service.advance`, the only writer.

    validating_files ──> queued ──> running ──> succeeded
                           ^  ^        │ ├──> failed
                           │  └────────┘ ├──> pausing ──> paused ──> queued
                           │  (lease lost)└──> paused (awaiting review) ──> succeeded | failed
                           └── any live status ──> cancel_requested ──> cancelled
"""

from enum import StrEnum


class JobStatus(StrEnum):
    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCEL_REQUESTED = "cancel_requested"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Stage(StrEnum):
    """The second axis: which leg of the work a job is on. Never multiplied with the statuses."""

    VALIDATING = "validating"
    QUEUED = "queued"
    PREPARING = "preparing"
    TRAINING = "training"
    RECOVERING = "recovering"
    GATING = "gating"
    AWAITING_REVIEW = "awaiting_review"
    PACKAGING = "packaging"
    RELEASED = "released"


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})

_S = JobStatus
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _S.VALIDATING_FILES: frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.RUNNING, _S.PAUSED, _S.FAILED, _S.CANCELLED}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.PAUSING, _S.PAUSED, _S.CANCEL_REQUESTED, _S.SUCCEEDED, _S.FAILED}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.QUEUED, _S.CANCEL_REQUESTED, _S.FAILED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.CANCEL_REQUESTED: frozenset({_S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


def sources(target: JobStatus) -> frozenset[JobStatus]:
    """The statuses from which `target` may be entered."""
    return frozenset(status for status, targets in TRANSITIONS.items() if target in targets)


def cancel_target(status: JobStatus) -> JobStatus | None:
    """Where a customer's cancel leads: at once where nobody works, through a request where somebody does."""
    allowed = TRANSITIONS[status]
    if JobStatus.CANCELLED in allowed and status is not JobStatus.CANCEL_REQUESTED:
        return JobStatus.CANCELLED
    return JobStatus.CANCEL_REQUESTED if JobStatus.CANCEL_REQUESTED in allowed else None
