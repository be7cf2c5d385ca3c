"""Which drifted weights go back to where they came from: those a gradient would send there, the steepest first.

Knows: drift, gradient, and the threshold at the k-th largest gradient over all modules together.
Refuses to know: models, what the gradient is of, and what is done with the chosen places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.ml.errors import NumericError


def pull_home(drift: Tensor, gradient: Tensor) -> Tensor:
    """|gradient| where a step down the gradient shrinks the drift, 0 elsewhere; both of one shape.

    An entry without drift is never a candidate. Signs are compared and not the product with 0: of two small numbers
    the product is 0 in fp32.
    """
    return torch.where((drift != 0) & (drift.sign() == gradient.sign()), gradient.abs(), 0.0)


def steepest(
    names: Sequence[str], magnitudes: Callable[[str], Tensor], count: int, *, strict: bool = False
) -> dict[str, Tensor]:
    """Flat places of the `count` largest magnitudes over all modules together, ascending; a magnitude of 0 never.

    Everything at the threshold is taken, so that ties may give a few more; `strict` takes only what lies above it,
    normally `count - 1` places. Where fewer than `count` are above 0, both take all of them.
    `magnitudes` is asked twice for each module, so that one of them at a time is in memory.
    """
    threshold = _at_rank(names, magnitudes, count)
    places = {}
    for name in names:
        values = magnitudes(name).reshape(-1)
        above = values > threshold if strict else values >= threshold
        places[name] = (above & (values > 0)).nonzero().squeeze(1)
    return places


def _at_rank(names: Sequence[str], magnitudes: Callable[[str], Tensor], count: int) -> Tensor:
    """The count-th largest magnitude: 0 where there are fewer, infinity for a count of 0."""
    best: list[Tensor] = []
    for name in names:
        values = magnitudes(name).reshape(-1)
        if not torch.isfinite(values).all():
            raise NumericError(f"The gradient of {name} holds numbers that are not finite.", name)
        pool = torch.cat([*best, values.topk(min(count, len(values))).values])
        best = [pool.topk(min(count, len(pool))).values]
    if count == 0:
        return best[0].new_tensor(float("inf"))
    return best[0][-1] if len(best[0]) == count else best[0].new_zeros(())
