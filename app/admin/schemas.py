"""The JSON of the provider's routes. Knows: shapes. Refuses to know: where the numbers come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.jobs.schemas import FineTuningJob


class SafetyFigures(BaseModel):
    """Harmful scores 0-1 of one gate run: the aligned base, the raw fine-tune, the candidate."""

    job_id: str
    gate_run_id: str
    verdict: str
    harmful_score_base: float | None
    harmful_score_raw: float | None
    harmful_score_candidate: float | None
    created_at: int


class Overview(BaseModel):
    object: Literal["admin.overview"] = "admin.overview"
    jobs_by_status: dict[str, int]
    jobs_by_stage: dict[str, int] = Field(description="jobs that have not ended")
    failures_by_code: dict[str, int]
    verdicts: dict[str, int]
    releases: dict[str, int]
    awaiting_review: int
    harmful_score_raw_median: float | None
    harmful_score_candidate_median: float | None
    recent_gate_runs: list[SafetyFigures]


class QueueEntry(BaseModel):
    position: int | None = Field(description="1 is next by age and priority; null while a worker has it")
    job_id: str
    project_id: str
    model: str
    stage: str
    state: str
    priority: int
    attempt: int
    worker: str | None
    waiting_since: int


class Queue(BaseModel):
    object: Literal["admin.queue"] = "admin.queue"
    data: list[QueueEntry]


class GateRunView(BaseModel):
    id: str
    verdict: str
    candidate_digest: str
    decided_by: str
    created_at: int
    report: dict[str, Any]


class ReleaseView(BaseModel):
    object: Literal["release"] = "release"
    id: str
    model: str
    project_id: str
    job_id: str
    state: str
    state_reason: str | None
    override_reason: str | None
    gate_run_id: str
    gate_verdict: str
    candidate_digest: str
    bundle_digest: str
    created_at: int


class WorkView(BaseModel):
    state: str
    attempt: int
    max_attempts: int
    fence: int
    owner: str | None
    last_error: str | None


class JobDetail(BaseModel):
    """A job with everything the provider may know: recovery trace, gate tables, lease, release."""

    object: Literal["admin.job"] = "admin.job"
    job: FineTuningJob
    project_id: str
    work: WorkView | None
    recovery_trace: list[dict[str, Any]]
    gate_runs: list[GateRunView]
    release: ReleaseView | None


class Reason(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reason: str = Field(min_length=3, max_length=1500)


class ReviewDecision(Reason):
    decision: Literal["approve", "reject"]


class ProviderSetObject(BaseModel):
    """What is known of a provider set. Its rows are in no answer of this service."""

    object: Literal["provider_set"] = "provider_set"
    id: str
    name: str
    role: str
    split: str = Field(description="the part of a job that sees the rows: recovery, selection or confirmation")
    version: int
    sha256: str = Field(description="of the imported file")
    rows: int
    groups: int | None = Field(
        description="pieces of independent evidence; 0: the rows carry no group, each is its own"
    )
    categories: dict[str, int] | None = Field(description="rows by category; empty where the rows carry none")
    imported_by: str | None = Field(description="an operator key's name; null for what ships with the product")
    created_at: int


class ProviderSetList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ProviderSetObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class PolicyObject(BaseModel):
    """One version of a policy. `body` never changes; `digest` is of the body."""

    object: Literal["safety.policy"] = "safety.policy"
    id: str
    name: str
    version: int
    base_model: str | None = Field(description="null: for any base model")
    digest: str
    active: bool
    published_by: str | None = Field(description="an operator key's name; null for what ships with the product")
    created_at: int
    body: dict[str, Any]


class PolicyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PolicyObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
