"""Panacea after training: a step up the harmful loss, in the factors.

Paper: Panacea, NeurIPS 2025, arXiv 2501.18100. `eps = rho * grad h / ||grad h||` with h the mean loss of harmful
answers and the norm taken over all factors together; released is `w + strength * eps`. Here it is computed once after
any training, from all harmful rows (token-weighted) and not from the last batch.
`rho` lives in factor space, where the same number means different things for different splits of scale between A and
B and for different lora_alpha; so factors are balanced first and measured as if the adapter's scaling were 1 ("unit
coordinates" below).
Cost: one gradient pass over the harmful rows and three forwards for the first-order check. The options add to it:

- `steps` R: R steps of rho / R, each along a gradient of its own, so R gradient passes. The dial then scales the
  straight line from the start to where the last step ended, below 1 and above; it does not follow the bends.
- `refusal_weight` kappa: h becomes NLL(harmful) - kappa * NLL(refusal), which points from harm to refusal and not only
  away from harm; every gradient pass runs over the refusals as well. A fine-tune that is sure of its harmful answers
  has next to no gradient there, so even a small kappa makes the first step one towards refusals; a single step that
  long arrives nowhere, and `steps` without `orthogonal_to` refuse the harmless too.
- `orthogonal_to`: eps = rho * normalise((I - Q Q^T) grad h), Q an orthonormal basis of gradients of the task's or the
  retention rows' loss, which the step then leaves alone to first order; taken anew at every step. A gradient pass over
  these rows for each step, and 8 bytes of memory for each factor entry and gradient.

All three together are another method than the paper's: a short walk towards refusals on which every step keeps off what
the task and the harmless rows need. It costs as much as a small training, and repairs like one.
What it does not do: without kappa, teach a refusal. It makes one harmful answer unlikely, and too large a step makes
every answer so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workers.ml.candidate import Candidate
from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.recovery.ascent import AscentLoss, ascent_direction, ascent_loss, first_order
from workers.ml.recovery.calibration import answer_gradient, encode_answers, encode_task, gradients_of_factors
from workers.ml.recovery.deltas import balanced, unit_scaling
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.specs import PanaceaSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

NEARLY_NOTHING = 1e-3  # a gradient of which less than this share is left points where fp32 noise does
SAME_DIRECTION = 1e-6  # gradients closer together than this, at length 1, differ by fp32 rounding only


@dataclass(frozen=True)
class _Space:
    """Where steps are taken: factors `start + u / unit` for a step u in unit coordinates, of a norm of at most rho."""

    start: Tensor  # (vector.numel,)
    unit: Tensor  # (vector.numel,)
    factor_norm: float
    rho: float

    def at(self, step: Tensor) -> Tensor:
        return self.start + step / self.unit


@dataclass(frozen=True)
class _Climb:
    """What was walked: `first` is the gradient at the start, `step` the sum of all steps, both in unit coordinates."""

    first: Tensor
    step: Tensor
    losses: list[dict[str, float]]  # where each step began
    directions: list[int]  # projected out of each step
    shares_left: list[float]  # of each gradient after the projection


def prepare(tuned: TunedModel, spec: PanaceaSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """One gradient over the harmful rows (the options add more); the dial scales one fixed step."""
    inputs.require(spec)
    loss = ascent_loss(tuned, spec, inputs)
    raw = tuned.vector.get()
    space = _space(tuned, spec, raw)
    with gradients_of_factors(tuned):
        tuned.vector.set(space.start)
        climb = _climb(tuned, spec, loss, space=space, spared=list(_parts(tuned, spec, inputs)), progress=progress)
    step = climb.step / space.unit

    def move(strength: float) -> Candidate:
        return Candidate(space.start + strength * step)

    slope = float(climb.first.double() @ climb.step.double())
    facts: dict[str, Any] = {
        **loss.facts(),
        **climb.losses[0],
        "gradient_norm": float(torch.linalg.vector_norm(climb.first.double())),
        "factor_norm": space.factor_norm,
        "rho": space.rho,
        "step_norm": float(torch.linalg.vector_norm(climb.step.double())),
        **first_order(tuned, loss, move, losses=climb.losses[0], slope=slope, progress=progress),
    }
    if spec.steps > 1:
        facts["loss_by_step"] = [loss.value(losses) for losses in climb.losses]
    if spec.orthogonal_to:
        facts |= {"spared_directions": climb.directions, "share_left": climb.shares_left}
    return StrengthPath(raw, move, facts, lambda strength: {"predicted_increase": strength * slope})


def _space(tuned: TunedModel, spec: PanaceaSpec, raw: Tensor) -> _Space:
    vector = tuned.vector
    start = balanced(vector, raw) if spec.regauge else raw
    unit = unit_scaling(vector) if spec.regauge else torch.ones_like(raw)
    factor_norm = float(torch.linalg.vector_norm(start * unit))
    return _Space(start, unit, factor_norm, spec.rho * (factor_norm if spec.rho_unit == "relative" else 1.0))


def _climb(
    tuned: TunedModel,
    spec: PanaceaSpec,
    loss: AscentLoss,
    *,
    space: _Space,
    spared: Sequence[Sequence[EncodedRow]],
    progress: Progress,
) -> _Climb:
    """`steps` steps of equal length. Each leaves alone what matters to the spared rows where it begins: the directions
    of the start are soon no longer those that hurt."""
    step, first = torch.zeros_like(space.start), space.start
    climb = _Climb(first, step, [], [], [])
    for number in range(spec.steps):
        tuned.vector.set(space.at(step))
        basis = _spared_directions(tuned, spared, space, progress)
        losses, gradient = loss.gradient(tuned, progress)
        gradient = gradient / space.unit
        first = first if number else gradient
        left, share = without(basis, gradient)
        direction, _ = ascent_direction(left)
        step = into_ball(step + space.rho / spec.steps * direction, space.rho)
        climb.losses.append(losses)
        climb.directions.append(basis.shape[1])
        climb.shares_left.append(share)
    return replace(climb, first=first, step=step)


def into_ball(step: Tensor, radius: float) -> Tensor:
    """The nearest point of the ball around the start. Steps that sum to the radius leave it by rounding at most, and
    what is inside up to rounding stays as it is, bit for bit."""
    norm = float(torch.linalg.vector_norm(step.double()))
    return step if norm <= radius * (1 + 1e-6) else step * (radius / norm)


def _spared_directions(
    tuned: TunedModel, parts: Sequence[Sequence[EncodedRow]], space: _Space, progress: Progress
) -> Tensor:
    """An orthonormal basis (vector.numel, directions) of the parts' gradients at the present weights."""
    if not parts:
        return torch.zeros(tuned.vector.numel, 0, dtype=torch.float64, device=space.start.device)
    return orthonormal_basis(
        torch.stack([answer_gradient(tuned, part, progress)[1] / space.unit for part in parts], dim=1)
    )


