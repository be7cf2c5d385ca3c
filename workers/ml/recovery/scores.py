"""Which weights a data set excites: activation statistics, Wanda scores, and the order in which weights are pruned.

Knows: counting, ranking and masking, with ties broken the same way on every machine.
Refuses to know: models, adapters, data sets, and what a caller does with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["row", "tensor", "global"]
Norm = Literal["rms", "mean"]


def squared_norms(activations: Tensor, counted: Tensor) -> Tensor:
    """(samples, channels) in fp64: squared norm of every channel over the counted tokens of each sample.

    `activations` (samples, tokens, channels); `counted` (samples, tokens), 0 on padding, where anything may stand.
    """
    squares = activations.float().square()
    # Overwritten and not multiplied by 0: padding may hold inf or NaN.
    squares.flatten(0, 1).index_fill_(0, (counted == 0).flatten().nonzero().squeeze(1), 0.0)
    return squares.sum(dim=1).double()


class ChannelNorms:
    """Norm of every input channel over samples, without keeping an activation.

    `rms`: root of the mean over samples of the squared norm over a sample's tokens; `mean`: mean of those norms.
    Accumulated in fp64, since a few outlier channels dominate millions of tokens.
    """

    def __init__(self, norm: Norm, squares: Callable[[Tensor, Tensor], Tensor] = squared_norms) -> None:
        self._norm = norm
        self._squares = squares
        self._total: Tensor | None = None
        self.samples = 0

    def add(self, activations: Tensor, counted: Tensor) -> None:
        """`activations` (samples, tokens, channels); `counted` (samples, tokens), 0 on padding."""
        squares = self._squares(activations, counted)
        step = (squares if self._norm == "rms" else squares.sqrt()).sum(dim=0)
        self._total = step if self._total is None else self._total + step
        self.samples += len(activations)

    def value(self) -> Tensor:
        """(channels,) in fp32."""
        if self._total is None:
            raise ValueError("no activation was ever added")
        mean = self._total / self.samples
        return (mean.sqrt() if self._norm == "rms" else mean).float()


def wanda_scores(weight: Tensor, channel_norms: Tensor) -> Tensor:
    """|w| times the norm of the channel it multiplies; `weight` is (outputs, inputs)."""
    return weight.abs() * channel_norms


def prune_count(n: int, ratio: float, *, compat: bool = False) -> int:
    """How many of n weights a ratio prunes. `compat` counts as the Antidote code does, rounding up by accident."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"a mask ratio lies between 0 and 1, got {ratio}")
    if compat:
        return n - int(n * (1 - ratio))
    return min(n, int(n * ratio + 1e-9))


def top_mask(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of the last dimension. Among equal scores the lower index is spared.

    As the stable sort of `prune_order`, without the memory of a sort: for tensors of weights themselves.
    """
    size = scores.shape[-1]
    if count in (0, size):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    threshold = scores.kthvalue(size - count + 1, dim=-1, keepdim=True).values
    mask = scores >= threshold
    surplus = mask.sum(dim=-1, keepdim=True) - count  # ties at the threshold that are too many
    if bool((surplus > 0).any()):
        ties = scores == threshold
        mask &= ~(ties & (ties.cumsum(dim=-1, dtype=torch.int32) <= surplus))
    return mask


@dataclass(frozen=True)
class PruneOrder:
    """For every weight its place in the ascending order of its group: one sort serves every ratio.

    `places` and `group_sizes` have the shape of the weights, by name.
    """

    places: Mapping[str, Tensor]
    group_sizes: Mapping[str, int]
    compat: bool = False

    def masks(self, ratio: float) -> dict[str, Tensor]:
        """True where a weight is pruned: the highest scores of each group."""
        counts = self.counts(ratio)
        return {name: place >= self.group_sizes[name] - counts[name] for name, place in self.places.items()}

    def counts(self, ratio: float) -> dict[str, int]:
        """Weights pruned per group of each tensor (of all tensors together when the order is global)."""
        return {name: prune_count(size, ratio, compat=self.compat) for name, size in self.group_sizes.items()}


def prune_order(scores: Mapping[str, Tensor], granularity: Granularity, *, compat: bool = False) -> PruneOrder:
    """Ranks weights by score. Among equal scores the lower index is spared: the sort is stable."""
    if granularity == "global":
        sizes = [score.numel() for score in scores.values()]
        flat = _places(torch.cat([score.reshape(-1) for score in scores.values()]))
        pieces = flat.split(sizes)
        places = {n: p.view(s.shape) for (n, s), p in zip(scores.items(), pieces, strict=True)}
        return PruneOrder(places, dict.fromkeys(scores, sum(sizes)), compat)
    if granularity == "tensor":
        places = {name: _places(score.reshape(-1)).view(score.shape) for name, score in scores.items()}
        return PruneOrder(places, {name: score.numel() for name, score in scores.items()}, compat)
    return PruneOrder(
        {name: _places(score) for name, score in scores.items()},
        {name: score.shape[-1] for name, score in scores.items()},
        compat,
    )


def _places(scores: Tensor) -> Tensor:
    """Place of each entry in the stable ascending order of its last dimension."""
    order = torch.sort(scores, dim=-1, stable=True).indices
    count = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, count)
