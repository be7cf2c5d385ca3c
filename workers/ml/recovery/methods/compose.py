"""Composition: several methods one after the other, each starting where the one before it stopped.

Every part runs at its own strength; the whole has a dial of its own, which interpolates from the raw fine-tune to the
last part's candidate: on the factors, or on the update (brought back to the job's rank) where a part has split it anew.
Teachers named "raw" still mean the fine-tune as the customer trained it.
What it does not do: search the parts' strengths against each other. A pair worth that is a spec of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from workers.ml.recovery.deltas import mixed
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.run import prepare as prepare_part
from workers.ml.recovery.specs import ComposeSpec, label
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: ComposeSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Runs every part once."""
    inputs.require(spec)
    start = tuned.vector.get()
    inputs = replace(inputs, raw=inputs.raw_of(start))
    facts: list[dict[str, Any]] = []
    for part in spec.parts:
        path = prepare_part(tuned, part, inputs, progress)
        tuned.vector.set(path.at(part.strength).factors)
        facts.append({"part": label(part), "strength": part.strength, **path.facts_of(part.strength)})
    end = tuned.vector.get()
    if any(part.regauges for part in spec.parts):
        return StrengthPath(start, lambda strength: _between(tuned, start, end, strength), {"parts": facts})
    return StrengthPath(start, lambda strength: start + strength * (end - start), {"parts": facts})


def _between(tuned: TunedModel, start: Tensor, end: Tensor, strength: float) -> Tensor:
    return end if strength == 1 else mixed(tuned.vector, start, end, strength)
