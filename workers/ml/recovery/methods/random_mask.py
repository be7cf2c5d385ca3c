"""Random mask: zeroes a share of the LoRA weights drawn at random.

Paper: the random control of Antidote (arXiv 2408.09600), here at *equal* count: the published figure compares a 30 %
random mask with a 1 % scored one. Masks of growing strength are nested, as scored masks are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.scores import prune_order
from workers.ml.recovery.specs import RandomMaskSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: RandomMaskSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Needs no data."""
    inputs.require(spec)
    progress.step(1, 1, part="mask")
    vector, raw = tuned.vector, tuned.vector.get()
    draw = torch.rand(vector.numel, generator=torch.Generator().manual_seed(spec.seed)).to(raw.device)
    order = prune_order(vector.split(draw), spec.granularity, compat=spec.compat)

    def move(strength: float) -> Tensor:
        return raw.masked_fill(torch.cat([mask.reshape(-1) for mask in order.masks(strength).values()]), 0.0)

    def facts_at(strength: float) -> dict[str, object]:
        pruned = sum(int(mask.sum()) for mask in order.masks(strength).values())
        return {"pruned": pruned, "pruned_ratio": pruned / vector.numel}

    return StrengthPath(raw, move, facts_at=facts_at)