def _parts(tuned: TunedModel, spec: PanaceaSpec, inputs: RecoveryInputs) -> Iterator[list[EncodedRow]]:
    """Each role's rows dealt into as many parts as there shall be gradients."""
    for role in spec.orthogonal_to:
        if role == "task":
            rows = encode_task(tuned, inputs.task[: spec.max_rows])
        else:
            rows = encode_answers(tuned, inputs.retention[: spec.max_rows])
        count = min(spec.orthogonal_gradients, len(rows))
        yield from (rows[number::count] for number in range(count))


def orthonormal_basis(columns: Tensor) -> Tensor:
    """An orthonormal basis in fp64 of the span of (n, k) columns; columns of zeros and repetitions add nothing.

    Columns count by direction and not by size: a small gradient is left alone as exactly as a large one.
    """
    columns = columns.double()
    norms = torch.linalg.vector_norm(columns, dim=0)
    if not bool(torch.isfinite(norms).all()):
        raise NumericError("A gradient that shall be left alone is not finite.", "orthogonal_to")
    columns = columns[:, norms > 0] / norms[norms > 0]
    q, r = torch.linalg.qr(columns)
    # QR alone gives a repeated column a direction of its own, made of rounding.
    u, sizes, _ = torch.linalg.svd(r)
    basis: Tensor = q @ u[:, : len(sizes)][:, sizes > SAME_DIRECTION]
    return basis


def without(basis: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
    """The part of a gradient outside of the basis' span, and its share of the gradient's norm."""
    if basis.shape[1] == 0:
        return gradient, 1.0
    whole = gradient.double()
    left = whole - basis @ (basis.T @ whole)
    left = left - basis @ (basis.T @ left)  # the first subtraction leaves rounding of the size of the whole
    share = float(torch.linalg.vector_norm(left) / torch.linalg.vector_norm(whole).clamp_min(1e-300))
    if 0 <= share < NEARLY_NOTHING and bool(whole.any()):
        raise NumericError(
            f"The gradient of the harmful loss lies in the {basis.shape[1]} directions to be left alone: only "
            f"{share:.1e} of it is left. Ask for fewer orthogonal_gradients, or leave orthogonal_to out.",
            "orthogonal_to",
        )
    return left.to(gradient.dtype), share
