"""Scale-down: the adapter's weight change multiplied by 1 - strength.

Paper: weight interpolation between the tuned and the aligned model (arXiv 2412.19512). One multiplication of B.
Strength 1 is the aligned model exactly. It knows nothing of harm, and is the honest null of every other method:
one that does not beat it at equal accuracy is not worth its cost.
"""

from __future__ import annotations

from torch import Tensor

from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.specs import ScaleDownSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: ScaleDownSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Needs no data."""
    inputs.require(spec)
    progress.step(1, 1, part="scale")
    vector, raw = tuned.vector, tuned.vector.get()

    def move(strength: float) -> Tensor:
        values = raw.clone()
        parts = vector.split(values)
        for pair in vector.pairs():
            parts[pair.b_name].mul_(1.0 - strength)
        return values

    return StrengthPath(raw, move)
