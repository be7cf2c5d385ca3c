"""Resolved hyperparameters of one training, as frozen values that travel in `job.json` and in reports.

Knows: which knobs an adapter and its training have, and their bounds.
Refuses to know: how "auto" was resolved, tensors, and the rest of a job.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSettings(Frozen):
    """Shape of the adapter. `target_modules` are leaf module names of the base model."""

    rank: int = Field(8, ge=1, le=256)
    alpha: float = Field(16, gt=0, le=1024)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...]


class TuningSettings(Frozen):
    """Resolved hyperparameters of one training: nothing here says "auto" any more."""

    n_epochs: int = Field(ge=1, le=50)
    batch_size: int = Field(ge=1, le=256, description="rows per optimizer step")
    learning_rate: float = Field(gt=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    seed: int = Field(ge=0, le=2**31 - 1)
    context_limit: int = Field(ge=8, description="tokens; longer rows were reported at upload and stop the run")
    micro_batch_tokens: int = Field(8192, ge=1, description="padded tokens per forward; smaller uses less memory")
    lora: LoraSettings
