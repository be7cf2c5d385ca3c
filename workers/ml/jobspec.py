"""What one pipeline run is asked to do: the schema of `job.json`.

Knows: every choice that can change a byte of the result. The file with the inputs beside it reproduces a run on the
same machine, as long as the search does not meet its budget of seconds, which a slower machine may.
Refuses to know: who asked, why, under which job id, and where the result goes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from workers.ml.gate import GateLimits
from workers.ml.recovery.specs import MethodSpec, RecoverySpec, TrainingSpec, method_name
from workers.ml.settings import Frozen, LoraSettings

Auto = Literal["auto"]


class BaseChoice(Frozen):
    """The base model by folder and digest; the folder is checked against the digest when it is loaded.

    `pretrained` holds its weights before alignment, where the provider registered them; checked before training.
    """

    name: str
    path: Path
    digest: str
    pretrained: Path | None = None
    pretrained_digest: str | None = None


class TuningRequest(Frozen):
    """What the customer asked for and what the provider registered with the base model.

    "auto" is resolved inside the run, which alone can count tokens; the result is reported and recorded.
    """

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0)] | Auto = "auto"
    seed: int = Field(ge=0, le=2**31 - 1)
    base_learning_rate: float = Field(gt=0, le=1)
    context_limit: int = Field(ge=8)
    micro_batch_tokens: int = Field(8192, ge=1)
    lora: LoraSettings


class RecoveryPlan(Frozen):
    """Which methods may be tried. `fixed` tries each spec at its own `strength` and nothing else; `none` gates the
    raw fine-tune. `training` changes how the raw fine-tune itself is trained, in every mode."""

    mode: Literal["auto", "fixed", "none"] = "auto"
    specs: tuple[RecoverySpec, ...] = ()
    budget_seconds: float = Field(600.0, gt=0)
    budget_evaluations: int = Field(64, ge=1)
    training: TrainingSpec | None = None

    @field_validator("specs")
    @classmethod
    def _releasable(cls, specs: tuple[MethodSpec, ...]) -> tuple[MethodSpec, ...]:
        for spec in specs:
            if spec.output == "sparse-patch":
                raise ValueError(
                    f"{method_name(type(spec))!r} with form 'patch' gives no adapter that could be released"
                )
        return specs


class JudgeChoice(Frozen):
    name: str = "apothecary"


class JobSpec(Frozen):
    """One run of the pipeline: base model, data (beside this file), training, recovery, gate."""

    base: BaseChoice
    tuning: TuningRequest
    recovery: RecoveryPlan
    judge: JudgeChoice
    limits: GateLimits
    max_answer_tokens: int = Field(256, ge=1, le=4096)
    max_task_answer_tokens: int = Field(64, ge=1, le=4096)
