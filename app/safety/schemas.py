"""What a safety policy says and what a job may ask of it.

Knows: the shape and bounds of policies and of the `recovery` and `safety` members of a job.
Refuses to know: rows, and how any of it is carried out.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.safety.library import GateLimits, JudgeChoice, MethodSpec, RecoveryPlan, RecoverySpec


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SetRole(StrEnum):
    """What a provider set is for. Nothing that recovery may see is used to confirm."""

    HARMFUL = "harmful"
    REFUSALS = "refusals"
    RETENTION = "retention"
    HARM_SELECTION = "harm_selection"
    HARM_CONFIRMATION = "harm_confirmation"
    HARMLESS_SELECTION = "harmless_selection"
    HARMLESS_CONFIRMATION = "harmless_confirmation"


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class PolicyBody(Frozen):
    """Everything of a policy that can change a verdict. `sets` maps each role to a provider set's id."""

    limits: GateLimits = GateLimits()
    judge: JudgeChoice = JudgeChoice()
    recovery: RecoveryPlan = RecoveryPlan()
    sets: dict[SetRole, str]
    max_answer_tokens: int = Field(256, ge=1, le=4096)
    max_task_answer_tokens: int = Field(64, ge=1, le=4096)
    review_seconds: float = Field(7 * 86400.0, gt=0, description="time a reviewer has; expiry means block")
    allow_unrepaired: bool = Field(
        True, description="a job may ask for recovery `none`; the gate judges it all the same"
    )


class PolicyDraft(PolicyBody):
    """A policy to be published. `sets` maps each role to a provider set: its id, its name (the newest version), or
    name@version."""

    name: str = Field(pattern=NAME, description="a name that exists gets a new version")
    base_model: str | None = Field(None, max_length=200, description="for this base model only; null is for any")


class AutoRecovery(Frozen):
    """The policy's own plan: diagnose, then the gentlest method and dial that passes."""

    method: Literal["auto"] = "auto"
    budget_seconds: float | None = Field(None, gt=0, description="at most the policy's own budget")


class NoRecovery(Frozen):
    """Send the raw fine-tune to the gate as it is."""

    method: Literal["none"] = "none"


RecoveryRequest = Annotated[AutoRecovery | NoRecovery | RecoverySpec, Field(discriminator="method")]


class SafetyRequest(Frozen):
    """Which policy judges the job and what a block leads to."""

    policy: str = Field("default", max_length=80, description="a policy's name, or name@version")
    on_block: Literal["block", "review"] = Field("block", description="review: a person of the provider looks at it")


class FrozenPolicy(Frozen):
    """A policy as a job carries it: by id and digest, with the plan its recovery request resolved to."""

    policy_id: str
    name: str
    version: int
    digest: str
    on_block: Literal["block", "review"]
    plan: dict[str, Any]


__all__ = [
    "NAME",
    "AutoRecovery",
    "FrozenPolicy",
    "MethodSpec",
    "NoRecovery",
    "PolicyBody",
    "PolicyDraft",
    "RecoveryRequest",
    "SafetyRequest",
    "SetRole",
]
