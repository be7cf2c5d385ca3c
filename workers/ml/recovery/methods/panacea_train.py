"""Panacea as published: every training step also asks what a step up the harmful loss would undo.

Paper: Panacea, NeurIPS 2025, arXiv 2501.18100, Algorithm 1. With g the loss of the customer's rows and h the mean loss
of a batch of harmful answers,

    eps_t = rho * grad h(w_t) / ||grad h(w_t)||, the norm over all factors together
    descend  grad g(w_t) - lambda * (grad h(w_t + eps_t) - grad h(w_t)),    release  w_T + eps.

Claim: the harmful loss becomes one that eps raises far, so that adding eps at the end costs the model its harm.
eps is taken anew at every step; the weights are w_t outside of the third gradient. `recompute_at_end` takes the
released eps at w_T over all harmful rows, token-weighted; published is the one of the last step's batch at w_{T-1}.
Where h(w + eps) is not finite or above `loss_bound`, the step leaves the lambda term out. The paper's code means to
clamp that loss: a clamped loss has no gradient, and what is left of the term, +lambda * grad h(w), teaches harm.
What the metrics call the training loss stays g at w_t, without eps; so does the validation during training. Harmful
gradients are taken without dropout, and draw no random number: with rho 0 training is bit for bit as without.
Cost: three gradients a step instead of one, and one over all harmful rows at the end.
What it does not do: make the dial free, as the step after training does: another rho is another training. Nor, without
a refusal anywhere in it, teach one (`python -m bench.panacea_train` measures both side by side).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.data import endless_batches
from workers.ml.errors import NumericError
from workers.ml.recovery.ascent import ascent_direction
from workers.ml.recovery.calibration import encode_answers, evaluation_mode
from workers.ml.recovery.dial import RecoveryInputs, harmful_rows
from workers.ml.recovery.specs import PanaceaTrainSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.steps import StepContext, StepGradient
from workers.ml.types import Progress

ROWS_AT_ONCE = 64  # of the last gradient: between two lots a cancel can take effect


def step_method(
    tuned: TunedModel, spec: PanaceaTrainSpec, inputs: RecoveryInputs, progress: Progress
) -> PanaceaTraining:
    """One training's method. Raises MissingInput without harmful rows."""
    inputs.require(spec)
    return PanaceaTraining(tuned, spec, encode_answers(tuned, harmful_rows(inputs, spec)), progress)


class PanaceaTraining:
    """A StepMethod. `tuned` is the model in training; `rows` are the harmful rows as tokens."""

    def __init__(
        self, tuned: TunedModel, spec: PanaceaTrainSpec, rows: Sequence[EncodedRow], progress: Progress
    ) -> None:
        self._tuned, self._spec, self._rows, self._progress = tuned, spec, rows, progress
        self._stream = endless_batches(rows, batch_size=spec.batch_rows, seed=spec.seed)
        self._last: Tensor | None = None

    def gradient(self, context: StepContext) -> StepGradient:
        loss, descent = context.loss_and_grad(context.rows)
        harmful = next(self._stream)
        with evaluation_mode(self._tuned):
            here, up = context.loss_and_grad(harmful)
            start = context.vector.get()
            step, norm = self._perturbation(start, up)
            with context.vector.swapped(start + step):
                there, up_there = context.loss_and_grad(harmful)
        self._last = step
        facts = {
            "harmful_loss": here.loss,
            "harmful_gradient_norm": norm,
            "perturbation_norm": float(torch.linalg.vector_norm(step)),
        }
        if math.isfinite(there.loss):
            facts["harmful_loss_perturbed"] = there.loss
        counts = there.loss <= self._spec.loss_bound and bool(torch.isfinite(up_there).all())
        facts["lambda_term_left_out"] = float(not counts)
        if counts:
            term = self._spec.weight * (up_there - up)
            facts["lambda_term_norm"] = float(torch.linalg.vector_norm(term))
            descent -= term
        return StepGradient(loss, descent, facts)

    def finish(self, context: StepContext) -> None:
        """Adds eps to the weights. Until then they are what the optimizer left, whatever is raised."""
        start = context.vector.get()
        facts: dict[str, Any] = {}
        if self._spec.recompute_at_end:
            facts["harmful_loss"], gradient = self._over_all_rows(context)
            step, facts["harmful_gradient_norm"] = self._perturbation(start, gradient)
        elif self._last is not None:
            step = self._last
        else:
            raise NumericError("There was no training step, so there is no perturbation of the last one to add.")
        facts["perturbation_norm"] = float(torch.linalg.vector_norm(step))
        self._progress.event("The perturbation is added to the trained weights.", **facts)
        context.vector.add_(step)

    def _perturbation(self, start: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
        """eps (vector.numel,) and the gradient's norm. Raises NumericError where there is no direction."""
        direction, norm = ascent_direction(gradient)
        size = float(torch.linalg.vector_norm(start)) if self._spec.rho_unit == "relative" else 1.0
        return self._spec.rho * size * direction, norm

    def _over_all_rows(self, context: StepContext) -> tuple[float, Tensor]:
        """Mean loss per token over all harmful rows, and its gradient (vector.numel,)."""
        weights = [sum(row.loss_weights[1:]) for row in self._rows]
        mean, gradient = 0.0, torch.zeros_like(context.vector.get())
        for begin in range(0, len(self._rows), ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, len(self._rows))
            share = sum(weights[begin:end]) / sum(weights)
            with evaluation_mode(self._tuned):
                found, part = context.loss_and_grad(self._rows[begin:end])
            mean += share * found.loss
            gradient += share * part
            self._progress.step(end, len(self._rows), part="perturbation")
        return mean, gradient
