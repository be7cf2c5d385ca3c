"""Random mask: prunes at random as much as a method that scores would.

Paper: the random control of Antidote (arXiv 2408.09600), here at *equal* count: the published figure compares a 30 %
random mask with a 1 % scored one. `of` names what is pruned: weights of the factors (as antidote), entries of the
update (antidote-delta) or its rank components (antidote-rank), counted as those methods count. Masks of growing
strength are nested, as scored masks are.
What it does not do: look at data, or at the weights beyond their shapes and rank.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from workers.ml.recovery.components import Components, dropping_path
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.entries import TopEntries, masked_path
from workers.ml.recovery.scores import prune_order
from workers.ml.recovery.specs import RandomMaskSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress


def prepare(tuned: TunedModel, spec: RandomMaskSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """Needs no data."""
    inputs.require(spec)
    progress.step(1, 1, part="mask")
    return {"factors": _of_factors, "delta": _of_delta, "rank": _of_rank}[spec.of](tuned, spec, progress)


def _of_factors(tuned: TunedModel, spec: RandomMaskSpec, _progress: Progress) -> StrengthPath:
    vector, raw = tuned.vector, tuned.vector.get()
    draw = _draw(spec.seed, vector.numel).to(raw.device)
    order = prune_order(vector.split(draw), spec.granularity, compat=spec.compat)

    def move(strength: float) -> Tensor:
        return raw.masked_fill(torch.cat([mask.reshape(-1) for mask in order.masks(strength).values()]), 0.0)

    def facts_at(strength: float) -> dict[str, object]:
        pruned = sum(int(mask.sum()) for mask in order.masks(strength).values())
        return {"pruned": pruned, "pruned_ratio": pruned / vector.numel}

    return StrengthPath(raw, move, facts_at=facts_at)


def _of_delta(tuned: TunedModel, spec: RandomMaskSpec, progress: Progress) -> StrengthPath:
    vector = tuned.vector
    parts = vector.split(vector.get())
    shapes = {p.module_name: (len(parts[p.b_name]), parts[p.a_name].shape[1]) for p in vector.pairs()}

    def scores(name: str) -> Tensor:
        # A seed for each module, so that one can be drawn again without the others; torch looks at 32 bits of it.
        seed = random.Random(f"{spec.seed}/{name}").getrandbits(32)
        return _draw(seed, math.prod(shapes[name])).view(shapes[name]).to(vector.device)

    top = TopEntries(tuple(shapes), scores, spec.granularity, compat=spec.compat)
    return masked_path(vector, spec.form, top.masks, facts={}, progress=progress)


def _of_rank(tuned: TunedModel, spec: RandomMaskSpec, _progress: Progress) -> StrengthPath:
    raw = tuned.vector.get()
    components = Components(tuned.vector, raw)
    sizes = {name: len(one.S) for name, one in components.spectra.items()}
    draws = _draw(spec.seed, sum(sizes.values())).split(list(sizes.values()))
    order = prune_order(dict(zip(sizes, draws, strict=True)), spec.granularity)
    return dropping_path(components, order, raw, facts={})


def _draw(seed: int, count: int) -> Tensor:
    """Uniform numbers, the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
