"""Names of everything that can happen, as customers and operators read them.

Knows: the closed list of topics; which of them a webhook endpoint gets without asking.
Refuses to know: how an event is stored or delivered.
"""

from enum import StrEnum


class Topic(StrEnum):
    """A fact worth telling somebody. The first three are OpenAI's names; the rest are opt-in."""

    JOB_SUCCEEDED = "fine_tuning.job.succeeded"
    JOB_FAILED = "fine_tuning.job.failed"
    JOB_CANCELLED = "fine_tuning.job.cancelled"
    JOB_CREATED = "fine_tuning.job.created"
    JOB_VALIDATED = "fine_tuning.job.validated"
    JOB_QUEUED = "fine_tuning.job.queued"
    JOB_STARTED = "fine_tuning.job.started"
    JOB_PAUSED = "fine_tuning.job.paused"
    JOB_RECOVERY_STARTED = "fine_tuning.job.recovery_started"
    JOB_RECOVERY_COMPLETED = "fine_tuning.job.recovery_completed"
    JOB_GATE_PASSED = "fine_tuning.job.gate_passed"
    JOB_GATE_BLOCKED = "fine_tuning.job.gate_blocked"
    JOB_GATE_ERROR = "fine_tuning.job.gate_error"
    JOB_REVIEW_REQUIRED = "fine_tuning.job.review_required"
    MODEL_RELEASED = "model.released"
    MODEL_SUSPENDED = "model.suspended"
    MODEL_REVOKED = "model.revoked"
    ENDPOINT_DISABLED = "webhook_endpoint.disabled"


OPENAI_TOPICS = frozenset({Topic.JOB_SUCCEEDED, Topic.JOB_FAILED, Topic.JOB_CANCELLED})


class EventKind(StrEnum):
    """The `type` of a line in a job's timeline (OpenAI's words)."""

    MESSAGE = "message"
    METRICS = "metrics"
    MODERATION_CHECKS = "moderation_checks"


class Level(StrEnum):
    INFO = "info"
    WARN = "warn"
    ERROR = "error"
