"""Panacea in weight space: the step up the harmful loss as a low-rank block beside the job's own factors.

After Panacea (NeurIPS 2025, arXiv 2501.18100), this project's form. With G_m = dh/dW_m the gradient of the harmful
loss with respect to module m's whole weight and [.]_k its k leading singular directions,

    eps_m = rho * [G_m]_k / sqrt(sum over modules of ||[G_m]_k||^2),    released: W_m + strength * eps_m.

Claim: the step depends on the weights alone. The same update split into other factors, with another lora_alpha, moves
the same way, which the step in the factors does only after balancing; and each module gets its share of the length by
its share of the gradient's energy. The block can be switched off without touching the job's factors.
Cost: one gradient pass over the harmful rows (and the refusals, with kappa), in which G_m is summed exactly for small
modules and sketched for large ones, one decomposition a module, and three forwards for the first-order check. The
adapter's rank grows by k.
What it does not do: as panacea, teach a refusal (without kappa); and `rank` cuts the gradient, so the loss rises by
less than along the whole of it; the report says which share of the energy was kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from workers.ml.candidate import Candidate, LowRank
from workers.ml.errors import NumericError
from workers.ml.recovery.ascent import AscentLoss, ascent_loss, first_order
from workers.ml.recovery.calibration import answer_gradient, gradients_of_factors
from workers.ml.recovery.deltas import delta_norm
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.module_gradients import Leading, ModuleGradients
from workers.ml.recovery.specs import PanaceaBlockSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: PanaceaBlockSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One gradient pass; the dial scales one fixed block a module."""
    inputs.require(spec)
    loss = ascent_loss(tuned, spec, inputs)
    raw = tuned.vector.get()
    update_norm = delta_norm(tuned.vector, raw)
    rho = spec.rho * (update_norm if spec.rho_unit == "relative" else 1.0)
    if rho == 0:
        raise NumericError("The adapter is zero, so a perturbation relative to it is zero too.", "rho_unit")
    gradients = ModuleGradients(tuned, rank=spec.rank, dense_bytes=spec.dense_bytes, seed=spec.seed)
    losses = _gather(tuned, loss, gradients, progress)
    leading = gradients.leading(spec.rank, progress)
    norm = math.sqrt(sum(one.kept for one in leading.values()))
    if norm == 0:
        raise NumericError(
            "The gradient of the harmful loss is zero in every module: there is no direction to step in."
        )
    blocks = {
        name: LowRank(((rho / norm) * one.U * one.S).float().contiguous(), one.Vh.float().contiguous())
        for name, one in leading.items()
        if one.kept > 0
    }

    def move(strength: float) -> Candidate:
        return Candidate(raw, {name: LowRank(strength * block.B, block.A) for name, block in blocks.items()})

    slope = rho * norm  # <G, [G]_k> is the squared norm of [G]_k
    facts: dict[str, Any] = {
        **loss.facts(),
        **losses,
        **_energies(leading),
        "sketched_modules": gradients.sketched,
        "update_norm": update_norm,
        "rho": rho,
        **first_order(tuned, loss, move, losses=losses, slope=slope, progress=progress),
    }
    return StrengthPath(raw, move, facts, lambda strength: {"predicted_increase": strength * slope})


def _gather(tuned: TunedModel, loss: AscentLoss, gradients: ModuleGradients, progress: Progress) -> dict[str, float]:
    """The terms' losses; their gradients end in `gradients`."""
    losses = {}
    with gradients_of_factors(tuned):
        for name, weight, rows in loss.terms():
            with gradients.watching(weight):
                losses[name], _ = answer_gradient(tuned, rows, progress)
    return losses


def _energies(leading: Mapping[str, Leading]) -> dict[str, Any]:
    """Where the gradient's energy (squared norm) lies, and how much of it the rank keeps."""
    total = sum(one.energy for one in leading.values())
    return {
        "gradient_norm": math.sqrt(total),
        "energy_share": {name: one.energy / total for name, one in leading.items()},
        "energy_kept": sum(one.kept for one in leading.values()) / total,
        "energy_kept_of_module": {name: one.kept / one.energy if one.energy else 1.0 for name, one in leading.items()},
    }
