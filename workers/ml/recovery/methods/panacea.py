"""Panacea after training: one step up the harmful loss.

Paper: Panacea, NeurIPS 2025, arXiv 2501.18100. `eps = rho * grad h / ||grad h||` with h the mean loss of harmful
answers and the norm taken over all factors together; released is `w + strength * eps`. Here it is computed once after
any training, from all harmful rows (token-weighted) and not from the last batch.
`rho` lives in factor space, where the same number means different things for different splits of scale between A and
B and for different lora_alpha; so factors are balanced first and measured as if the adapter's scaling were 1.
What it does not do: teach a refusal. It makes one harmful answer unlikely, and too large a step makes every answer so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import answer_gradient, answer_loss, encode_answers, gradients_of_factors
from workers.ml.recovery.deltas import balanced, unit_scaling
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath, harmful_rows
from workers.ml.recovery.specs import PanaceaSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

PROBE_STRENGTH = 0.05  # small enough for the first-order prediction to hold, large enough to be measured in fp32


def prepare(tuned: TunedModel, spec: PanaceaSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One gradient over the harmful rows; the dial scales one fixed direction."""
    inputs.require(spec)
    rows = encode_answers(tuned, harmful_rows(inputs, spec))
    vector, raw = tuned.vector, tuned.vector.get()
    start = balanced(vector, raw) if spec.regauge else raw
    unit = unit_scaling(vector) if spec.regauge else torch.ones_like(raw)
    with gradients_of_factors(tuned):
        vector.set(start)
        loss, gradient = answer_gradient(tuned, rows, progress)
    direction, slope = ascent_direction(gradient / unit)
    factor_norm = float(torch.linalg.vector_norm(start * unit))
    rho = spec.rho * (factor_norm if spec.rho_unit == "relative" else 1.0)
    step = rho * direction / unit
    facts: dict[str, Any] = {
        "harmful_rows": len(rows),
        "harmful_loss": loss,
        "gradient_norm": slope,
        "factor_norm": factor_norm,
        "rho": rho,
        **_first_order(tuned, rows, start=start, step=step, loss=loss, slope=rho * slope),
    }
    progress.step(1, 1, part="first-order check")

    def facts_at(strength: float) -> dict[str, Any]:
        return {"predicted_increase": strength * rho * slope}

    return StrengthPath(raw, lambda strength: start + strength * step, facts, facts_at)


def ascent_direction(gradient: Tensor) -> tuple[Tensor, float]:
    """The unit vector of a gradient over all factors together, and the gradient's norm."""
    norm = float(torch.linalg.vector_norm(gradient.double()))
    if not norm > 0 or norm == float("inf"):
        raise NumericError(f"The gradient of the harmful loss has norm {norm}: there is no direction to step in.")
    return (gradient.double() / norm).to(gradient.dtype), norm


def _first_order(
    tuned: TunedModel, rows: list[EncodedRow], *, start: Tensor, step: Tensor, loss: float, slope: float
) -> dict[str, float]:
    """Loss increases, predicted and measured, at a small strength (they must agree) and at 1 (they need not)."""
    with tuned.vector.swapped(start):
        losses = {}
        for strength in (1.0, PROBE_STRENGTH, -PROBE_STRENGTH):
            tuned.vector.set(start + strength * step)
            losses[strength] = answer_loss(tuned, rows)
    return {
        "probe_strength": PROBE_STRENGTH,
        "probe_predicted_increase": PROBE_STRENGTH * slope,
        # Half the difference across 0, so that curvature does not blur the comparison.
        "probe_measured_increase": (losses[PROBE_STRENGTH] - losses[-PROBE_STRENGTH]) / 2,
        "predicted_increase_at_1": slope,
        "measured_increase_at_1": losses[1.0] - loss,
    }
