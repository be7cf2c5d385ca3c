"""The learning rate at every optimizer step.

Knows: warm-up and decay, in the exact form of transformers' schedules, so that runs compare step by step.
Refuses to know: optimizers and tensors. Standard library only.
"""

from __future__ import annotations

import math


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """At least one step comes after it: a run of one step would otherwise train at a rate of 0 and learn nothing."""
    return min(math.ceil(total_steps * warmup_ratio), max(0, total_steps - 1))


def rate_factor(step: int, *, total_steps: int, warmup: int, schedule: str) -> float:
    """What the learning rate is multiplied with in the 0-based `step`: 0 at the start of a warm-up, 1 after it."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress)
