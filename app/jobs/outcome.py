"""What a worker hands over when it is done with a job, and what it was given to begin.

Knows: the values that cross between the job service and whoever runs the pipeline.
Refuses to know: rows and HTTP on one side, processes and folders on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.domain.events import EventKind, Level
from app.storage import StoredObject
from app.tables.safety import Verdict


@dataclass(frozen=True, slots=True)
class PlannedObject:
    """Bytes a worker fetches; it compares `sha256` before it uses them."""

    role: str
    storage_key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PlannedBase:
    """The base model and, where registered, its weights before alignment; folders are checked against their digests."""

    name: str
    path: str
    digest: str
    context_limit: int
    learning_rate: float
    target_modules: tuple[str, ...]
    defaults: Mapping[str, Any]
    pretrained_path: str | None = None
    pretrained_digest: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedPolicy:
    """`body` is `app.safety.schemas.PolicyBody` as JSON; `recovery` the plan the job's request resolved to."""

    id: str
    name: str
    version: int
    digest: str
    body: Mapping[str, Any]
    recovery: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Everything a worker needs; nothing here is read from the database again."""

    job_id: str
    project_id: str
    model_id: str
    seed: int
    method: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    peft: Mapping[str, Any]
    base: PlannedBase
    policy: PlannedPolicy
    training: PlannedObject
    validation: PlannedObject | None
    sets: tuple[PlannedObject, ...]
    training_rows: int | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line for the job's timeline."""

    message: str
    kind: EventKind = EventKind.MESSAGE
    level: Level = Level.INFO
    data: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class JobError:
    """`code` starts with ``user_`` or ``system_``; `param` names the setting or file at fault."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a run ended. Exactly one of: `cancelled`, `error`, or a `verdict` with everything it judged.

    For a verdict: `candidate_digest` is what the gate loaded, `manifest` and `bundle_digest` describe the objects
    below `storage_prefix`, `report` is the gate's whole table, `report_key` the safety report's object.
    """

    verdict: Verdict | None = None
    error: JobError | None = None
    cancelled: bool = False
    report: Mapping[str, Any] = field(default_factory=dict)
    candidate_digest: str | None = None
    bundle_digest: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    storage_prefix: str | None = None
    report_key: str | None = None
    result_csv: StoredObject | None = None
    trained_tokens: int | None = None
    hyperparameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.verdict is not None) + (self.error is not None) + self.cancelled != 1:
            raise ValueError("an outcome is a verdict, an error or a cancellation, and only one of them")
