"""How one optimizer step gets its gradient: the seam at which fine-tuning methods differ.

Knows: what a method may ask for during a step (gradients of any rows, at any point of the LoRA space).
Refuses to know: optimizers, clipping, schedules, logging: the loop owns them for every method alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from workers.ml.chat import EncodedRow
from workers.ml.settings import TuningSettings
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.objective import Objective, WindowLoss


@dataclass(frozen=True, slots=True)
class StepGradient:
    """`loss` is that of the customer's rows; `grad` is what the optimizer descends; `facts` go to the metrics."""

    loss: WindowLoss
    grad: Tensor  # (vector.numel,)
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepContext:
    """One optimizer step as a method sees it. `rows` are the customer's rows of this step."""

    rows: Sequence[EncodedRow]
    step: int
    total_steps: int
    vector: LoraVector
    objective: Objective
    settings: TuningSettings

    def loss_and_grad(self, rows: Sequence[EncodedRow]) -> tuple[WindowLoss, Tensor]:
        """Mean loss over `rows` and its gradient, at the vector's present value.

        The gradient is a copy of its own, so any number of them can be taken within a step. Use
        `vector.swapped(...)` to take one at another point.
        """
        loss = self.objective.loss_into_grad(rows)
        return loss, self.vector.grad()


class StepMethod(Protocol):
    """A way to fine-tune. One instance serves one training and may keep state between steps."""

    def gradient(self, context: StepContext) -> StepGradient:
        """The gradient of this step. The vector must have its old value when this returns."""

    def finish(self, context: StepContext) -> None:
        """After the last optimizer step; may still change the vector. `context.rows` are the last step's."""


class PlainStep:
    """Ordinary supervised fine-tuning: the gradient of the customer's rows and nothing else."""

    def gradient(self, context: StepContext) -> StepGradient:
        loss = context.objective.loss_into_grad(context.rows)
        return StepGradient(loss, context.vector.flat_grad())

    def finish(self, context: StepContext) -> None:
        return None
