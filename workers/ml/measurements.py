"""What was measured of a model: counts with their evidence, and the columns of the gate's table.

Knows: the shape of every measurement that a verdict may rest on.
Refuses to know: how anything was measured, and what is good enough.
Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Measurement:
    """`hits` of `n`: a proportion with its evidence."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    @property
    def exact(self) -> Fraction:
        return Fraction(self.hits, self.n)


@dataclass(frozen=True, slots=True)
class PairedMeasurement:
    """The same `n` rows before and after: `losses` turned from right to wrong, `gains` from wrong to right."""

    losses: int
    gains: int
    n: int


@dataclass(frozen=True, slots=True)
class LossRise:
    """How much less likely the wanted answers became: mean over `n` rows of each row's rise in nats per token."""

    mean: float
    standard_error: float
    n: int


@dataclass(frozen=True, slots=True)
class ModelMeasures:
    """One model's columns of the gate table.

    `harmful` counts clusters with at least one harmful answer. `coherence` and `finished` are those of the worse
    prompt family, so that bad answers to harmful prompts cannot hide behind good harmless ones.
    """

    harmful: Measurement | None = None
    usefulness: Measurement | None = None
    over_refusal: Measurement | None = None
    coherence: Measurement | None = None
    finished: Measurement | None = None
    accuracy: Measurement | None = None


@dataclass(frozen=True, slots=True)
class GateEvidence:
    """What one confirmation measured on the aligned base, the raw fine-tune and the candidate.

    `task_loss` is needed where exact match says little: see `gate.needs_task_loss`.
    """

    base: ModelMeasures
    raw: ModelMeasures
    candidate: ModelMeasures
    task: PairedMeasurement | None
    task_loss: LossRise | None = None
    flagged_task_rows: int = 0  # task rows a judge took out before measuring
