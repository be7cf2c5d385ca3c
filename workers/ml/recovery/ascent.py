"""Steps up the loss of harmful answers: what exactly is ascended, in which direction, and what first order promises.

Knows: the ascended loss `h = NLL(harmful answers) - kappa * NLL(refusals to the same prompts)`, its gradient, unit
directions, and how a promised increase is compared with a measured one.
Refuses to know: the space a step is taken in (factors or weights), its length, and who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.ml.candidate import Candidate, applied
from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.prompts import turns_key
from workers.ml.recovery.calibration import answer_gradient, answer_loss, encode_answers
from workers.ml.recovery.dial import HarmfulRowsSpec, RecoveryInputs, harmful_rows
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress, PromptRow

PROBE_STRENGTH = 0.05  # small enough for the first-order prediction to hold, large enough to be measured in fp32
# Refusals to the same prompts cancel what the prompts share; a handful of them would stand for far too few prompts.
MATCHED_SHARE = 0.5


class AscentSpec(HarmfulRowsSpec, Protocol):
    """A spec that says which harmful rows it wants, and how much refusals count against them."""

    @property
    def refusal_weight(self) -> float: ...


@dataclass(frozen=True)
class AscentLoss:
    """The ascended loss. `refusals` is empty where `refusal_weight` is 0; `matched` of them share a harmful prompt."""

    harmful: Sequence[EncodedRow]
    refusals: Sequence[EncodedRow] = ()
    refusal_weight: float = 0.0
    matched: int = 0

    def terms(self) -> Iterator[tuple[str, float, Sequence[EncodedRow]]]:
        """Name, weight in the loss, and rows of each term."""
        yield "harmful_loss", 1.0, self.harmful
        if self.refusal_weight:
            yield "refusal_loss", -self.refusal_weight, self.refusals

    def value(self, losses: dict[str, float]) -> float:
        """The ascended loss from its terms' mean losses per token."""
        return sum(weight * losses[name] for name, weight, _ in self.terms())

    def measured(self, tuned: TunedModel) -> dict[str, float]:
        """The terms' mean losses per token at the model's present weights."""
        return {name: answer_loss(tuned, rows) for name, _, rows in self.terms()}

    def gradient(self, tuned: TunedModel, progress: Progress) -> tuple[dict[str, float], Tensor]:
        """The terms' losses, and the loss's gradient (vector.numel,). Call inside `gradients_of_factors`.

        One forward and backward for each micro-batch of the rows, and nothing else.
        """
        losses, total = {}, torch.zeros(tuned.vector.numel, device=tuned.vector.device)
        for name, weight, rows in self.terms():
            losses[name], gradient = answer_gradient(tuned, rows, progress)
            total += weight * gradient
        return losses, total

    def facts(self) -> dict[str, Any]:
        counts = {"harmful_rows": len(self.harmful)}
        if self.refusal_weight:
            counts |= {"refusal_rows": len(self.refusals), "refusals_matched": self.matched}
        return counts


def ascent_loss(tuned: TunedModel, spec: AscentSpec, inputs: RecoveryInputs) -> AscentLoss:
    """The loss a spec asks for, on the rows it asks for."""
    rows = harmful_rows(inputs, spec)
    harmful = encode_answers(tuned, rows)
    if not spec.refusal_weight:
        return AscentLoss(harmful)
    refusals, matched = matched_refusals(rows, inputs.refusals)
    return AscentLoss(harmful, encode_answers(tuned, refusals[: spec.max_rows]), spec.refusal_weight, matched)


def matched_refusals(harmful: Sequence[PromptRow], refusals: Sequence[PromptRow]) -> tuple[list[PromptRow], int]:
    """The refusals to the harmful rows' own prompts, and how many they are.

    Where fewer than half of the harmful prompts have a refusal, the refusals as they are: prompts that only resemble
    each other then serve better than a few that are the same.
    """
    asked = {turns_key(row.messages) for row in harmful}
    same = [row for row in refusals if turns_key(row.messages) in asked]
    covered = len({turns_key(row.messages) for row in same})
    return (same if covered >= MATCHED_SHARE * len(asked) else list(refusals)), len(same)


def ascent_direction(gradient: Tensor) -> tuple[Tensor, float]:
    """The unit vector of a gradient over all coordinates together, and the gradient's norm."""
    norm = float(torch.linalg.vector_norm(gradient.double()))
    if not norm > 0 or norm == float("inf"):
        raise NumericError(f"The gradient of the harmful loss has norm {norm}: there is no direction to step in.")
    return (gradient.double() / norm).to(gradient.dtype), norm


def first_order(
    tuned: TunedModel,
    loss: AscentLoss,
    at: Callable[[float], Candidate],
    *,
    losses: dict[str, float],
    slope: float,
    progress: Progress,
) -> dict[str, float]:
    """Increases of the loss, promised and measured, at a small strength (they must agree) and at 1 (they need not).

    `losses` are the terms' at strength 0, `slope` is the promised increase per strength. Three forwards over the rows.
    """
    found = {}
    for number, strength in enumerate((1.0, PROBE_STRENGTH, -PROBE_STRENGTH), start=1):
        with applied(tuned, at(strength)):
            found[strength] = loss.measured(tuned)
        progress.step(number, 3, part="first-order check")
    up, down = loss.value(found[PROBE_STRENGTH]), loss.value(found[-PROBE_STRENGTH])
    return {
        "probe_strength": PROBE_STRENGTH,
        "probe_predicted_increase": PROBE_STRENGTH * slope,
        # Half the difference across 0, so that curvature does not blur the comparison.
        "probe_measured_increase": (up - down) / 2,
        "predicted_increase_at_1": slope,
        "measured_increase_at_1": loss.value(found[1.0]) - loss.value(losses),
        **{f"{name}_at_1": value for name, value in found[1.0].items()},
    }
