"""Noise: seeded Gaussian noise on the factors.

Paper: the random-perturbation baseline of Panacea (arXiv 2501.18100). `std` adds noise of that standard deviation;
`norm` and `relative_norm` scale the draw to an exact length, which makes it the fair control of a perturbation with
a direction (same length, no direction). Noise is added once, in fp32, and never at evaluation time.
"""

from __future__ import annotations

import torch

from workers.ml.errors import NumericError
from workers.ml.recovery.deltas import balanced, unit_scaling
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.specs import NoiseSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: NoiseSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Needs no data."""
    inputs.require(spec)
    progress.step(1, 1, part="noise")
    vector, raw = tuned.vector, tuned.vector.get()
    start = balanced(vector, raw) if spec.regauge else raw
    # With re-gauging, lengths are measured on factors of scaling 1, as panacea measures them.
    unit = unit_scaling(vector) if spec.regauge else torch.ones_like(raw)
    draw = torch.randn(vector.numel, generator=torch.Generator().manual_seed(spec.seed)).to(raw.device)
    norm = float(torch.linalg.vector_norm(start * unit))
    if spec.size_unit == "std":
        noise = spec.size * draw
    else:
        length = spec.size * (norm if spec.size_unit == "relative_norm" else 1.0)
        noise = draw * (length / float(torch.linalg.vector_norm(draw)))
    if float(torch.linalg.vector_norm(noise)) == 0.0:
        raise NumericError("The adapter is zero, so noise relative to it is zero too.", "size")
    step = noise / unit
    facts = {
        "factor_norm": norm,
        "noise_norm": float(torch.linalg.vector_norm(noise)),
        "noise_std": float(noise.std()),
    }
    return StrengthPath(raw, lambda strength: start + strength * step, facts)
