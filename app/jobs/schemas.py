"""The JSON of fine-tuning jobs: OpenAI's shapes with every field always present, and ours beside them.

Knows: names, bounds and the translation from row to wire.
Refuses to know: the database session; a response is made from rows already read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.errors import InvalidRequest
from app.kit.text import find_unstorable
from app.safety.schemas import AutoRecovery, RecoveryRequest, SafetyRequest

MAX_SEED = 2**31 - 1
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Auto = Literal["auto"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Hyperparameters(Strict):
    """ "auto" is resolved from the data and the base model when training starts, and recorded."""

    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"
    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"


class Supervised(Strict):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Strict):
    """Only `supervised` is trained by this version; the others are answered with a clear refusal."""

    type: Literal["supervised", "dpo", "reinforcement"] = "supervised"
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class PeftRequest(Strict):
    """Shape of the adapter; absent members take the base model's defaults."""

    rank: int | None = Field(None, ge=1, le=256)
    alpha: float | None = Field(None, gt=0, le=1024)
    dropout: float | None = Field(None, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, max_length=64)
    quantization: str | None = None


class JobCreate(Strict):
    """Body of `POST /v1/fine_tuning/jobs`."""

    model: str = Field(min_length=1, max_length=255)
    training_file: str = Field(min_length=1, max_length=64)
    validation_file: str | None = Field(None, max_length=64)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    integrations: list[dict[str, Any]] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="deprecated by OpenAI; use `method`")
    recovery: RecoveryRequest = AutoRecovery()
    safety: SafetyRequest = SafetyRequest()
    peft: PeftRequest = PeftRequest()

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, body: Any) -> Any:
        at = find_unstorable(body)
        if at is not None:
            message = "Text may not hold U+0000 or half of a surrogate pair, nor values be nested so deeply."
            raise InvalidRequest(message, code="invalid_value", param=at or None)
        return body

    def requested_hyperparameters(self) -> Hyperparameters:
        if self.method is not None and self.method.supervised is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()


class JobErrorObject(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(BaseModel):
    """OpenAI's job with every field always present; `stage` and what follows are ours."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    integrations: list[dict[str, Any]] | None
    metadata: dict[str, str] | None
    error: JobErrorObject | None
    user_provided_suffix: str | None

    stage: str
    stage_history: list[dict[str, Any]]
    progress: dict[str, Any] | None
    cancel_requested: bool
    review_deadline: int | None
    queue: dict[str, Any] | None
    recovery: dict[str, Any]
    safety: dict[str, Any]
    peft: dict[str, Any]
    release_id: str | None


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobEventObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics", "moderation_checks"]
    data: dict[str, Any] | None


class JobEventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobEventObject]
    has_more: bool


class CheckpointList(BaseModel):
    """Checkpoints that passed a gate of their own. This version gates the final adapter only, so the list is empty."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]] = []
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
