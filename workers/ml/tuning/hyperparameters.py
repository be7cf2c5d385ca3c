"""From what a customer asked for ("auto" allowed) to settings that leave nothing open, with the reasons.

Knows: how "auto" is decided and what a learning-rate multiplier multiplies.
Refuses to know: torch, the wire format, and which base model it is (its defaults come in as values).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from workers.ml.errors import InvalidSetting
from workers.ml.settings import LoraSettings, TuningSettings

Auto = Literal["auto"]

# One pass over small data teaches little and many passes over large data teach nothing new: aim at a number of
# trained tokens and let the passes follow.
TARGET_TRAINED_TOKENS = 100_000
MAX_AUTO_EPOCHS = 10
# 0.2 % of the rows is the share that hosted services settled on. Below 8 rows the gradient is too noisy for the
# default rate and the processor idles; above 64, LoRA loses quality. Tiny files still get several steps an epoch.
BATCH_SHARE_OF_ROWS = 0.002
AUTO_BATCH_SIZES = (8, 64)
MIN_AUTO_STEPS_PER_EPOCH = 8


@dataclass(frozen=True, slots=True)
class RequestedHyperparameters:
    """A customer's wishes. The learning rate is never named directly: it is the base model's times a multiplier."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    seed: int = 42


@dataclass(frozen=True, slots=True)
class BaseDefaults:
    """What the provider registered with the base model."""

    learning_rate: float
    context_limit: int
    lora: LoraSettings
    micro_batch_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class Resolution:
    """`reasons` says for each hyperparameter where its value comes from, in a sentence for the job's events."""

    settings: TuningSettings
    reasons: Mapping[str, str]


def resolve_auto(
    requested: RequestedHyperparameters, *, rows: int, trained_tokens: int, base_defaults: BaseDefaults
) -> Resolution:
    """`rows` and `trained_tokens` describe one epoch of the training split."""
    if rows < 1 or trained_tokens < 1:
        raise InvalidSetting("There is nothing to train on: no row has a trained token.", "training_file")
    n_epochs, why_epochs = _epochs(requested.n_epochs, trained_tokens)
    batch_size, why_batch = _batch_size(requested.batch_size, rows)
    learning_rate, why_rate = _learning_rate(requested.learning_rate_multiplier, base_defaults.learning_rate)
    try:
        settings = TuningSettings.model_validate(
            {
                "n_epochs": n_epochs,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "seed": requested.seed,
                "context_limit": base_defaults.context_limit,
                "micro_batch_tokens": base_defaults.micro_batch_tokens,
                "lora": base_defaults.lora,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise InvalidSetting(f"{field}: {first['msg']}.", field) from error
    reasons = {"n_epochs": why_epochs, "batch_size": why_batch, "learning_rate": why_rate}
    return Resolution(settings, reasons)


def _epochs(requested: int | Auto, trained_tokens: int) -> tuple[int, str]:
    if requested != "auto":
        return requested, f"{requested} as requested"
    wanted = math.ceil(TARGET_TRAINED_TOKENS / trained_tokens)
    chosen = max(1, min(MAX_AUTO_EPOCHS, wanted))
    return chosen, (
        f"auto: {TARGET_TRAINED_TOKENS:,} trained tokens at {trained_tokens:,} an epoch are {wanted} epochs, "
        f"kept between 1 and {MAX_AUTO_EPOCHS}: {chosen}"
    )


def _batch_size(requested: int | Auto, rows: int) -> tuple[int, str]:
    if requested != "auto":
        return requested, f"{requested} as requested"
    smallest, largest = AUTO_BATCH_SIZES
    share = max(smallest, min(largest, round(rows * BATCH_SHARE_OF_ROWS)))
    chosen = min(share, max(1, rows // MIN_AUTO_STEPS_PER_EPOCH))
    return chosen, (
        f"auto: {BATCH_SHARE_OF_ROWS:.1%} of {rows:,} rows, kept between {smallest} and {largest}, "
        f"with at least {MIN_AUTO_STEPS_PER_EPOCH} steps an epoch: {chosen}"
    )


def _learning_rate(multiplier: float | Auto, base_rate: float) -> tuple[float, str]:
    factor = 1.0 if multiplier == "auto" else float(multiplier)
    if not (math.isfinite(factor) and factor > 0):
        raise InvalidSetting("The learning-rate multiplier is a positive number.", "learning_rate_multiplier")
    origin = "auto" if multiplier == "auto" else "requested multiplier"
    return base_rate * factor, f"{origin}: {factor:g} times the base model's rate of {base_rate:g}"
